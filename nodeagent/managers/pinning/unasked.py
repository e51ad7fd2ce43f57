"""What shows that the container runtime has stopped asking, although the connection to it stands.

A runtime that has dropped a plugin may keep the connection open: then an idle connection looks like any other, and the
first to tell is a container that starts. A runtime asks before it makes a container, so a control group of one that it
never asked about is evidence. A sandbox is not: it is made without a question. Where no bundle tells a sandbox from a
container, as in a DaemonSet, only the second of a pod counts: a pod has one sandbox.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nodeagent.core.model.container import Container
from nodeagent.core.pinning.plan import PinPlan
from nodeagent.host.cgroup.layout import Cgroup
from nodeagent.managers.pinning.containers import ContainerTable


def unasked(came: Iterable[Cgroup], bundles: Mapping[str, Container], table: ContainerTable, plan: PinPlan) -> str:
    """Which container shows that the runtime does not ask; "" where none does.

    came: control groups that appeared while the runtime was connected, of containers that it had not announced, and
    that `table` knows by now. bundles: what these say, by container id.
    """
    for one in came:
        container = bundles.get(one.container_id)
        if container is not None and container.name:
            return f"a container {container} started without a question"
        if container is None and one.pod_uid in plan.open and len(table.unnamed(one.pod_uid)) > 1:
            return f"a container of pod {one.pod_uid} started without a question"
    return ""
