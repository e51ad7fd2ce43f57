"""Hugepage pools: how many pages of each size each NUMA node has, and how many are unused.

Pools are read from /sys/devices/system/node/nodeN/hugepages, or from /sys/kernel/mm/hugepages on a machine
without node folders. Reserved pages exist only for the machine as a whole
(Documentation/admin-guide/mm/hugetlbpage.rst). They are assigned to the nodes with the most free pages, at most as
many as a node has free. So the sums over all nodes match the kernel's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from nodeagent.core.model.topology import HugepagePool, NodeId
from nodeagent.host.sysfs.lists import ListReader
from nodeagent.host.sysfs.sysfs import SysFs

_GLOBAL = "sys/kernel/mm/hugepages"
_PREFIX, _SUFFIX = "hugepages-", "kB"


def read(sysfs: SysFs, nodes: Sequence[NodeId], warnings: list[str]) -> Mapping[NodeId, tuple[HugepagePool, ...]]:
    """Return the pools of each node, by page size. A pool that cannot be read is left out and named in `warnings`.

    `nodes` are the nodes of the machine, in order of id; not empty.
    """
    reader = ListReader(sysfs, warnings)
    pools = [pool for node in nodes for pool in _pools(reader, node, f"sys/devices/system/node/node{node}/hugepages")]
    if not pools:
        pools = _global(reader, nodes)
    by_node: dict[NodeId, list[HugepagePool]] = {node: [] for node in nodes}
    for page_bytes in sorted({pool.page_bytes for pool in pools}):
        for pool in _with_promises(reader, [pool for pool in pools if pool.page_bytes == page_bytes]):
            by_node[pool.node].append(pool)
    return {node: tuple(found) for node, found in by_node.items()}


def _pools(reader: ListReader, node: NodeId, folder: str) -> list[HugepagePool]:
    pools = (_pool(reader, node, folder, name) for name in reader.names(folder) if name.startswith(_PREFIX))
    return [pool for pool in pools if pool is not None]


def _global(reader: ListReader, nodes: Sequence[NodeId]) -> list[HugepagePool]:
    """Return the pools of a machine without per-node pools. With several nodes, the pages
    cannot be attributed to one."""
    pools = _pools(reader, nodes[0], _GLOBAL)
    if len(nodes) == 1:
        return pools
    total = sum(pool.total_pages for pool in pools)
    if total:
        reader.refuse(_GLOBAL, f"{total} pages", f"cannot be laid on one of {len(nodes)} nodes")
    return []


def _pool(reader: ListReader, node: NodeId, folder: str, name: str) -> HugepagePool | None:
    kib = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    if not (kib.isascii() and kib.isdigit() and name.endswith(_SUFFIX) and 0 < len(kib) < 12):
        reader.refuse(folder, name, "names no page size")
        return None
    counts = [reader.need(f"{folder}/{name}/{what}_hugepages", _count) for what in ("nr", "free", "surplus")]
    total, free, surplus = counts
    if total is None or free is None:
        return None
    if free > total:
        reader.refuse(f"{folder}/{name}/free_hugepages", str(free), f"is more than the {total} pages there are")
        free = total
    return HugepagePool(
        node=node, page_bytes=int(kib) << 10, total_pages=total, free_pages=free, surplus_pages=surplus or 0
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("expected a count of pages")
    return int(text)


def _with_promises(reader: ListReader, pools: list[HugepagePool]) -> Iterable[HugepagePool]:
    """Return the pools of one page size, with the machine-wide reserved pages assigned to them."""
    folder = f"{_GLOBAL}/{_PREFIX}{pools[0].page_bytes >> 10}{_SUFFIX}"
    reserved = _promised(reader, f"{folder}/resv_hugepages")
    for pool in sorted(pools, key=lambda pool: (-pool.free_pages, pool.node)):
        here = min(reserved, pool.free_pages)
        yield msgspec.structs.replace(pool, reserved_pages=here)
        reserved -= here


def _promised(reader: ListReader, path: str) -> int:
    """Return a count, or 0 if the kernel is too old to report it."""
    return reader.given(path, _count) or 0
