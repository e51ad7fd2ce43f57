"""Stable numbers of sockets and L3 groups while CPUs go offline and come back.

Groups are numbered by their lowest online CPU. If that CPU went offline, groups would change places, and with them the
devices `socket1` and `l3-1` that claims are allocated from. CPUs therefore keep the group numbers under which they were
first known. On a machine seen for the first time, the CPUs that claims hold show what their groups were called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import Cpu

_NAMED = re.compile(r"(?P<group>socket|l3-)(?P<number>0|[1-9][0-9]{0,4})", re.ASCII)
_L3 = 3


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """The socket and L3 group numbers of all CPUs ever seen, by CPU."""

    packages: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    l3: Mapping[int, int] = msgspec.field(default_factory=lambda: MappingProxyType({}))


def numbers_held(ledger: Ledger) -> Numbers:
    """Return the group numbers that follow from the names of the claims' devices."""
    found: dict[str, dict[int, int]] = {"socket": {}, "l3-": {}}
    for grant in ledger.grants.values():
        result = grant.result if grant.holder.api == CLAIM else None
        if result is not None and (named := _NAMED.fullmatch(result.device)):
            found[named["group"]].update(dict.fromkeys(grant.cpus, int(named["number"])))
    return Numbers(packages=MappingProxyType(found["socket"]), l3=MappingProxyType(found["l3-"]))


def numbered(inventory: Inventory, known: Numbers) -> tuple[Inventory, Numbers]:
    """Return the same machine with the known numbers, and the numbers known from now on.

    A group is numbered again if its CPUs were known by several numbers, as on another machine, or by a number that
    another group has.
    """
    packages = _renamed(inventory.cpus, lambda cpu: cpu.package, known.packages)
    l3 = _renamed(inventory.cpus, lambda cpu: cpu.l3, known.l3)
    if any(old != new for names in (packages, l3) for old, new in names.items()):
        cpus = tuple(
            replace(cpu, package=packages[cpu.package], l3=None if cpu.l3 is None else l3[cpu.l3])
            for cpu in inventory.cpus
        )
        caches = (
            replace(one, index=l3.get(one.index, one.index)) if one.level == _L3 else one for one in inventory.caches
        )
        ordered = sorted(caches, key=lambda one: (one.level, one.index))
        inventory = replace(inventory, cpus=cpus, caches=tuple(ordered))
    now = Numbers(
        packages=MappingProxyType({**known.packages, **{cpu.id: cpu.package for cpu in inventory.cpus}}),
        l3=MappingProxyType({**known.l3, **{cpu.id: cpu.l3 for cpu in inventory.cpus if cpu.l3 is not None}}),
    )
    return inventory, now


def _renamed(cpus: Iterable[Cpu], group_of: Callable[[Cpu], int | None], known: Mapping[int, int]) -> Mapping[int, int]:
    """Return the number of each group by its current number."""
    names: dict[int, set[int]] = {}
    for cpu in cpus:
        if (group := group_of(cpu)) is not None:
            names.setdefault(group, set()).update({known[cpu.id]} if cpu.id in known else ())
    kept: dict[int, int] = {}
    for group, one in names.items():
        if len(one) == 1 and not one & set(kept.values()):
            kept[group] = min(one)
    taken = {*kept.values(), *known.values()}
    free = (number for number in range(len(names) + len(taken)) if number not in taken)
    return {group: kept[group] if group in kept else next(free) for group in names}
