"""PCI functions as the kernel shows them (Documentation/ABI/testing/sysfs-bus-pci). Nothing is written, bound or reset.

Promises: every function below the root appears once, in order of address, however many of its files are readable. The
position of a function comes from the real path of its folder, so captured trees answer like the original machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.device import PciFacts
from nodeagent.core.model.topology import NodeId
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

NVIDIA, AMD, INTEL = "10de", "1002", "8086"
_ADDRESS = r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]"
_IS_ADDRESS = re.compile(_ADDRESS)
_IS_ROOT = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_BUS = "sys/bus/pci/devices"


class Function(PciFacts, frozen=True, kw_only=True):
    """One PCI function, with what its folder shows; None for what it does not show."""

    address: str
    path: str
    """Its folder below the root, with links resolved."""
    physical: str | None = None
    """Address of the physical function; only for a virtual function."""
    vfs: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Index of each existing virtual function, by address."""
    max_vfs: int = 0
    vfio_nodes: tuple[str, ...] = ()
    """What a virtual machine opens of a function that is bound to vfio-pci or a variant driver of it; else empty."""

    @property
    def has_vfio(self) -> bool:
        """Return whether the function is bound to vfio-pci or a variant driver, such as mlx5_vfio_pci."""
        return (self.driver or "").replace("_", "-").endswith("vfio-pci")

    def is_class(self, *prefixes: str) -> bool:
        """Return whether the class begins with one of these hexadecimal prefixes ("03", "0108")."""
        return self.pci_class is not None and self.pci_class.startswith(prefixes)


def functions(reader: Tolerant, online: CpuSet = EMPTY, nodes: frozenset[NodeId] = frozenset()) -> tuple[Function, ...]:
    """Return all PCI functions in order of address. If `online` or `nodes` is empty, it is unknown and not checked."""
    found = [_function(reader, address, path, online, nodes) for address, path in _folders(reader)]
    return tuple(sorted(found, key=lambda function: order(function.address)))


def driver_binding(sysfs: SysFs, id: str) -> str:
    """Return what identifies the binding of a function's driver: another one has another inode. "" if there is none.

    id: of a device; a part of a function, such as a MIG instance, has the function's address before a slash."""
    try:
        return str(os.lstat(sysfs.path(f"{_BUS}/{id.partition('/')[0]}/driver")).st_ino)
    except OSError:
        return ""


def order(address: str) -> tuple[int, ...]:
    """Return a sort key that orders addresses by domain, bus, device and function (domains vary in length)."""
    return tuple(int(part, 16) for part in re.split(r"[:.]", address))


def is_address(text: str) -> bool:
    """Return whether a text is a PCI address, such as 0000:3b:00.0."""
    return _IS_ADDRESS.fullmatch(text) is not None


def split(path: str) -> tuple[str | None, str]:
    """Return the last PCI address in a real path, or None, and what follows it: ".../0000:00:03.0/virtio0/net/eth0"
    belongs to 0000:00:03.0 as "virtio0/net/eth0"."""
    parts = path.split("/")
    for at in range(len(parts) - 1, -1, -1):
        if is_address(parts[at]):
            return parts[at], "/".join(parts[at + 1 :])
    return None, path


def members(reader: Tolerant, folder: str) -> Iterator[tuple[str, str, str | None, str]]:
    """Yield the entries of a class or bus folder ("sys/class/net") as (name, real path, PCI address, path below it)."""
    for name in reader.names(folder):
        real = reader.sysfs.entry(folder, name)
        yield name, real, *split(real)


def _folders(reader: Tolerant) -> Iterator[tuple[str, str]]:
    names = [name for name in reader.names(_BUS) if is_address(name)]
    if not names:
        yield from _below_roots(reader)
    for name in names:
        yield name, reader.sysfs.entry(_BUS, name)


def _below_roots(reader: Tolerant) -> Iterator[tuple[str, str]]:
    """Yield the functions below the PCI root bridges, for captured trees without the bus folder."""
    for name in reader.names("sys/devices"):
        if _IS_ROOT.fullmatch(name):
            yield from _below(reader, f"sys/devices/{name}")


def _below(reader: Tolerant, path: str) -> Iterator[tuple[str, str]]:
    for name in reader.names(path):
        if is_address(name):
            yield name, f"{path}/{name}"
            yield from _below(reader, f"{path}/{name}")


def _function(reader: Tolerant, address: str, path: str, online: CpuSet, nodes: frozenset[NodeId]) -> Function:
    above = path.split("/")[:-1]
    local = _local_cpus(reader, path)
    max_vfs = reader.number(f"{path}/sriov_totalvfs") or 0
    function = Function(
        address=address,
        path=path,
        pci_class=reader.hexadecimal(f"{path}/class", 6),
        vendor=reader.hexadecimal(f"{path}/vendor", 4),
        device=reader.hexadecimal(f"{path}/device", 4),
        driver=reader.link_name(f"{path}/driver"),
        numa_node=_numa_node(reader, f"{path}/numa_node", nodes),
        local_cpus=local & online if online else local,
        pcie_root=next((part for part in above if _IS_ROOT.fullmatch(part)), None),
        bridges=tuple(part for part in above if is_address(part)),
        iommu_group=_group(reader.link_name(f"{path}/iommu_group")),
        physical=reader.link_name(f"{path}/physfn"),
        vfs=_virtual(reader.sysfs, path) if max_vfs else MappingProxyType({}),
        max_vfs=max_vfs,
    )
    return replace(function, vfio_nodes=_vfio_nodes(reader, function)) if function.has_vfio else function


def _vfio_nodes(reader: Tolerant, function: Function) -> tuple[str, ...]:
    """The device nodes that are there, of the group (Documentation/driver-api/vfio.rst; without an IOMMU under another
    name) and of the device itself (iommufd, from 6.6 on); of a captured tree without nodes, those of the group."""
    group, found = function.iommu_group, list[str]()
    if group is not None:
        unsafe = reader.text(f"sys/kernel/iommu_groups/{group}/name") == "vfio-noiommu"
        node = f"/dev/vfio/noiommu-{group}" if unsafe else f"/dev/vfio/{group}"
        if unsafe or reader.sysfs.exists(node[1:]) or not reader.sysfs.exists("dev/vfio"):
            found += ["/dev/vfio/vfio", node]
    own = [f"/dev/vfio/devices/{name}" for name in reader.names(f"{function.path}/vfio-dev")]
    if there := [node for node in own if reader.sysfs.exists(node[1:])]:
        found += ["/dev/iommu", *there]
    return tuple(found)


def _local_cpus(reader: Tolerant, path: str) -> CpuSet:
    """Return the local CPUs of a function. Every kernel has local_cpus; local_cpulist is the same set, but newer."""
    found = reader.cpu_mask(f"{path}/local_cpus")
    if found is None:
        found = reader.cpus(f"{path}/local_cpulist")
    return found or EMPTY


def _numa_node(reader: Tolerant, path: str, nodes: frozenset[NodeId]) -> NodeId | None:
    node = reader.number(path)
    if node is None or node == -1:
        return None
    if node < 0 or (nodes and node not in nodes):
        reader.warn(path, f"there is no NUMA node {node}")
        return None
    return node


def _group(name: str | None) -> int | None:
    return int(name) if name is not None and name.isascii() and name.isdigit() else None


def _virtual(sysfs: SysFs, path: str) -> Mapping[str, int]:
    links = ((index, sysfs.link_name(link)) for index, link in sysfs.numbered(path, "virtfn"))
    return MappingProxyType({address: index for index, address in links if address is not None})
