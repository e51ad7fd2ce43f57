"""Whose hugepages are in use: what the cgroups of holders have faulted, on which NUMA node, and have reserved.

Source: hugetlb.SIZE.numa_stat (Linux 5.16 and later), .current and .rsvd.current of cgroup v2, whose counts include the
cgroups below. Reservations have no node: see `known`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from nodeagent.core.model.topology import HugepagePool, NodeId, NumaNode
from nodeagent.errors import HostError
from nodeagent.host.cgroup.read import size_name
from nodeagent.host.sysfs.sysfs import SysFs

_MOUNT = "sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class Uses:
    """What some cgroups have of hugepages, in pages."""

    used: Mapping[tuple[NodeId, int], int] = field(default_factory=lambda: MappingProxyType({}))
    """Faulted, by (node, page_bytes)."""
    reserved: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Promised to a mapping and not yet faulted, by page_bytes."""


def uses(sysfs: SysFs, paths: Iterable[str], sizes: Iterable[int]) -> Uses | None:
    """What cgroups (below the mount of cgroup v2) have of pages of these sizes, in bytes. None where the kernel does
    not say on which nodes; a cgroup that is gone has nothing. HostError where a file cannot be read."""
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
    """Those that are below none of the others, whose counts include them."""
    every = {path.strip("/") for path in paths}
    for path in sorted(every):
        above = path
        while above := above.rpartition("/")[0]:
            if above in every:
                break
        else:
            yield path


def _numa_stat(sysfs: SysFs, path: str) -> Mapping[NodeId, int] | None:
    """Bytes by node, of "total=4194304 N0=4194304 N1=0"."""
    text = sysfs.text(path, None)
    if text is None:
        return None
    total, *nodes = text.split() or [""]
    found = [re.fullmatch(r"N([0-9]{1,9})=([0-9]{1,19})", one, re.ASCII) for one in nodes]
    if not total.startswith("total=") or not all(found):
        raise HostError(f"cannot read {sysfs.path(path)}: {text[:80]!r} is not total=BYTES N0=BYTES ...")
    return {int(one[1]): int(one[2]) for one in found if one is not None}


def known(nodes: Sequence[NumaNode], found: Uses) -> tuple[NumaNode, ...]:
    """Nodes whose pools say what is our holders'. Of the reserved pages of a size those that others have are laid on
    the nodes with most free pages first, as all of them are: where they will be faulted nobody can say."""
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
