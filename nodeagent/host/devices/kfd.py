"""AMD's compute topology (/sys/class/kfd/kfd/topology/nodes, drivers/gpu/drm/amd/amdkfd/kfd_topology.c)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import replace

from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant

_NODES = "sys/class/kfd/kfd/topology/nodes"
MOST_DIGITS = 20
"""Of a number that fits into 64 bits."""
_XGMI = 11
"""io_link type of AMD's links between GPUs (HSA_IOLINKTYPE_XGMI)."""
_NO_DEVICE = 0
_PARTITION_SHIFT = 28
"""Some kernels write the number of a partition into bits 28 to 31 of location_id, others into the function's bits
(kfd_topology_add_device)."""


class KfdNode(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as KFD sees it, or one partition of a GPU."""

    number: int
    pci_address: str
    """Of the function that exists; all partitions of a GPU have the same."""
    partition: int = 0
    render: str = ""
    """Name of the render node, such as renderD128."""
    memory_bytes: int = 0
    unique_id: int = 0
    xgmi: tuple[int, ...] = ()
    """Numbers of the nodes that XGMI links lead to."""


def kfd_nodes(reader: Tolerant, functions: Mapping[str, Function]) -> Mapping[str, tuple[KfdNode, ...]]:
    """Return the GPUs among the nodes by PCI address, each with its partitions, or with one node if it has none.

    functions: all PCI functions by address.
    """
    found: dict[str, list[KfdNode]] = defaultdict(list)
    for number, path in _numbers(reader):
        node = _node(reader, number, path, functions)
        if node is not None:
            found[node.pci_address].append(node)
    return {address: _numbered(nodes) for address, nodes in found.items()}


def _numbered(nodes: list[KfdNode]) -> tuple[KfdNode, ...]:
    """Return the nodes of a GPU with distinct partition numbers: the kernel's, or by position if these are equal."""
    if len({node.partition for node in nodes}) == len(nodes):
        return tuple(sorted(nodes, key=lambda node: node.partition))
    return tuple(replace(node, partition=partition) for partition, node in enumerate(nodes))


def _numbers(reader: Tolerant) -> list[tuple[int, str]]:
    return reader.read(lambda one: list(reader.sysfs.numbered(one, "")), _NODES) or []


def _node(reader: Tolerant, number: int, path: str, functions: Mapping[str, Function]) -> KfdNode | None:
    if not reader.number(f"{path}/gpu_id"):
        return None  # a CPU
    says = properties(reader, f"{path}/properties")
    location = says.get("location_id", _NO_DEVICE)
    if location == _NO_DEVICE:
        reader.warn(f"{path}/properties", "there is no location_id")
        return None
    address, partition = _place(says.get("domain", 0), location, functions)
    minor = says.get("drm_render_minor", 0)
    return KfdNode(
        number=number,
        pci_address=address,
        partition=partition,
        render=f"renderD{minor}" if minor > 0 else "",
        memory_bytes=sum(_sizes(reader, f"{path}/mem_banks")),
        unique_id=says.get("unique_id", 0),
        xgmi=tuple(_xgmi(reader, f"{path}/io_links")),
    )


def properties(reader: Tolerant, path: str) -> dict[str, int]:
    """Return the values in lines of "name number"."""
    found = {}
    for line in (reader.text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS:
            found[name] = int(value)
        else:
            reader.warn(path, f"{line[:80]!r} is not a name and a number")
    return found


def _place(domain: int, location: int, functions: Mapping[str, Function]) -> tuple[str, int]:
    """Return the PCI address and the number of the partition. location_id is bus << 8 | device << 3 | function.

    A function that does not exist, or is no GPU (its audio controller), is a partition of function 0.
    """
    slot = f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}"
    own, first = functions.get(f"{slot}.{location & 7}"), functions.get(f"{slot}.0")
    if first is not None and (own is None or not own.is_class("03", "12")):
        return first.address, location & 7
    return f"{slot}.{location & 7}", location >> _PARTITION_SHIFT & 0xF


def _sizes(reader: Tolerant, path: str) -> Iterator[int]:
    for bank in reader.names(path):
        yield properties(reader, f"{path}/{bank}/properties").get("size_in_bytes", 0)


def _xgmi(reader: Tolerant, path: str) -> Iterator[int]:
    for link in reader.names(path):
        says = properties(reader, f"{path}/{link}/properties")
        if says.get("type") == _XGMI and "node_to" in says:
            yield says["node_to"]
