"""Who uses hugepages: what the cgroups of holders have faulted, on which NUMA node, and have reserved.

Source: hugetlb.SIZE.numa_stat (Linux 5.16 and later), .current and .rsvd.current of cgroup v2, whose counts include the
cgroups below. Reservations have no node: see `known`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.topology import HugepagePool, NodeId, NumaNode
from nodeagent.errors import HostError
from nodeagent.host.cgroup.read import size_name
from nodeagent.host.sysfs.sysfs import SysFs

_MOUNT = "sys/fs/cgroup"


class Uses(msgspec.Struct, frozen=True):
    """Hugepages used by a set of cgroups, in pages."""

    used: Mapping[tuple[NodeId, int], int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Faulted, by (node, page_bytes)."""
    reserved: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Reserved by a mapping and not yet faulted, by page_bytes."""


def uses(sysfs: SysFs, paths: Iterable[str], sizes: Iterable[int]) -> Uses | None:
    """Return the hugepages of the given sizes, in bytes, that cgroups (paths below the mount of cgroup v2)
    use. Return None if the kernel does not report their nodes; a cgroup that is gone uses none. Raise
    HostError if a file cannot be read."""
    used: Counter[tuple[NodeId, int]] = Counter()
    reserved: Counter[int] = Counter()
    names = {page_bytes: size_name(page_bytes) for page_bytes in sizes}
    for path in _topmost(paths):
        for page_bytes, name in names.items():
            stem = f"{_MOUNT}/{path}/hugetlb.{name}"
            current = sysfs.number(f"{stem}.current")
            if current is None:
                continue
            by_node = _numa_stat(sysfs, f"{stem}.numa_stat")
            if by_node is None:
                return None
            used.update({(node, page_bytes): amount // page_bytes for node, amount in by_node.items() if amount})
            promised = sysfs.number(f"{stem}.rsvd.current", current) or 0
            reserved[page_bytes] += max(0, promised - current) // page_bytes
    return Uses(MappingProxyType(dict(used)), MappingProxyType(dict(reserved)))


def _topmost(paths: Iterable[str]) -> Iterator[str]:
    """Yield the paths that are not below another one, as the counts of that one include theirs."""
    every = {path.strip("/") for path in paths}
    for path in sorted(every):
        above = path
        while above := above.rpartition("/")[0]:
            if above in every:
                break
        else:
            yield path


def _numa_stat(sysfs: SysFs, path: str) -> Mapping[NodeId, int] | None:
    """Return bytes by node from "total=4194304 N0=4194304 N1=0", or None if there is no such file."""
    text = sysfs.text(path, None)
    if text is None:
        return None
    total, *nodes = text.split() or [""]
    found = [re.fullmatch(r"N([0-9]{1,9})=([0-9]{1,19})", one, re.ASCII) for one in nodes]
    if not total.startswith("total=") or not all(found):
        raise HostError(f"cannot read {sysfs.path(path)}: {text[:80]!r} is not total=BYTES N0=BYTES ...")
    return {int(one[1]): int(one[2]) for one in found if one is not None}


def known(nodes: Sequence[NumaNode], found: Uses) -> tuple[NumaNode, ...]:
    """Return the nodes with our holders' share recorded in their pools. Reserved pages of others are assigned to the
    nodes with the most free pages first, like all reserved pages: on which node they will be faulted is unknown."""
    others = Counter({size: -count for size, count in found.reserved.items()})
    every = [pool for node in nodes for pool in node.hugepages]
    others.update(_sums(every))
    foreign: dict[tuple[NodeId, int], int] = {}
    for pool in sorted(every, key=lambda pool: (-pool.free_pages, pool.node)):
        here = max(0, min(others[pool.page_bytes], pool.reserved_pages))
        others[pool.page_bytes] -= here
        foreign[pool.node, pool.page_bytes] = here
    return tuple(replace(node, hugepages=tuple(_known(node.hugepages, found, foreign))) for node in nodes)


def _sums(pools: Iterable[HugepagePool]) -> Counter[int]:
    sums: Counter[int] = Counter()
    for pool in pools:
        sums[pool.page_bytes] += pool.reserved_pages
    return sums


def _known(
    pools: Iterable[HugepagePool], found: Uses, foreign: Mapping[tuple[NodeId, int], int]
) -> Iterator[HugepagePool]:
    for pool in pools:
        key = pool.node, pool.page_bytes
        mine = pool.reserved_pages - foreign[key]
        yield replace(pool, own_used_pages=found.used.get(key, 0), own_reserved_pages=mine)
