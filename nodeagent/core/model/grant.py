"""Grants and their holders. Frozen values."""

from __future__ import annotations

import msgspec

from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import NodeId


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What one container holds of one device-plugin resource, according to kubelet."""

    namespace: str
    pod: str
    container: str
    resource: str
    ids: tuple[str, ...]


DEVICE_PLUGIN, CLAIM, KUBELET = "device-plugin", "claim", "kubelet"
"""Values of Holder.api: the API that a grant came through, or KUBELET if it was imported from kubelet's own
managers."""
OTHER_PLUGIN = "other-plugin"
"""What stands for Holder.api where admins see a holding of another device plugin (core/ledger/foreign.py)."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Holder of a grant: a ResourceClaim or a container. A container's name is known only after kubelet has listed
    it."""

    api: str
    resource: str = ""
    """The extended resource, or KIND.DRIVER for a claim."""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    claim: str = ""
    """Name of the claim."""
    pod_claim: str = ""
    """The pod's name of a claim that was made from a template."""
    uid: str = ""
    """UID of the claim, or of the pod if the grant was imported from kubelet."""

    def __str__(self) -> str:
        if self.api == CLAIM:
            return f"claim {self.namespace}/{self.claim}"
        if self.api == KUBELET:
            return f"kubelet's pod {self.uid}" + (f"/{self.container}" if self.container else "")
        where = "/".join(part for part in (self.namespace, self.pod, self.container) if part)
        return where or f"a container not yet listed ({self.resource})"


Amount = tuple[str, str, int]
"""(device id, capacity, amount) of what is held of a shared device: core/sharing/amounts.py."""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What one holder holds. `ids` are the names by which its API knows the parts."""

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
    amounts: tuple[Amount, ...] = ()
    """What it has of the memory and the cores of `shares`, sorted."""
    things: tuple[tuple[str, str], ...] = ()
    """(device id, thing): what `devices` and `shares` handed over when they were granted; core/ledger/exclusion.py."""
    granted_at: float = 0.0
    """Seconds since the epoch."""
    confirmed: bool = False
    """True if kubelet has listed the holder."""
    boot_id: str = ""
    result: Result | None = None
    """For a claim: the scheduler's allocation result that this grant satisfies."""
    settings: str = ""
    """For a claim: the effective configuration (core/opaque/settings.py), as JSON."""
    pods: tuple[str, ...] = ()
    """UIDs of the pods that hold it: the pods for which the claim was reserved when it was last read, or the pods that
    had its ids in kubelet's device checkpoint when that was last read."""

    @property
    def pod_uids(self) -> tuple[str, ...]:
        """Return the UIDs of the pods that hold it, as far as they are known."""
        return (self.holder.uid,) if self.holder.api == KUBELET else self.pods


def describe(grant: Grant) -> str:
    """Return in words what a grant holds."""
    parts = [f"CPUs {grant.cpus}"] if grant.cpus else []
    parts += [f"{one.pages} pages of {one.page_bytes} bytes on NUMA node {one.node}" for one in grant.hugepages]
    parts += [f"{size} bytes on NUMA node {node}" for node, size in grant.memory]
    return ", ".join([*parts, *grant.devices, *grant.shares]) or "no exclusive part"
