"""Hidden hyperthreads: containers run on one thread of each granted core, and the others stay idle. Pure.

A claim that hides them is granted whole cores, so the hidden threads are held like those that are used: no other
container gets them.
"""

from __future__ import annotations

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.settings import OpaqueConfig, known_settings
from nodeagent.core.placement.index import machine_of
from nodeagent.errors import InputError


def used_cpus(inventory: Inventory, grant: Grant) -> CpuSet:
    """Return those CPUs of a grant on which its containers run: all of them, or of each core the first that pods can
    run on. Which CPUs are siblings is known only of those that are online."""
    if grant.holder.api != CLAIM or '"hide_hyperthreads"' not in grant.settings:
        return grant.cpus
    return _first_threads(inventory, grant.cpus) if known_settings(grant.settings).hide_hyperthreads else grant.cpus


def _first_threads(inventory: Inventory, cpus: CpuSet) -> CpuSet:
    known, first = inventory.cpu_by_id, dict[int, int]()
    for cpu in cpus & inventory.cpus_usable:
        if cpu in known:
            first.setdefault(known[cpu].core, cpu)
    return CpuSet(first.values())


def check_whole_core(inventory: Inventory, cpus: CpuSet, settings: OpaqueConfig) -> None:
    """Raise InputError if hyperthreads should be hidden of a device that is a single CPU with siblings: others may be
    granted these."""
    one = inventory.cpu_by_id.get(cpus.first()) if settings.hide_hyperthreads and len(cpus) == 1 else None
    if one is not None and (threads := machine_of(inventory).cores[one.core].bit_count()) > 1:
        raise InputError(f"hideHyperthreads needs whole cores: CPU {one.id} is one of {threads} threads of its core")
