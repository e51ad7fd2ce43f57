"""Pods and containers as a container runtime shows them, and what may be changed of them. Frozen values; no decisions.

Sizes are in bytes, times in microseconds. `None` of a set or a number: the runtime does not say, or it is not to be
changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from nodeagent.core.model.cpuset import CpuSet


class ContainerState(StrEnum):
    """As the container runtime says."""

    UNKNOWN = "unknown"
    CREATED = "created"
    PAUSED = "paused"
    RUNNING = "running"
    STOPPED = "stopped"


UNKNOWN, CREATED, PAUSED, RUNNING, STOPPED = ContainerState


def _none() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod sandbox."""

    id: str
    """The runtime's own; kubelet knows the pod by `uid`."""
    uid: str
    namespace: str
    name: str
    annotations: Mapping[str, str] = field(default_factory=_none)
    cgroup_parent: str = ""
    """The pod's own cgroup, below which its containers are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a container is confined to, as far as it is said."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    """NUMA nodes."""
    hugepage_limits: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Bytes by page_bytes."""
    cpu_quota_us: int | None = None
    """CPU time in a period; negative: unlimited."""
    cpu_period_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """One container. What `env` says may have been forged by whoever wrote the pod."""

    id: str
    pod_id: str
    pod_uid: str = ""
    """"", as namespace and pod_name, where the runtime listed the container without its pod."""
    namespace: str = ""
    pod_name: str = ""
    name: str
    state: ContainerState = UNKNOWN
    env: Mapping[str, str] = field(default_factory=_none)
    annotations: Mapping[str, str] = field(default_factory=_none)
    cgroup_path: str = ""
    """As the runtime's OCI configuration has it: a path (cgroupfs) or SLICE:PREFIX:ID (systemd)."""
    resources: Resources = Resources()
    pid: int = 0
    """Of its first process; 0: there is none yet."""

    def __str__(self) -> str:
        """NAMESPACE/POD/NAME, or what else tells it apart where nobody has named it."""
        names = [one for one in (self.namespace, self.pod_name, self.name) if one]
        return "/".join(names) or f"{self.id[:12]} of pod {self.pod_uid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """What a container is created with beyond what it would have had."""

    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    hugepage_limits: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Bytes by page_bytes."""
    env: Mapping[str, str] = field(default_factory=_none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A change of a container that exists."""

    container_id: str
    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    hugepage_limits: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Bytes by page_bytes."""
