"""Named pools of CPUs: on which CPUs the containers of claims run that name one. Pure.

A claim that names a pool brings its CPUs into the pool of that name in its namespace. They are held like those of any
other claim, so no other grant gets them, and a pool never has fewer CPUs than its members asked for. What differs is
who runs on them: all members of the pool, each within its group. A group is what the scheduler chose for a claim: the
CPUs of a NUMA node, a socket or an L3 cache.

In addition members run on those CPUs of their group that no grant holds. They come and go with other grants, so
the pool shrinks as soon as some of them are granted. The idle siblings of exclusive CPUs are left out: a
container with exclusive CPUs is not slowed down by a pool on the same core.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from nodeagent.core.dra.cpu_pool import group_around
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.core.opaque.settings import known_settings
from nodeagent.core.placement.index import machine_of


class PoolName(NamedTuple):
    """The name of a named pool. Pools of different namespaces have nothing to do with each other."""

    namespace: str
    name: str


def pool_of(grant: Grant) -> PoolName | None:
    """Return the named pool into which a grant brings its CPUs, or None if they are exclusive."""
    # Nearly all grants have no such setting: theirs are not decoded. Where a later version wrote what cannot be read,
    # the CPUs stay exclusive.
    if grant.holder.api != CLAIM or '"named_pool"' not in grant.settings:
        return None
    name = known_settings(grant.settings).named_pool
    return PoolName(grant.holder.namespace, name) if name else None


def exclusive_cpus(ledger: Ledger) -> CpuSet:
    """Return the held CPUs that belong to no named pool."""
    return kept_by(
        ledger, "_exclusive_cpus", lambda: union(one.cpus for one in ledger.grants.values() if pool_of(one) is None)
    )


def cpus_brought(ledger: Ledger, pool: PoolName) -> CpuSet:
    """Return the CPUs that the members of a pool have brought into it, in all of their groups."""
    return _brought(ledger).get(pool, EMPTY)


def _brought(ledger: Ledger) -> dict[PoolName, CpuSet]:
    return kept_by(ledger, "_pool_cpus", lambda: _all_brought(ledger))


def _all_brought(ledger: Ledger) -> dict[PoolName, CpuSet]:
    found: dict[PoolName, CpuSet] = {}
    for grant in ledger.grants.values():
        if grant.cpus and (pool := pool_of(grant)) is not None:
            found[pool] = found.get(pool, EMPTY) | grant.cpus
    return found


class NamedPools:
    """The CPUs of all named pools, for one inventory and one ledger."""

    def __init__(self, inventory: Inventory, ledger: Ledger, free: CpuSet) -> None:
        """`free`: the CPUs that no grant holds and that containers without exclusive CPUs may use."""
        self._inventory = inventory
        self._ledger = ledger
        self._free = free

    def cpus_of(self, grant: Grant) -> CpuSet:
        """Return the CPUs, online or not, on which the containers of a pool's member run through this grant; none if
        its CPUs are exclusive."""
        pool = pool_of(grant)
        if pool is None or not grant.cpus:
            return EMPTY
        group = group_around(self._inventory, grant.result.device) if grant.result is not None else EMPTY
        return grant.cpus | (group & (cpus_brought(self._ledger, pool) | self._idle))

    @functools.cached_property
    def _idle(self) -> CpuSet:
        """Return the CPUs that pools use in addition to their own."""
        cores, known = machine_of(self._inventory).cores, self._inventory.cpu_by_id
        exclusive = (known[cpu] for cpu in exclusive_cpus(self._ledger) if cpu in known)
        siblings = union(CpuSet.of_mask(cores[cpu.core]) for cpu in exclusive)
        return self._free - siblings
