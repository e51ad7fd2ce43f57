"""The Protocol of a kind of device, with its input and its result.

A kind reads (`discover`) and describes (`edits`); it decides nothing, writes nothing and keeps no state. What several
kinds need (PCI functions, NVML's answer) comes in the Context, so no file is read twice.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import msgspec

from nodeagent.core.dsa.division import Division, Rule, is_agents, rule_for
from nodeagent.core.fabrics.target import Port
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import SHARED_NODES, ContainerEdits, Device, DeviceNode, Link
from nodeagent.core.model.inventory import KindState
from nodeagent.core.model.topology import NodeId
from nodeagent.host.devices.disks import BlockUses
from nodeagent.host.nvml.client import Failure, Snapshot
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.uses.default_route import routed_interfaces
from nodeagent.host.uses.used_paths import UsedPath

Attributes = Mapping[str, str | int | bool]
LONGEST_ID = 63


class CharSelector(msgspec.Struct, frozen=True, kw_only=True):
    """Character devices to serve. globs: paths below /dev ("/dev/ttyUSB*")."""

    name: str
    globs: tuple[str, ...]


class UsbSelector(msgspec.Struct, frozen=True, kw_only=True):
    """USB devices to serve. vendor and product: four hexadecimal digits. An empty product or serial matches any."""

    name: str
    vendor: str
    product: str = ""
    serial: str = ""


class TargetSelector(msgspec.Struct, frozen=True, kw_only=True):
    """An NVMe target on the network to serve. selector: name of the resource."""

    name: str
    selector: str
    port: Port


class PciSelector(msgspec.Struct, frozen=True, kw_only=True):
    """PCI functions to mark with `name`. pci_class: leading digits of the six. An empty field matches any."""

    name: str
    vendor: str = ""
    device: str = ""
    pci_class: str = ""

    def matches(self, function: Function) -> bool:
        """Return whether a PCI function matches the vendor, device and class."""
        return (
            self.vendor in ("", function.vendor)
            and self.device in ("", function.device)
            and (function.pci_class or "").startswith(self.pci_class)
        )


BLOCK_TYPES = ("namespace", "partition", "volume")
"""Values of the attribute `type` of what is a part of disks: NVMe namespaces, partitions, LVM volumes."""


class PartitionSelector(msgspec.Struct, frozen=True, kw_only=True):
    """GPUs in MIG mode are divided on demand. own: (UUID of the GPU, profile, start) of each instance that the agent
    made or is making; all others were made by the admin or another program."""

    own: frozenset[tuple[str, int, int]] = frozenset()


def no_records() -> Mapping[str, Division]:
    """Return nothing: who looks does not know which accelerators an agent has divided."""
    return {}


class DsaSelector(msgspec.Struct, frozen=True, kw_only=True):
    """Accelerators that are given to the agent, to be divided into work queues."""

    rules: tuple[Rule, ...] = ()
    divided: Callable[[], Mapping[str, Division]] = no_records
    """Reads which the agent has divided, or begun to, by PCI address; blocks. What is read of the machine is judged by
    what this returns before and after: a queue may be made or taken down meanwhile."""

    def rule(self, address: str, name: str) -> Rule | None:
        """Return the rule by which one is given to the agent, or None. name: "" if it has none."""
        return rule_for(self.rules, address, name)


def is_made(label: str, slot: int, records: Iterable[Division | None]) -> bool:
    """Return whether a work queue is one that an agent makes for claims: by its name, or as it is just being made or
    taken down and has none. records: of its accelerator, from before and after it was read."""
    held = (one is not None and one.of(slot) is not None for one in records)
    return is_agents(label) or (not label and any(held))


class Context(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What was read and configured before discovery."""

    functions: tuple[Function, ...] = ()
    """All PCI functions in order of address."""
    online: CpuSet = EMPTY
    nodes: frozenset[NodeId] = frozenset()
    char: tuple[CharSelector, ...] = ()
    usb: tuple[UsbSelector, ...] = ()
    pci: tuple[PciSelector, ...] = ()
    targets: tuple[TargetSelector, ...] = ()
    connected_nqns: frozenset[str] = frozenset()
    """Subsystems that the agent has connected for claims: their disks are no devices of their own."""
    dsa: DsaSelector = DsaSelector()
    block_types: frozenset[str] = frozenset()
    """Which of BLOCK_TYPES to look for."""
    block_uses: BlockUses | None = None
    """None if it was not read what the node uses of all block devices."""
    routed: frozenset[str] | None = None
    """Network interfaces that carry the node's default routes, or None if that was not read."""
    used_paths: tuple[UsedPath, ...] = ()
    """Where the things are that the node uses."""
    nvml: Snapshot | Failure | None = None
    """None if NVML was not queried."""
    partitions: PartitionSelector | None = None
    """None if nothing is divided on demand."""
    warnings: tuple[str, ...] = ()
    """Warnings from reading the above."""

    @functools.cached_property
    def function_by_address(self) -> Mapping[str, Function]:
        """Return all PCI functions by their address."""
        return MappingProxyType({function.address: function for function in self.functions})


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind found."""

    state: KindState
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    warnings: tuple[str, ...] = ()
    """Each names a file and a value."""


@runtime_checkable
class Kind(Protocol):
    """A family of devices."""

    @property
    def name(self) -> str:
        """One lower-case word; Device.kind of what it finds."""
        ...

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        """Return the devices found. Runs in a thread, may block, and only reads. If it raises, the kind is degraded."""
        ...

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return what a container needs for `device`. devices: all devices of this kind that the container gets,
        including `device`, for what is set once for all of them (a variable that lists them)."""
        ...


def pci_device(
    context: Context,
    function: Function,
    kind: str,
    *,
    paths: Iterable[str] = (),
    attributes: Attributes = MappingProxyType({}),
) -> Device:
    """Return a PCI function as a device of a kind. If bound to vfio, it is used only through its IOMMU group: the
    holder of one function of the group has them all."""
    vfio = function.vfio_nodes
    group = (f"iommu-group:{function.iommu_group}",)
    return Device(
        kind=kind,
        id=function.address,
        pci_address=function.address,
        paths=vfio or tuple(paths),
        exclusive=(*(one for one in vfio if one not in SHARED_NODES), *group) if vfio else None,
        parent=function.physical,
        attributes=MappingProxyType({**_marks(context, function), **_sriov(context, function), **attributes}),
        **function.pci_facts(),
    )


def part_of(owner: Function | None, *, kind: str, id: str, paths: Iterable[str], attributes: Attributes) -> Device:
    """Return a device that is not a PCI function but is attached below one (a disk, a
    serial port), with its location."""
    below = Device(kind=kind, id=short_id(id), paths=tuple(paths), attributes=MappingProxyType(dict(attributes)))
    if owner is None:
        return below
    return Device(
        kind=kind,
        id=below.id,
        paths=below.paths,
        attributes=below.attributes,
        numa_node=owner.numa_node,
        local_cpus=owner.local_cpus,
        pcie_root=owner.pcie_root,
        bridges=(*owner.bridges, owner.address),
        parent=owner.address,
    )


def routed_in(reader: Tolerant, context: Context) -> frozenset[str]:
    """Return the network interfaces that carry the node's default routes, read if the context does not have them."""
    return routed_interfaces(reader) if context.routed is None else context.routed


def node_edits(device: Device, devices: Sequence[Device]) -> ContainerEdits:
    """Return the device's nodes under their own paths, and one variable with the PCI addresses of all of its kind."""
    addresses = sorted({one.pci_address for one in devices if one.pci_address is not None})
    env = {f"PCIDEVICE_NODEAGENT_{device.kind.upper()}": ",".join(addresses)} if addresses else {}
    return ContainerEdits(env=MappingProxyType(env), device_nodes=nodes(device.paths))


def nodes(paths: Iterable[str]) -> tuple[DeviceNode, ...]:
    """Return device nodes that have the same path in the container as on the host."""
    return tuple(DeviceNode(host_path=path, container_path=path) for path in paths)


def short_id(text: str) -> str:
    """Return the text, or, if it is too long, its beginning and a digest of the whole."""
    if len(text) <= LONGEST_ID:
        return text
    return f"{text[: LONGEST_ID - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _marks(context: Context, function: Function) -> Attributes:
    name = next((selector.name for selector in context.pci if selector.matches(function)), None)
    return {} if name is None else {"selector": name}


def _sriov(context: Context, function: Function) -> Attributes:
    if function.physical is not None:
        owner = context.function_by_address.get(function.physical)
        index = owner.vfs.get(function.address) if owner is not None else None
        return {"sriov": "vf"} if index is None else {"sriov": "vf", "vf_index": index}
    if function.max_vfs:
        return {"sriov": "pf", "sriov_totalvfs": function.max_vfs, "sriov_numvfs": len(function.vfs)}
    return {}
