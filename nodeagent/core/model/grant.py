"""What is held, and who holds it. Frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What kubelet says that one container holds of one device-plugin resource."""

    namespace: str
    pod: str
    container: str
    resource: str
    ids: tuple[str, ...]


DEVICE_PLUGIN, CLAIM, KUBELET = "device-plugin", "claim", "kubelet"
"""Holder.api: which protocol a grant came through, or that it was taken over from kubelet's own managers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a grant: a ResourceClaim, or a container, known by name only once kubelet lists it."""

    api: str
    resource: str = ""
    """The extended resource, or the device class KIND.DRIVER."""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    claim: str = ""
    """Name of the claim."""
    uid: str = ""
    """Of the claim; of what was taken over from kubelet, of the pod."""

    def __str__(self) -> str:
        if self.api == CLAIM:
            return f"claim {self.namespace}/{self.claim}"
        if self.api == KUBELET:
            return f"kubelet's pod {self.uid}" + (f"/{self.container}" if self.container else "")
        where = "/".join(part for part in (self.namespace, self.pod, self.container) if part)
        return where or f"a container not yet listed ({self.resource})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What one holder holds. ids are the names its API knows the parts by."""

    id: str
    holder: Holder
    ids: tuple[str, ...] = ()
    cpus: CpuSet = EMPTY
    hugepages: tuple[Pages, ...] = ()
    memory: tuple[tuple[NodeId, int], ...] = ()
    devices: tuple[str, ...] = ()
    """Devices held whole."""
    shares: tuple[str, ...] = ()
    """Devices held by some of several shares."""
    things: tuple[tuple[str, str], ...] = ()
    """(device id, thing): what `devices` and `shares` handed over when they were granted; core/ledger/exclusion.py."""
    granted_at: float = 0.0
    """Seconds since the epoch."""
    confirmed: bool = False
    """Kubelet has listed the holder."""
    boot_id: str = ""
    result: Result | None = None
    """Of a claim: what the scheduler allocated, that this grant gives."""
    settings: str = ""
    """Of a claim: the configuration that applies (core/dra/opaque_config.py), as JSON."""
    pods: tuple[str, ...] = ()
    """UIDs of the pods that hold it: those that its claim was reserved for when that was last read, or those that
    kubelet's device checkpoint last had its ids with."""

    @property
    def pod_uids(self) -> tuple[str, ...]:
        """UIDs of the pods that hold it, as far as they are known."""
        return (self.holder.uid,) if self.holder.api == KUBELET else self.pods
