"""Conversion of the inventory to and from its documented JSON form (docs/inventory.md).

Reading is strict about everything that placement needs and ignores unknown keys, so that a file from a newer build, or
one edited by hand, can still be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.model.cpuset import MAX_ID, CpuSet
from nodeagent.core.model.device import Device, Draws, DriverFile, DriverFiles, DriverUse, Hook, Link, Partition
from nodeagent.core.model.inventory import Inventory, KindState, PodsCgroup
from nodeagent.core.model.topology import NO_NODE, CacheGroup, Cpu, HugepagePool, NumaNode
from nodeagent.errors import InputError

LARGEST = 1 << 62
MOST_DISTANCE = 255
"""The kernel stores a distance in one byte (ACPI 6.5, 5.2.17)."""
MOST_THREADS = 64
MOST_WEIGHT = 1_000_000


class _Cpu(msgspec.Struct):
    id: int
    package: int
    core: int
    numa_node: int | None
    """None, or NO_NODE in files of earlier versions, for a CPU without a node."""
    die: int = 0
    cluster: int | None = None
    l2: int | None = None
    l3: int | None = None
    kind: str = ""
    isolated: bool = False


class _Pool(msgspec.Struct):
    page_bytes: int
    total_pages: int
    free_pages: int
    reserved_pages: int = 0
    surplus_pages: int = 0
    own_used_pages: int | None = None
    own_reserved_pages: int | None = None
    foreign_pages: int | None = None
    """Derived from the other fields; ignored when read."""


class _Node(msgspec.Struct):
    id: int
    cpus: str = ""
    memory_bytes: int = 0
    kind: str = "dram"
    distances: dict[int, int] = {}
    hugepages: list[_Pool] = []


class _Cache(msgspec.Struct):
    level: int
    index: int
    cpus: str
    size_bytes: int | None = None


class _Device(msgspec.Struct):
    kind: str
    id: str
    pci_address: str | None = None
    pci_class: str | None = None
    vendor: str | None = None
    device: str | None = None
    driver: str | None = None
    numa_node: int | None = None
    local_cpus: str = ""
    pcie_root: str | None = None
    bridges: list[str] = []
    iommu_group: int | None = None
    paths: list[str] = []
    parent: str | None = None
    exclusive: list[str] | None = None
    attributes: dict[str, str | int | bool] = {}
    partition: Partition | None = None
    draws: Draws | None = None


class _Link(msgspec.Struct):
    a: str
    b: str
    type: str
    weight: int


class _Kind(msgspec.Struct):
    kind: str
    state: str
    reason: str = ""


class _Hook(msgspec.Struct):
    path: str
    args: list[str] = []


class _DriverFile(msgspec.Struct):
    host_path: str
    container_paths: list[str]
    use: DriverUse = DriverUse.COMPUTE


class _Driver(msgspec.Struct):
    version: str
    root: str = ""
    searched: list[str] = []
    files: list[_DriverFile] = []
    hook: _Hook | None = None


class _PodsCgroup(msgspec.Struct):
    path: str
    cpus: str


class _Document(msgspec.Struct):
    cpus: list[_Cpu]
    numa_nodes: list[_Node]
    generation: int = 0
    cpus_possible: str = ""
    cpus_offline: str = ""
    cpus_nohz_full: str = ""
    pods_cgroup: _PodsCgroup | None = None
    caches: list[_Cache] = []
    devices: list[_Device] = []
    links: list[_Link] = []
    kinds: list[_Kind] = []
    warnings: list[str] = []
    nvidia_driver: _Driver | None = None


def to_document(inventory: Inventory) -> dict[str, Any]:
    """Return the inventory as plain types, with the keys in the documented order."""
    return {
        "generation": inventory.generation,
        "cpus": [_cpu_out(cpu) for cpu in inventory.cpus],
        "cpus_possible": str(inventory.cpus_possible),
        "cpus_online": str(inventory.cpus_online),
        "cpus_offline": str(inventory.cpus_offline),
        "cpus_isolated": str(inventory.cpus_isolated),
        "cpus_nohz_full": str(inventory.cpus_nohz_full),
        "pods_cgroup": _pods_out(inventory.pods_cgroup),
        "numa_nodes": [_node_out(node) for node in inventory.numa_nodes],
        "caches": [
            {"level": c.level, "index": c.index, "cpus": str(c.cpus), "size_bytes": c.size_bytes}
            for c in inventory.caches
        ],
        "devices": [device_document(device) for device in inventory.devices],
        "links": [{"a": one.a, "b": one.b, "type": one.type, "weight": one.weight} for one in inventory.links],
        "kinds": [{"kind": one.kind, "state": one.state, "reason": one.reason} for one in inventory.kinds],
        "warnings": list(inventory.warnings),
        **({} if inventory.nvidia_driver is None else {"nvidia_driver": _driver_out(inventory.nvidia_driver)}),
    }


def device_document(device: Device) -> dict[str, Any]:
    """Return one device as plain types."""
    return {
        "kind": device.kind,
        "id": device.id,
        "pci_address": device.pci_address,
        "pci_class": device.pci_class,
        "vendor": device.vendor,
        "device": device.device,
        "driver": device.driver,
        "numa_node": device.numa_node,
        "local_cpus": str(device.local_cpus),
        "pcie_root": device.pcie_root,
        "bridges": list(device.bridges),
        "iommu_group": device.iommu_group,
        "paths": list(device.paths),
        "parent": device.parent,
        **({} if device.exclusive is None else {"exclusive": list(device.exclusive)}),
        "attributes": dict(device.attributes),
        **({} if device.partition is None else {"partition": _plain(device.partition)}),
        **({} if device.draws is None else {"draws": _plain(device.draws)}),
    }


def _plain(part: Partition | Draws) -> dict[str, Any]:
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in msgspec.structs.asdict(part).items()
    }


def from_document(data: bytes | str, *, source: str) -> Inventory:
    """Read an inventory. Raise InputError naming `source` and the place of the error."""
    try:
        found = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cannot read inventory {source}: {error}") from None
    _check(found, source)
    return _inventory(found, source)


def _inventory(found: _Document, source: str) -> Inventory:
    return Inventory(
        generation=found.generation,
        cpus=tuple(sorted((_cpu_in(cpu) for cpu in found.cpus), key=lambda cpu: cpu.id)),
        cpus_online=CpuSet(cpu.id for cpu in found.cpus),
        cpus_possible=_list(found.cpus_possible, source, "cpus_possible"),
        cpus_offline=_list(found.cpus_offline, source, "cpus_offline"),
        cpus_isolated=CpuSet(cpu.id for cpu in found.cpus if cpu.isolated),
        cpus_nohz_full=_list(found.cpus_nohz_full, source, "cpus_nohz_full"),
        pods_cgroup=_pods_in(found.pods_cgroup, source),
        numa_nodes=tuple(sorted((_node_in(node, found, source) for node in found.numa_nodes), key=lambda n: n.id)),
        caches=tuple(
            CacheGroup(level=c.level, index=c.index, cpus=_list(c.cpus, source, "caches"), size_bytes=c.size_bytes)
            for c in found.caches
        ),
        devices=tuple(sorted((_device_in(one, source) for one in found.devices), key=lambda d: (d.kind, d.id))),
        links=tuple(Link(a=one.a, b=one.b, type=one.type, weight=one.weight) for one in found.links),
        kinds=tuple(KindState(kind=one.kind, state=one.state, reason=one.reason) for one in found.kinds),
        warnings=tuple(found.warnings),
        nvidia_driver=_driver_in(found.nvidia_driver) if found.nvidia_driver is not None else None,
    )


def _driver_out(driver: DriverFiles) -> dict[str, Any]:
    files = [
        {"host_path": one.host_path, "container_paths": list(one.container_paths), "use": str(one.use)}
        for one in driver.files
    ]
    hook = driver.hook
    return {
        "version": driver.version,
        "root": driver.root,
        "searched": list(driver.searched),
        "files": files,
        "hook": None if hook is None else {"path": hook.path, "args": list(hook.args)},
    }


def _driver_in(driver: _Driver) -> DriverFiles:
    hook = driver.hook
    return DriverFiles(
        version=driver.version,
        root=driver.root,
        searched=tuple(driver.searched),
        files=tuple(
            DriverFile(host_path=one.host_path, container_paths=tuple(one.container_paths), use=one.use)
            for one in driver.files
        ),
        hook=None if hook is None else Hook(path=hook.path, args=tuple(hook.args)),
    )


def _pods_out(pods: PodsCgroup | None) -> dict[str, str] | None:
    return {"path": pods.path, "cpus": str(pods.cpus)} if pods is not None else None


def _pods_in(pods: _PodsCgroup | None, source: str) -> PodsCgroup | None:
    return PodsCgroup(path=pods.path, cpus=_list(pods.cpus, source, "pods_cgroup.cpus")) if pods is not None else None


def _check(found: _Document, source: str) -> None:
    """Check what the types alone do not express: afterwards every value that placement uses is in range."""
    try:
        _check_ids(found)
        _check_cpus(found)
        _check_nodes(found)
        _check_devices(found)
    except ValueError as error:
        raise InputError(f"cannot read inventory {source}: {error}") from None


def _check_ids(found: _Document) -> None:
    """Raise ValueError unless every id is unique."""
    names: tuple[tuple[str, list[int] | list[str]], ...] = (
        ("cpus", [cpu.id for cpu in found.cpus]),
        ("numa_nodes", [node.id for node in found.numa_nodes]),
        ("devices", [device.id for device in found.devices]),
    )
    for what, ids in names:
        if len(set(ids)) < len(ids):
            twice = next(one for one, times in Counter(ids).items() if times > 1)
            raise ValueError(f"id {twice} stands twice in {what}")


def _check_cpus(found: _Document) -> None:
    """Check that each CPU's NUMA node exists, indices are in range, and each core has one package, node and L3
    group."""
    nodes, cores = {None, *(node.id for node in found.numa_nodes)}, dict[int, tuple[object, ...]]()
    threads = Counter(cpu.core for cpu in found.cpus)
    for cpu in found.cpus:
        _within("id", cpu.id, f"cpus, id {cpu.id}")
        for name in ("package", "die", "cluster", "core", "l2", "l3"):
            if (value := getattr(cpu, name)) is not None:
                _within(name, value, f"cpus, id {cpu.id}")
        node = cpu.numa_node if cpu.numa_node != NO_NODE else None
        if node not in nodes:
            raise ValueError(f"cpus, id {cpu.id}: numa_node {cpu.numa_node} is not in numa_nodes")
        place = cpu.package, node, cpu.l3
        if cores.setdefault(cpu.core, place) != place:
            raise ValueError(f"cpus, id {cpu.id}: core {cpu.core} lies on several packages, NUMA nodes or L3 groups")
        if threads[cpu.core] > MOST_THREADS:
            raise ValueError(f"cpus, id {cpu.id}: core {cpu.core} has more than {MOST_THREADS} CPUs")


def _check_nodes(found: _Document) -> None:
    for node in found.numa_nodes:
        where = f"numa_nodes, id {node.id}"
        _within("id", node.id, where)
        _within("memory_bytes", node.memory_bytes, where, LARGEST)
        for other, distance in node.distances.items():
            _within("distance", distance, f"{where}, distances, {other}", MOST_DISTANCE)
        sizes = [pool.page_bytes for pool in node.hugepages]
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"{where}: a page size stands twice in hugepages")
        for pool in node.hugepages:
            for name in ("page_bytes", "total_pages", "free_pages", "reserved_pages", "surplus_pages"):
                _within(name, getattr(pool, name), f"{where}, hugepages", LARGEST)
            for name in ("own_used_pages", "own_reserved_pages", "foreign_pages"):
                _within(name, getattr(pool, name) or 0, f"{where}, hugepages", LARGEST)
            if pool.page_bytes == 0:
                raise ValueError(f"{where}, hugepages: page_bytes is 0")
            if pool.free_pages > pool.total_pages:
                raise ValueError(f"{where}, hugepages: {pool.free_pages} of {pool.total_pages} pages are free")


def _check_devices(found: _Document) -> None:
    nodes = {node.id for node in found.numa_nodes}
    for device in found.devices:
        if not device.id or not device.kind:
            raise ValueError("devices: an id or a kind is empty")
        if device.numa_node is not None and device.numa_node not in nodes:
            raise ValueError(f"devices, id {device.id}: numa_node {device.numa_node} is not in numa_nodes")
    for link in found.links:
        _within("weight", link.weight, f"links, {link.a} to {link.b}", MOST_WEIGHT)


def _within(name: str, value: int, where: str, most: int = MAX_ID) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{where}: {name} {value} is not in 0 to {most}")


def _list(text: str, source: str, key: str) -> CpuSet:
    return CpuSet.parse(text, source=f"{source}, {key}")


def _cpu_out(cpu: Cpu) -> dict[str, Any]:
    return {
        "id": cpu.id,
        "package": cpu.package,
        "die": cpu.die,
        "cluster": cpu.cluster,
        "core": cpu.core,
        "numa_node": cpu.numa_node if cpu.numa_node != NO_NODE else None,
        "l2": cpu.l2,
        "l3": cpu.l3,
        "kind": cpu.kind,
        "isolated": cpu.isolated,
    }


def _cpu_in(cpu: _Cpu) -> Cpu:
    return Cpu(
        id=cpu.id,
        package=cpu.package,
        die=cpu.die,
        cluster=cpu.cluster,
        core=cpu.core,
        numa_node=NO_NODE if cpu.numa_node is None else cpu.numa_node,
        l2=cpu.l2,
        l3=cpu.l3,
        kind=cpu.kind,
        isolated=cpu.isolated,
    )


def _node_out(node: NumaNode) -> dict[str, Any]:
    return {
        "id": node.id,
        "cpus": str(node.cpus),
        "memory_bytes": node.memory_bytes,
        "kind": node.kind,
        "distances": {str(other): value for other, value in node.distances.items()},
        "hugepages": [
            {
                "page_bytes": pool.page_bytes,
                "total_pages": pool.total_pages,
                "free_pages": pool.free_pages,
                "reserved_pages": pool.reserved_pages,
                "surplus_pages": pool.surplus_pages,
                **_uses_out(pool),
            }
            for pool in node.hugepages
        ],
    }


def _uses_out(pool: HugepagePool) -> dict[str, int | None]:
    """Return the page counts by owner, or nothing if they are unknown."""
    if pool.own_used_pages is None:
        return {}
    return {
        "own_used_pages": pool.own_used_pages,
        "own_reserved_pages": pool.own_reserved_pages,
        "foreign_pages": pool.foreign_pages,
    }


def _node_in(node: _Node, found: _Document, source: str) -> NumaNode:
    """Return a node whose CPUs are those that refer to it; the node's own CPU list is only checked for syntax."""
    pools = tuple(
        HugepagePool(
            node=node.id,
            page_bytes=pool.page_bytes,
            total_pages=pool.total_pages,
            free_pages=pool.free_pages,
            reserved_pages=pool.reserved_pages,
            surplus_pages=pool.surplus_pages,
            own_used_pages=pool.own_used_pages,
            own_reserved_pages=pool.own_reserved_pages,
        )
        for pool in node.hugepages
    )
    mine = CpuSet(cpu.id for cpu in found.cpus if cpu.numa_node == node.id)
    distances: Mapping[int, int] = MappingProxyType(dict(node.distances))
    _list(node.cpus, source, f"numa_nodes, id {node.id}")
    return NumaNode(
        id=node.id, cpus=mine, memory_bytes=node.memory_bytes, kind=node.kind, distances=distances, hugepages=pools
    )


def _device_in(device: _Device, source: str) -> Device:
    return Device(
        kind=device.kind,
        id=device.id,
        pci_address=device.pci_address,
        pci_class=device.pci_class,
        vendor=device.vendor,
        device=device.device,
        driver=device.driver,
        numa_node=device.numa_node,
        local_cpus=_list(device.local_cpus, source, f"devices, id {device.id}"),
        pcie_root=device.pcie_root,
        bridges=tuple(device.bridges),
        iommu_group=device.iommu_group,
        paths=tuple(device.paths),
        parent=device.parent,
        exclusive=None if device.exclusive is None else tuple(device.exclusive),
        attributes=MappingProxyType(dict(device.attributes)),
        partition=device.partition,
        draws=device.draws,
    )
