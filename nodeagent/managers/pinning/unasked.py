"""Evidence that the container runtime has stopped calling the agent although its connection is open.

A runtime that has dropped a plugin may keep the connection open: an idle connection then looks healthy, and the first
sign is a container that starts. A runtime calls before it creates a container, so the cgroup of a container without
such a call is evidence. A sandbox is not: no call precedes it. If no bundle distinguishes a sandbox from a container,
as in a DaemonSet, only the second such cgroup of a pod counts: a pod has one sandbox.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nodeagent.core.model.container import Container
from nodeagent.core.pinning.plan import PinPlan
from nodeagent.host.cgroup.layout import Cgroup
from nodeagent.managers.pinning.containers import ContainerTable


def unasked(came: Iterable[Cgroup], bundles: Mapping[str, Container], table: ContainerTable, plan: PinPlan) -> str:
    """Return which container shows that the runtime does not call the agent, or "" if none does.

    `came` are the cgroups that appeared while the runtime was connected, of containers it had not announced; `table`
    knows them by now. `bundles` has the containers read from their bundles, by container id.
    """
    for one in came:
        container = bundles.get(one.container_id)
        if container is not None and container.name:
            return f"a container {container} started without a question"
        if container is None and one.pod_uid in plan.open and len(table.unnamed(one.pod_uid)) > 1:
            return f"a container of pod {one.pod_uid} started without a question"
    return ""
