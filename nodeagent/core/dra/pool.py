"""What a DRA driver publishes, as frozen values: pools of devices with attributes, capacities, counters and taints.

Nothing here is on the wire: kube/resourceslice/render.py writes it as ResourceSlices. Names follow
resource.k8s.io/v1; a quantity is an integer in the unit that its name carries or that Kubernetes gives it (bytes,
CPUs, shares).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import NodeId

Value = str | int | bool
"""Of an attribute. bool is bool, never 0 or 1."""

NO_SCHEDULE, NO_EXECUTE = "NoSchedule", "NoExecute"
UNHEALTHY_TAINT, HELD_TAINT = "nodeagent.dev/unhealthy", "nodeagent.dev/held-by-device-plugin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """An amount that a device has. Where the device is shared, a claim consumes least, least + step, … of it."""

    value: int
    binary: bool = False
    """Bytes, written as 512Mi; otherwise a plain number."""
    least: int = 1
    """The smallest amount that can be consumed, and what a request gets that does not say."""
    step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Taint:
    """Keeps claims without a toleration off a device (DeviceTaint)."""

    key: str
    value: str = ""
    effect: str = NO_SCHEDULE


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterSet:
    """What devices of a pool consume together: a whole and its parts cannot be had at once."""

    name: str
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePart:
    """What one device of a pool stands for on this machine."""

    cpus: CpuSet = EMPTY
    """CPUs that are granted from these."""
    node: NodeId | None = None
    page_bytes: int = 0
    """Hugepages of this size on `node`; 0 with a node: memory."""
    amount: int = 0
    """Bytes of pages or memory that are had at once, where the device is not shared."""
    device: str = ""
    """Device.id."""
    shares: int = 0
    """Into how many shares the device is divided; 0: it is had whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDevice:
    """One device of a pool. `name` is a DNS label and stable over reboots."""

    name: str
    part: DevicePart
    attributes: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))
    """By qualified name; one without a domain is in the driver's own."""
    capacity: Mapping[str, Capacity] = field(default_factory=lambda: MappingProxyType({}))
    shared: bool = False
    """Several claims may have some of its capacity (allowMultipleAllocations)."""
    consumes: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    """Counters by counter set."""
    taints: tuple[Taint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All devices of one kind on this node, in a fixed order."""

    kind: str
    devices: tuple[PoolDevice, ...] = ()
    counters: tuple[CounterSet, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the API server keeps of a ResourceSlice; a pool is formed without what it drops."""

    consumable: bool = True
    """allowMultipleAllocations and requestPolicy (DRAConsumableCapacity)."""
    counters: bool = True
    """sharedCounters and consumesCounters (DRAPartitionableDevices)."""
    taints: bool = True
    """taints (DRADeviceTaints)."""


ALL_FEATURES = Features()
