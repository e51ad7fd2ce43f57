"""What a DRA driver publishes, as frozen values: pools of devices with attributes, capacities, counters and taints.

These are not wire types: kube/resourceslice/render.py turns them into ResourceSlices. Names follow resource.k8s.io/v1.
A quantity is an integer in the unit that its name carries or that Kubernetes uses (bytes, CPUs, shares).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.topology import NodeId

Value = str | int | bool | tuple[int, ...] | tuple[str, ...]
"""Value of an attribute. A bool stays a bool and is never 0 or 1. A list is not empty, and has values of one type."""

NO_SCHEDULE, NO_EXECUTE = "NoSchedule", "NoExecute"
READY_CONDITION, REFUSED_CONDITION = "Ready", "nodeagent.dev/Refused"
"""Conditions of a device in a claim's status: the claim is prepared; the device cannot be granted to it."""
UNHEALTHY_TAINT, HELD_TAINT = "nodeagent.dev/unhealthy", "nodeagent.dev/held-by-device-plugin"
PATH_TAINT = "nodeagent.dev/path-lost"
"""On a device that nodes share: one of them has it connected and cannot reach it; the value is that node's name."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """An amount that a device has. If the device is shared, a claim consumes least, least + step, … of it."""

    value: int
    binary: bool = False
    """True for bytes, written as 512Mi; otherwise a plain number."""
    least: int = 1
    """The smallest amount that can be consumed."""
    step: int = 1
    usual: int = 0
    """The amount for a request that does not specify one, whole steps above the smallest; 0: the smallest."""

    @property
    def default(self) -> int:
        """Return the amount for a request that does not specify one."""
        return self.usual or self.least


class Taint(msgspec.Struct, frozen=True, kw_only=True):
    """A taint that keeps claims without a toleration off a device (DeviceTaint)."""

    key: str
    value: str = ""
    effect: str = NO_SCHEDULE


class CounterSet(msgspec.Struct, frozen=True, kw_only=True):
    """Counters that devices of a pool consume jointly: a whole and its parts cannot be allocated at the same time."""

    name: str
    counters: Mapping[str, int]


class NodeCost(msgspec.Struct, frozen=True, kw_only=True):
    """What an allocation of a device takes of one resource that its Node has allocatable, such as cpu or memory
    (NodeAllocatableResource of resource.k8s.io/v1, Kubernetes 1.37). It is a mapping, an overhead, or both."""

    capacity: str = ""
    """The capacity of the device, of which each consumed unit counts; only for devices that are shared."""
    amount: int = 0
    """What counts for each allocation of a device that is not shared, in the unit of the resource."""
    largest: int = 0
    """All that the device can ever give, in the unit of the resource."""
    per_pod: str = ""
    """Overhead of each pod that uses the device, as a quantity; "" for none."""
    per_container: str = ""
    """Overhead of each container that uses the device, as a quantity; "" for none."""

    @property
    def mapped(self) -> bool:
        """Return whether the device stands for an amount of the resource."""
        return bool(self.capacity or self.amount)


class DevicePart(msgspec.Struct, frozen=True, kw_only=True):
    """What one device of a pool stands for on this machine."""

    cpus: CpuSet = EMPTY
    """The CPUs from which a claim is granted some."""
    node: NodeId | None = None
    page_bytes: int = 0
    """Size of the hugepages on `node`; 0 with a node means memory."""
    amount: int = 0
    """Bytes of pages or memory that are allocated as a whole, if the device is not shared."""
    device: str = ""
    """Device.id."""
    shares: int = 0
    """Number of shares into which the device is divided; 0 if it is allocated whole."""
    each: tuple[tuple[str, int], ...] = ()
    """What an equal share has of other capacities of the device, by name (core/sharing/amounts.py)."""


class PoolDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a pool. `name` is a DNS label and stays the same across reboots."""

    name: str
    part: DevicePart
    attributes: Mapping[str, Value] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By qualified name; a name without a domain belongs to the driver's domain."""
    capacity: Mapping[str, Capacity] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    shared: bool = False
    """True if several claims may consume its capacity (allowMultipleAllocations)."""
    consumes: Mapping[str, Mapping[str, int]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Counters by counter set."""
    taints: tuple[Taint, ...] = ()
    costs: Mapping[str, NodeCost] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By resource of the Node: cpu, memory, hugepages-2Mi. Published are those in `Pool.counted`."""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes that share a pool: those with all of these labels, or all nodes if there are none."""

    labels: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """All devices of one kind on this node, or that several nodes share, in a fixed order."""

    kind: str
    devices: tuple[PoolDevice, ...] = ()
    counters: tuple[CounterSet, ...] = ()
    counted: frozenset[str] = frozenset()
    """Resources of the Node against which the scheduler counts what claims take."""
    conditional: bool = False
    """Whether a pod is bound only after its claim has been granted what the scheduler allocated (bindingConditions)."""
    scope: Scope | None = None
    """The nodes that share it; None if it belongs to this node. A shared pool is called after its kind alone."""

    def name(self, node_name: str) -> str:
        """Return the name of the pool in the cluster, on a node."""
        return self.kind if self.scope is not None else f"{node_name}/{self.kind}"


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """ResourceSlice fields that the API server keeps; pools are built without those that it drops.

    docs/compatibility.md has the Kubernetes versions.
    """

    consumable: bool = True
    """allowMultipleAllocations and requestPolicy (DRAConsumableCapacity)."""
    counters: bool = True
    """sharedCounters and consumesCounters (DRAPartitionableDevices)."""
    taints: bool = True
    """taints (DRADeviceTaints)."""
    allocatable: bool = True
    """nodeAllocatableResources (DRANodeAllocatableResources)."""
    conditions: bool = True
    """bindingConditions (DRADeviceBindingConditions)."""
    lists: bool = True
    """Attributes with several values (DRAListTypeAttributes)."""

    def __and__(self, other: Features) -> Features:
        return Features(**{name: getattr(self, name) and getattr(other, name) for name in FEATURES})

    def __or__(self, other: Features) -> Features:
        return Features(**{name: getattr(self, name) or getattr(other, name) for name in FEATURES})

    def names(self, *, kept: bool = True) -> tuple[str, ...]:
        """Return the names of the features that are kept, or of those that are not."""
        return tuple(name for name in FEATURES if getattr(self, name) == kept)


FEATURES = Features.__struct_fields__
ALL_FEATURES, NO_FEATURES = Features(), Features(**dict.fromkeys(FEATURES, False))
