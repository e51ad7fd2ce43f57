"""Discovers the devices of all kinds, one kind at a time, and merges them.

Promises: a kind that raises is degraded, with its reason, and affects no other kind; every device appears once, under
the most specific kind; the order is by kind, then id. Third parties add a kind by an entry point in the group
`nodeagent.kinds` (docs/kinds.md).
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import SHARED_NODES, ContainerEdits, Device, Draws, Link
from nodeagent.core.model.inventory import DEGRADED, KindState
from nodeagent.core.model.topology import NodeId
from nodeagent.host.devices.accelerators.accel import Accel
from nodeagent.host.devices.accelerators.dsa import Dsa
from nodeagent.host.devices.accelerators.dsa_queue import DsaQueue
from nodeagent.host.devices.accelerators.qat import Qat
from nodeagent.host.devices.accelerators.sgx import Sgx
from nodeagent.host.devices.base import (
    LONGEST_ID,
    CharSelector,
    Context,
    DsaSelector,
    Found,
    Kind,
    PartitionSelector,
    PciSelector,
    TargetSelector,
    UsbSelector,
)
from nodeagent.host.devices.block import Block
from nodeagent.host.devices.char import Char
from nodeagent.host.devices.disks import block_uses
from nodeagent.host.devices.fpga import Fpga
from nodeagent.host.devices.gpu import Gpu
from nodeagent.host.devices.hooks import fault, forms
from nodeagent.host.devices.imex import Imex
from nodeagent.host.devices.network.vdpa import Vdpa
from nodeagent.host.devices.nic import Nic
from nodeagent.host.devices.nvme import Nvme
from nodeagent.host.devices.pci import Pci
from nodeagent.host.devices.storage.nvmeof import Nvmeof
from nodeagent.host.devices.usb import Usb
from nodeagent.host.nvml.client import Failure, Snapshot
from nodeagent.host.pci import functions as read_functions
from nodeagent.host.pci import is_address, order
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.uses.default_route import routed_interfaces
from nodeagent.host.uses.remote_storage import storage_interfaces
from nodeagent.host.uses.used_paths import used_paths, with_all_uses

__all__ = [
    "CharSelector",
    "Context",
    "Devices",
    "DsaSelector",
    "Found",
    "Kind",
    "PartitionSelector",
    "PciSelector",
    "TargetSelector",
    "UsbSelector",
    "builtin_kinds",
    "discover",
    "edits",
    "load_kinds",
    "read_context",
]
GROUP = "nodeagent.kinds"
MOST_COUNTERS = 32
"""In one set (resource.k8s.io/v1, ResourceSliceMaxCountersPerCounterSet)."""
NO_DSA = DsaSelector()
_COUNTER = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class Devices(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of all kinds together."""

    devices: tuple[Device, ...] = ()
    """In order of kind, then id."""
    links: tuple[Link, ...] = ()
    kinds: tuple[KindState, ...] = ()
    warnings: tuple[str, ...] = ()


def builtin_kinds() -> tuple[Kind, ...]:
    """Return the built-in kinds, the most specific first: if two find the same device, the earlier one keeps it."""
    accelerators = Fpga(), Qat(), Accel(), Dsa(), DsaQueue(), Sgx(), Imex()
    return Gpu(), Nic(), Vdpa(), Nvme(), Nvmeof(), *accelerators, Block(), Usb(), Char(), Pci()


def load_kinds() -> tuple[Kind, ...]:
    """Return third-party kinds, then the built-in ones. One that cannot be loaded is replaced by a degraded kind."""
    entries = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    loaded: list[Kind] = []
    for entry in entries:
        loaded.append(_load(entry, {form.__name__ for form in forms(loaded).own.values()}))
    return (*loaded, *builtin_kinds())


def read_context(
    sysfs: SysFs,
    *,
    online: CpuSet = EMPTY,
    nodes: Iterable[NodeId] = (),
    char: tuple[CharSelector, ...] = (),
    usb: tuple[UsbSelector, ...] = (),
    pci_selectors: tuple[PciSelector, ...] = (),
    targets: tuple[TargetSelector, ...] = (),
    connected_nqns: frozenset[str] = frozenset(),
    dsa: DsaSelector = NO_DSA,
    block_types: frozenset[str] = frozenset(),
    nvml: Snapshot | Failure | None = None,
    partitions: PartitionSelector | None = None,
) -> Context:
    """Read once what several kinds need. Blocks."""
    reader = Tolerant(sysfs)
    known = frozenset(nodes)
    functions = read_functions(reader, online, known)
    blocks, routed = block_uses(reader), routed_interfaces(reader)
    return Context(
        functions=functions,
        online=online,
        nodes=known,
        char=char,
        usb=usb,
        pci=pci_selectors,
        targets=targets,
        connected_nqns=connected_nqns,
        dsa=dsa,
        block_types=block_types,
        block_uses=blocks,
        routed=routed,
        used_paths=used_paths(reader, routed, blocks, storage_interfaces(reader, blocks.servers)),
        nvml=nvml,
        partitions=partitions,
        warnings=tuple(reader.warnings),
    )


def discover(sysfs: SysFs, kinds: Sequence[Kind], context: Context) -> Devices:
    """Run discovery of every kind, keeping each device once. Blocks."""
    found = [_ask(kind, sysfs, context) for kind in kinds]
    devices, repeated = _once(device for one in found for device in one.devices)
    known = {device.id for device in devices}
    return Devices(
        devices=tuple(sorted(with_all_uses(devices, context.used_paths), key=_order)),
        links=tuple(link for one in found for link in one.links if link.a in known and link.b in known),
        kinds=tuple(sorted((one.state for one in found), key=lambda state: state.kind)),
        warnings=(*context.warnings, *(warning for one in found for warning in one.warnings), *repeated),
    )


def edits(kind: Kind, devices: Sequence[Device], same_request: Sequence[Device] | None = None) -> ContainerEdits:
    """Return what a container needs for some devices of one kind, in their order, each node once.

    same_request: all devices of the kind that the container gets, or None if these are all.
    """
    every = devices if same_request is None else same_request
    return merged([kind.edits(device, every) for device in devices])


def merged(parts: Sequence[ContainerEdits]) -> ContainerEdits:
    """Return all that some parts say, each node, mount, name and hook once; the last says what a variable is."""
    return ContainerEdits(
        env=MappingProxyType({name: value for part in parts for name, value in part.env.items()}),
        device_nodes=tuple(dict.fromkeys(node for part in parts for node in part.device_nodes)),
        mounts=tuple(dict.fromkeys(mount for part in parts for mount in part.mounts)),
        annotations=MappingProxyType({name: value for part in parts for name, value in part.annotations.items()}),
        cdi_devices=tuple(dict.fromkeys(name for part in parts for name in part.cdi_devices)),
        hooks=tuple(dict.fromkeys(hook for part in parts for hook in part.hooks)),
    )


class _Broken(msgspec.Struct, frozen=True):
    """Placeholder for a third-party kind that cannot be used."""

    name: str
    reason: str

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        return _degraded(self.name, self.reason)

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        return ContainerEdits()


def _load(entry: importlib.metadata.EntryPoint, configurations: Collection[str]) -> Kind:
    """Return the kind of an entry point. configurations: names of those that other kinds have."""
    try:
        kind: object = entry.load()()
    except (Exception, SystemExit) as error:  # whatever a third party's import or constructor raises
        return _Broken(entry.name, f"cannot load {entry.value}: {_said(error)}")
    if not isinstance(kind, Kind) or not isinstance(kind.name, str):
        return _Broken(entry.name, f"cannot use {entry.value}: it lacks one of name, discover, edits")
    if kind.name in {own.name for own in builtin_kinds()}:
        return _Broken(entry.name, f"cannot use {entry.value}: the kind {kind.name!r} is built in")
    if why := fault(kind):
        return _Broken(entry.name, f"cannot use {entry.value}: {why}")
    name = getattr(getattr(kind, "config", None), "__name__", "")
    if name in configurations:
        return _Broken(entry.name, f"cannot use {entry.value}: another kind has a configuration called {name}")
    return kind


def _ask(kind: Kind, sysfs: SysFs, context: Context) -> Found:
    try:
        found = kind.discover(sysfs, context)
        _check(kind, found)
    except (Exception, SystemExit) as error:  # any failure of one kind degrades only that kind
        return _degraded(kind.name, f"cannot look for {kind.name} devices: {_said(error)}")
    return found


def _check(kind: Kind, found: object) -> None:
    if not isinstance(found, Found):
        raise TypeError(f"discover answered {type(found).__name__} instead of Found")
    totals: dict[str, Mapping[str, int]] = {}
    for device in found.devices:
        _check_types(device)
        if device.draws is not None:
            _check_draws(device, device.draws, totals)
        if not 1 <= len(device.id) <= LONGEST_ID:
            raise ValueError(f"device id {device.id!r} has {len(device.id)} characters, 1 to {LONGEST_ID} are allowed")


def _check_types(device: object) -> None:
    if not isinstance(device, Device):
        raise TypeError(f"discover found {type(device).__name__} instead of Device")
    texts = (device.kind, device.id, device.pci_address or "", device.parent or "", *device.paths)
    if wrong := [one for one in texts if not isinstance(one, str)]:
        raise TypeError(f"device {device.id!r} has {wrong[0]!r} where a string is expected")
    if device.pci_address is not None and not is_address(device.pci_address):
        raise ValueError(
            f"device {device.id!r} has PCI address {device.pci_address!r}, expected one such as 0000:3b:00.0"
        )


def _check_draws(device: Device, draws: Draws, totals: dict[str, Mapping[str, int]]) -> None:
    """Raise TypeError or ValueError if counters cannot be what a device says. totals: what others said; changed."""
    msgspec.convert(msgspec.to_builtins(draws, enc_hook=dict), Draws)
    if not draws.of or not draws.takes or len(draws.has) > MOST_COUNTERS:
        raise ValueError(f"device {device.id!r} draws on no counters, or on more than {MOST_COUNTERS}")
    for name, amount in draws.has.items():
        if not _COUNTER.fullmatch(name):
            raise ValueError(
                f"device {device.id!r} has a counter {name!r}, expected a name such as cores or memory-mib"
            )
        if not 0 <= amount < 1 << 63:
            raise ValueError(f"device {device.id!r} says that there are {amount} {name}")
    for name, amount in draws.takes.items():
        if not 0 <= amount <= draws.has.get(name, -1):
            raise ValueError(f"device {device.id!r} takes {amount} {name} of {draws.has.get(name, 'no')}")
    if totals.setdefault(draws.of, draws.has) != draws.has:
        raise ValueError(
            f"device {device.id!r} says that {draws.of} has {dict(draws.has)}, another device says otherwise"
        )


def _degraded(name: str, reason: str) -> Found:
    return Found(state=KindState(kind=name, state=DEGRADED, reason=reason))


def _once(devices: Iterable[Device]) -> tuple[list[Device], list[str]]:
    kept: dict[str, Device] = {}
    owners: dict[str, Device] = {}
    warnings = []
    for device in devices:
        owner = owners.get(device.id)
        if owner is not None:
            warnings.append(f"cannot serve {device.id} as {device.kind}: it is part of {owner.kind} {owner.id}")
        elif device.id not in kept:
            kept[device.id] = device
            owners.update((path, device) for path in device.paths if path not in SHARED_NODES and path != device.id)
    return list(kept.values()), warnings


def in_order(devices: Iterable[Device]) -> tuple[Device, ...]:
    """Return devices in order of kind, then PCI address, then id."""
    return tuple(sorted(devices, key=_order))


def _order(device: Device) -> tuple[str, tuple[int, ...], str]:
    address = device.pci_address
    return device.kind, order(address) if address is not None else (), device.id


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
