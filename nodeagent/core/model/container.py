"""Pods and containers as the container runtime reports them, and the changes that can be made to them.

Frozen values; no decisions. Sizes are in bytes, times in microseconds. A set or number that is `None` is either not
reported by the runtime or not to be changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import CpuSet


class ContainerState(StrEnum):
    """State of a container as the runtime reports it."""

    UNKNOWN = "unknown"
    CREATED = "created"
    PAUSED = "paused"
    RUNNING = "running"
    STOPPED = "stopped"


UNKNOWN, CREATED, PAUSED, RUNNING, STOPPED = ContainerState


class PageLimits(StrEnum):
    """What limits of hugepages mean."""

    FOUND = "found"
    """As they are by now: the agent may have set them."""
    ASKED = "asked"
    """As kubelet asked for them by the container's own limits."""
    COUNTED = "counted"
    """As kubelet asked for them while it counted claims: what they hold may be included."""


def _none() -> Mapping[str, str]:
    return MappingProxyType({})


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """A pod sandbox."""

    id: str
    """The runtime's sandbox id; kubelet knows the pod by `uid`."""
    uid: str
    namespace: str
    name: str
    annotations: Mapping[str, str] = msgspec.field(default_factory=_none)
    cgroup_parent: str = ""
    """The pod's own cgroup; its containers' cgroups are below it."""
    network: str = ""
    """Path of its network namespace, or "" if the runtime does not name one."""
    on_host_network: bool = False
    """Whether it has no network namespace of its own (hostNetwork)."""
    pid: int = 0
    """PID of the sandbox's process, or 0 if the runtime does not name it."""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of a container, as far as the runtime reports them."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    """NUMA nodes."""
    hugepage_limits: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Limit in bytes, by page_bytes."""


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """One container. The author of the pod may have forged the contents of `env`."""

    id: str
    pod_id: str
    pod_uid: str = ""
    """Empty, like namespace and pod_name, if the runtime listed the container without its pod."""
    namespace: str = ""
    pod_name: str = ""
    name: str
    state: ContainerState = UNKNOWN
    env: Mapping[str, str] = msgspec.field(default_factory=_none)
    annotations: Mapping[str, str] = msgspec.field(default_factory=_none)
    cgroup_path: str = ""
    """As in the runtime's OCI configuration: a path (cgroupfs) or SLICE:PREFIX:ID (systemd)."""
    resources: Resources = Resources()
    page_limits: PageLimits = PageLimits.FOUND
    """Whose limits of hugepages are in `resources`."""
    pid: int = 0
    """PID of its first process, or 0 if there is none yet."""

    def __str__(self) -> str:
        """Return NAMESPACE/POD/NAME, or the short container id and pod UID if no name is known."""
        names = [one for one in (self.namespace, self.pod_name, self.name) if one]
        return "/".join(names) or f"{self.id[:12]} of pod {self.pod_uid}"


class Adjustment(msgspec.Struct, frozen=True, kw_only=True):
    """What is added to a container's configuration when it is created."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    hugepage_limits: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Limit in bytes, by page_bytes."""
    env: Mapping[str, str] = msgspec.field(default_factory=_none)
    rdt_class: str = ""
    """The group of resctrl that the runtime puts it into; "" leaves that to others."""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """A change to an existing container."""

    container_id: str
    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    hugepage_limits: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Limit in bytes, by page_bytes."""
