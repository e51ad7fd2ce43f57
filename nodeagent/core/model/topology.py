"""CPUs, caches and NUMA nodes of a machine, as frozen values.

Ids are the kernel's own (CPU numbers, NUMA node numbers). package, die, cluster, core, l2 and l3 of a CPU are indices
that are unique on the whole machine and numbered by lowest member CPU. The kernel's core_id repeats on every package
and is never used as an identity. Sizes are in bytes, and the field names say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet

NodeId = int


NO_NODE = -1
"""The NUMA node of anything that has none."""


PERFORMANCE, BALANCED, EFFICIENCY = "performance", "balanced", "efficiency"
"""Values of Cpu.kind on hybrid machines, fastest first; "" if all CPUs are of the same kind."""


DRAM, HBM, CXL, GPU, PMEM, SPECIAL = "dram", "hbm", "cxl", "gpu", "pmem", "special"
"""Values of NumaNode.kind for nodes with memory. SPECIAL: set apart from ordinary memory, of no known kind."""
MEMORY_KINDS = (DRAM, HBM, CXL, GPU, PMEM, SPECIAL)


class Cpu(msgspec.Struct, frozen=True, kw_only=True):
    """One online CPU (hardware thread)."""

    id: int
    package: int
    die: int
    cluster: int | None = None
    core: int
    numa_node: NodeId
    l2: int | None = None
    l3: int | None = None
    kind: str = ""
    isolated: bool = False
    capacity: int | None = None
    """cpu_capacity: 1024 for the fastest CPU of the machine."""
    base_khz: int | None = None
    max_khz: int | None = None


class CacheGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One data or unified cache and the online CPUs that share it."""

    level: int
    index: int
    """Unique within the level; equal to Cpu.l2 or Cpu.l3 for those levels."""
    cpus: CpuSet
    size_bytes: int | None = None


class HugepagePool(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of one size on one NUMA node (Documentation/admin-guide/mm/hugetlbpage.rst)."""

    node: NodeId
    page_bytes: int
    total_pages: int
    free_pages: int
    reserved_pages: int = 0
    """Reserved for a mapping and not yet faulted. Most kernels report only a machine-wide number, which is then
    assigned to the pool of the node with the most free pages."""
    surplus_pages: int = 0
    own_used_pages: int | None = None
    """Pages faulted by our holders, or None if they cannot be distinguished from those of other users."""
    own_reserved_pages: int | None = None
    """The part of reserved_pages that belongs to our holders' mappings; known if own_used_pages is known."""

    @property
    def persistent_pages(self) -> int:
        """Return the number of pages that stay in the pool when they are freed."""
        return self.total_pages - self.surplus_pages

    @property
    def foreign_pages(self) -> int | None:
        """Return the number of pages in use by others than our holders, or None if unknown."""
        if self.own_used_pages is None:
            return None
        return max(0, self.total_pages - self.free_pages - self.own_used_pages)


class NumaNode(msgspec.Struct, frozen=True, kw_only=True):
    """One NUMA node, with or without CPUs, with or without memory."""

    id: NodeId
    cpus: CpuSet = EMPTY
    memory_bytes: int = 0
    kind: str = DRAM
    """One of MEMORY_KINDS, or "none" (no memory)."""
    distances: Mapping[NodeId, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """SLIT distance to each node, by node id; empty if the kernel reports none."""
    hugepages: tuple[HugepagePool, ...] = ()

    def serves(self, memory_kind: str = DRAM) -> bool:
        """Return whether memory and hugepages of this node may serve a request for a kind of memory.

        An ordinary request names no kind and means DRAM: memory of a GPU, for example, holds what the GPU's driver
        puts there, and goes away with the driver.
        """
        return self.kind == memory_kind
