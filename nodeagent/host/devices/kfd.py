"""AMD's compute topology (/sys/class/kfd/kfd/topology/nodes, drivers/gpu/drm/amd/amdkfd/kfd_topology.c)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nodeagent.host.sysfs.lenient import Tolerant

_NODES = "sys/class/kfd/kfd/topology/nodes"
_XGMI = 11
"""io_link type of AMD's links between GPUs (HSA_IOLINKTYPE_XGMI)."""
_NO_DEVICE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KfdNode:
    """One GPU as KFD sees it."""

    number: int
    pci_address: str
    memory_bytes: int = 0
    unique_id: int = 0
    xgmi: tuple[int, ...] = ()
    """Numbers of the nodes that XGMI links lead to."""


def kfd_nodes(reader: Tolerant) -> Mapping[str, KfdNode]:
    """Return the GPUs among the nodes, by PCI address; for a GPU partitioned into several nodes, the first."""
    found: dict[str, KfdNode] = {}
    for number, path in _numbers(reader):
        node = _node(reader, number, path)
        if node is not None:
            found.setdefault(node.pci_address, node)
    return found


def _numbers(reader: Tolerant) -> list[tuple[int, str]]:
    return reader.read(lambda one: list(reader.sysfs.numbered(one, "")), _NODES) or []


def _node(reader: Tolerant, number: int, path: str) -> KfdNode | None:
    if not reader.number(f"{path}/gpu_id"):
        return None  # a CPU
    says = properties(reader, f"{path}/properties")
    location = says.get("location_id", _NO_DEVICE)
    if location == _NO_DEVICE:
        reader.warn(f"{path}/properties", "there is no location_id")
        return None
    return KfdNode(
        number=number,
        pci_address=_address(says.get("domain", 0), location),
        memory_bytes=sum(_sizes(reader, f"{path}/mem_banks")),
        unique_id=says.get("unique_id", 0),
        xgmi=tuple(_xgmi(reader, f"{path}/io_links")),
    )


def properties(reader: Tolerant, path: str) -> dict[str, int]:
    """Return the values in lines of "name number"."""
    found = {}
    for line in (reader.text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if value.isascii() and value.isdigit():
            found[name] = int(value)
        else:
            reader.warn(path, f"{line[:80]!r} is not a name and a number")
    return found


def _address(domain: int, location: int) -> str:
    """Return the PCI address. location_id is bus << 8 | device << 3 | function; higher bits are the partition."""
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def _sizes(reader: Tolerant, path: str) -> Iterator[int]:
    for bank in reader.names(path):
        yield properties(reader, f"{path}/{bank}/properties").get("size_in_bytes", 0)


def _xgmi(reader: Tolerant, path: str) -> Iterator[int]:
    for link in reader.names(path):
        says = properties(reader, f"{path}/{link}/properties")
        if says.get("type") == _XGMI and "node_to" in says:
            yield says["node_to"]
