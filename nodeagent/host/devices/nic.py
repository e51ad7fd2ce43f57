"""Network and RDMA adapters: physical and virtual functions, and scalable functions on the auxiliary bus.

A port that represents a virtual function inside the adapter's switch (a representor) is not a device; the attributes of
the physical function name it. An adapter that carries a default route of the node is
marked `default_route`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Attributes, Context, Found, node_edits, pci_device, routed_in, short_id
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_BELOW = re.compile(r"(?:(?P<mid>[^/]+)/)?(?:net|infiniband|infiniband_verbs|infiniband_mad)/(?P<name>[^/]+)")
"""Path between a function and its interface: empty, virtioN or an auxiliary device. A USB adapter has a longer path
and does not belong to the function of its host controller."""
SCALABLE = re.compile(r"[\w-]+\.sf\.\d+")
"""Names of scalable functions on the auxiliary bus."""
_REPRESENTOR = re.compile(r"(?:c\d+)?pf\d+(?:vf|sf)\d+")
_RDMA_COMMON = "/dev/infiniband/rdma_cm"
_IFF_UP = 1
_LINK_TYPES = {1: "ether", 32: "infiniband"}
"""ARPHRD_ETHER and ARPHRD_INFINIBAND (include/uapi/linux/if_arp.h), as iproute2 calls them."""


class _Below(msgspec.Struct):
    """What was found below one function or scalable function."""

    netdevs: list[str] = msgspec.field(default_factory=list)
    """Sysfs folders, below the root."""
    rdma: list[str] = msgspec.field(default_factory=list)
    nodes: list[str] = msgspec.field(default_factory=list)
    """Device nodes."""


class Nic:
    """The kind `nic`."""

    name = "nic"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        below, auxiliary = _all_below(reader), _auxiliary(reader)
        routed, owners = routed_in(reader, context), _Owners(reader, below)
        devices: list[Device] = []
        for function in context.functions:
            if function.is_class("02") or (function.address, "") in below:
                found = below.get((function.address, ""), _Below())
                parts = auxiliary.get(function.address, [])
                devices.append(_nic(reader, context, function, found, parts, routed, owners))
                devices.extend(_scalable(reader, devices[-1], below, parts, routed, owners))
        return Found(
            state=KindState(kind="nic", state=PRESENT), devices=tuple(devices), warnings=tuple(reader.warnings)
        )

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the PCI addresses, and the RDMA or vfio nodes. The network plugin moves the interface itself."""
        return node_edits(device, devices)


def _all_below(reader: Tolerant) -> Mapping[tuple[str, str], _Below]:
    """Return what is below each function, by address and scalable function ("" for the function itself)."""
    found: dict[tuple[str, str], _Below] = defaultdict(_Below)
    for kind in ("net", "infiniband", "infiniband_verbs", "infiniband_mad"):
        for name, path, address, tail in pci.members(reader, f"sys/class/{kind}"):
            match = _BELOW.fullmatch(tail)
            if address is None or match is None:
                continue
            middle = match["mid"] or ""
            _add(found[address, middle if SCALABLE.fullmatch(middle) else ""], kind, name, path)
    return dict(found)


def _add(below: _Below, kind: str, name: str, path: str) -> None:
    if kind == "net":
        below.netdevs.append(path)
    elif kind == "infiniband":
        below.rdma.append(name)
    else:
        below.nodes.append(f"/dev/infiniband/{name}")


def _auxiliary(reader: Tolerant) -> Mapping[str, list[str]]:
    """Return the auxiliary devices by their PCI function (Documentation/driver-api/auxiliary_bus.rst)."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, _, address, _ in pci.members(reader, "sys/bus/auxiliary/devices"):
        if address is not None:
            found[address].append(name)
    return found


def _nic(
    reader: Tolerant,
    context: Context,
    function: Function,
    below: _Below,
    auxiliary: list[str],
    routed: frozenset[str],
    owners: _Owners,
) -> Device:
    attributes = {
        **_attributes(reader, below, routed),
        **({"auxiliary": ",".join(auxiliary)} if auxiliary else {}),
        **({"acpi_index": index} if (index := reader.if_told(f"{function.path}/acpi_index")) else {}),
        **owners.name(function.physical),
    }
    return pci_device(context, function, "nic", paths=_paths(reader, below), attributes=attributes)


def _scalable(
    reader: Tolerant,
    owner: Device,
    below: Mapping[tuple[str, str], _Below],
    auxiliary: list[str],
    routed: frozenset[str],
    owners: _Owners,
) -> Iterator[Device]:
    for name in filter(SCALABLE.fullmatch, auxiliary):
        found = below.get((owner.id, name), _Below())
        yield replace(
            owner,
            id=short_id(f"{owner.id}/{name}"),
            parent=owner.id,
            paths=_paths(reader, found),
            attributes=MappingProxyType(
                {"auxiliary": name, **_attributes(reader, found, routed), **owners.name(owner.id)}
            ),
        )


class _Owners:
    """Names of physical functions' interfaces, each looked for once."""

    def __init__(self, reader: Tolerant, below: Mapping[tuple[str, str], _Below]) -> None:
        self._reader = reader
        self._below = below
        self._known: dict[str, Attributes] = {}

    def name(self, address: str | None) -> Attributes:
        """Return what a part of a function says of the function's interface, by its name on the host."""
        if address is None:
            return {}
        if address not in self._known:
            below = self._below.get((address, ""))
            own = [path for path in below.netdevs if not is_representor(self._reader, path)] if below else []
            self._known[address] = {"pf_name": _name(own[0])} if own else {}
        return self._known[address]


def is_representor(reader: Tolerant, path: str) -> bool:
    """Return whether an interface represents a function in the adapter's switch. path: its folder below /sys/class/net,
    or where that leads."""
    return _REPRESENTOR.fullmatch(reader.if_told(f"{path}/phys_port_name") or "") is not None


def _paths(reader: Tolerant, below: _Below) -> tuple[str, ...]:
    common = (_RDMA_COMMON,) if below.nodes and reader.sysfs.exists(_RDMA_COMMON[1:]) else ()
    return (*below.nodes, *common)


def _attributes(reader: Tolerant, below: _Below, routed: frozenset[str]) -> Attributes:
    ports = {path: reader.if_told(f"{path}/phys_port_name") or "" for path in below.netdevs}
    own = [path for path, port in ports.items() if not _REPRESENTOR.fullmatch(port)]
    found: dict[str, str | int | bool | None] = {
        "netdevs": _names(own),
        "rdma": ",".join(below.rdma) or None,
        "representors": ",".join(f"{_name(path)}={port}" for path, port in ports.items() if path not in own) or None,
        "default_route": True if any(_name(path) in routed for path in ports) else None,
        **(_port(reader, own[0]) if own else {}),
    }
    return {key: value for key, value in found.items() if value is not None}


def _port(reader: Tolerant, path: str) -> dict[str, str | int | bool | None]:
    """Return the attributes of one interface. While it is down, carrier and speed cannot be read."""
    flags = reader.number(f"{path}/flags")
    up = flags is None or bool(flags & _IFF_UP)
    carrier = reader.number_if_told(f"{path}/carrier") if up else 0
    speed = reader.number_if_told(f"{path}/speed") if up else None
    return {
        "operstate": reader.text(f"{path}/operstate"),
        "carrier": None if carrier is None else carrier == 1,
        "speed_mbps": speed if speed is not None and speed > 0 else None,
        "mtu": reader.number(f"{path}/mtu"),
        "mac": reader.text(f"{path}/address"),
        "link_type": _LINK_TYPES.get(reader.number(f"{path}/type") or 0),
        "phys_port_name": reader.if_told(f"{path}/phys_port_name"),
        "phys_switch_id": reader.if_told(f"{path}/phys_switch_id"),
    }


def _names(paths: list[str]) -> str | None:
    return ",".join(_name(path) for path in paths) or None


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
