"""Which group of resctrl gets which ways and which limit of bandwidth. Pure.

Ways for exclusive use are set aside: the default group does without them, and only claims get them, consecutive ones
and each way for one claim alone. Ways that the groups of other programs have are not given, and those groups are left
as they are. A claim keeps the ways that it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec

from nodeagent.core.resctrl.bandwidth import limit
from nodeagent.core.resctrl.masks import choose, fault, highest_of, longest, set_aside
from nodeagent.core.resctrl.model import (
    BANDWIDTH,
    ROOT,
    Cache,
    Group,
    Mode,
    Partition,
    Schemata,
    SharedClass,
    Tree,
    Values,
)
from nodeagent.errors import InputError

NO_VALUES: Values = MappingProxyType({})
NO_SCHEMATA: Schemata = MappingProxyType({})
_NO_GROUPS: Mapping[str, Schemata] = MappingProxyType({})


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What was done before, as it is recorded."""

    groups: Mapping[str, Schemata] = msgspec.field(default_factory=lambda: _NO_GROUPS)
    """The agent's own groups, and what they were to have."""
    aside: Values = msgspec.field(default_factory=lambda: NO_VALUES)
    """Ways set aside, by L3 cache."""
    earlier: tuple[Values, ...] = ()
    """What else may have been set aside: it was, before a change of which it is not known whether it was completed."""
    root: Schemata = msgspec.field(default_factory=lambda: NO_SCHEMATA)
    """What the default group had before."""


class GroupPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one group must be."""

    schemata: Schemata
    own: Values = msgspec.field(default_factory=lambda: NO_VALUES)
    """The ways that it alone may have, by L3 cache."""
    exclusive: bool = False
    """Whether the kernel can be asked to keep the masks of others off its ways: it has ways of its own of every cache
    that can be divided."""


class ResctrlPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What every group must be."""

    root: Schemata = msgspec.field(default_factory=lambda: NO_SCHEMATA)
    """What the default group must have; what is left out stays as it is."""
    aside: Values = msgspec.field(default_factory=lambda: NO_VALUES)
    before: Schemata = msgspec.field(default_factory=lambda: NO_SCHEMATA)
    """What the default group is to have again once nothing is set aside; empty then."""
    groups: Mapping[str, GroupPlan] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By name, in the order in which they are made."""
    errors: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why a group cannot be, by its name."""
    notes: tuple[str, ...] = ()
    """What cannot be as configured, one sentence each."""


def plan(
    tree: Tree, held: Held, exclusive_ways: int, classes: Sequence[SharedClass], partitions: Sequence[Partition]
) -> ResctrlPlan:
    """Return what has to be. exclusive_ways: how many ways of each L3 cache are set aside. What is held comes first,
    then classes, then partitions, each in their order. A group that is held and cannot be as wanted stays as it is."""
    ours = {ROOT, *held.groups, *(one.group for one in classes), *(one.group for one in partitions)}
    foreign = {name: one for name, one in tree.groups.items() if name not in ours}
    in_use = any(one.ways and one.group in held.groups for one in partitions)
    aside, notes = _aside(tree, held, foreign, exclusive_ways, in_use=in_use)
    root, before = _root(tree, held, aside)
    making = _Making(tree, held, foreign, aside, root, notes)
    making.keep(partitions)
    for old in (True, False):
        for shared in (one for one in classes if (one.group in held.groups) == old):
            making.add_class(shared)
        for part in (one for one in partitions if (one.group in held.groups) == old):
            making.add_partition(part)
    return ResctrlPlan(
        root=root if before else _given_back(tree, held),
        aside=MappingProxyType(aside),
        before=before,
        groups=MappingProxyType(making.groups),
        errors=MappingProxyType(making.errors),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------- ways set aside


def _aside(
    tree: Tree, held: Held, foreign: Mapping[str, Group], ways: int, *, in_use: bool
) -> tuple[dict[int, int], list[str]]:
    """Return the ways that are set aside, by L3 cache, and notes. They do not move while claims have some."""
    caches, notes = tree.at_level(3), list[str]()
    if not caches:
        return {}, ["cannot set ways aside: the L3 caches of this machine cannot be divided"] if ways else []
    same = all(mask.bit_count() == ways for mask in held.aside.values())
    if in_use and not same:
        notes.append(f"the ways that were set aside stay so while claims have some: exclusiveWays {ways} applies later")
    found = {}
    for domain in caches[0].domains:
        mask = held.aside.get(domain, 0) if in_use or same else 0
        if not mask and ways:
            roots = [_before(tree, held, one.name, domain) for one in caches]
            mask = set_aside(caches, roots, _used(foreign, caches, domain), ways)
        if mask:
            found[domain] = mask
        elif ways:
            notes.append(f"cannot set {ways} ways of L3 {domain} aside: {_why_not(caches[0], ways)}")
    return found, notes


def _why_not(cache: Cache, ways: int) -> str:
    shared = f", and devices use {cache.hardware:#x} of them" if cache.hardware else ""
    return f"it has {cache.ways}{shared}; the default group needs at least {cache.least_ways} consecutive ones"


def _before(tree: Tree, held: Held, name: str, domain: int) -> int:
    return held.root.get(name, NO_VALUES).get(domain, tree.root.schemata[name][domain])


def _used(groups: Mapping[str, Group], caches: Iterable[Cache], domain: int) -> int:
    """Return the ways of an L3 cache that some groups have."""
    mask = 0
    for one in groups.values():
        for cache in caches:
            mask |= one.schemata.get(cache.name, NO_VALUES).get(domain, 0)
    return mask


def _root(tree: Tree, held: Held, aside: Values) -> tuple[Schemata, Schemata]:
    """Return what the default group must have of the L3 caches, and what it had before."""
    names = [one.name for one in tree.at_level(3)] if aside else []
    before = {name: {domain: _before(tree, held, name, domain) for domain in aside} for name in names}
    root = {name: {domain: mask & ~aside[domain] for domain, mask in some.items()} for name, some in before.items()}
    return _frozen(root), _frozen(before)


def _given_back(tree: Tree, held: Held) -> Schemata:
    """Return what the default group gets back now that nothing is set aside; not what another program has changed."""
    found: dict[str, dict[int, int]] = {}
    for name, some in held.root.items():
        now = tree.root.schemata.get(name, NO_VALUES)
        for domain, mask in some.items():
            ours = {mask & ~aside.get(domain, 0) for aside in (held.aside, *held.earlier)}
            if now.get(domain) in ours:
                found.setdefault(name, {})[domain] = mask
    return _frozen(found)


def _frozen(schemata: Mapping[str, Mapping[int, int]]) -> Schemata:
    return MappingProxyType({name: MappingProxyType(dict(values)) for name, values in schemata.items()})


# ---------------------------------------------------------------- groups


class _Making:
    """Groups of one plan, added one after the other."""

    def __init__(
        self,
        tree: Tree,
        held: Held,
        foreign: Mapping[str, Group],
        aside: Values,
        root: Schemata,
        notes: list[str],
    ) -> None:
        self.groups: dict[str, GroupPlan] = {}
        self.errors: dict[str, str] = {}
        self._tree, self._held, self._foreign, self._aside = tree, held, foreign, aside
        self._notes = notes
        self._given: dict[int, int] = {}
        self._kept: dict[tuple[str, int], int] = {}
        shared = {name: {**values, **root.get(name, {})} for name, values in tree.root.schemata.items()}
        self._shared = _frozen({name: some for name, some in shared.items() if name in (*tree.caches, BANDWIDTH)})
        """What a group has of everything that it is not given."""

    def keep(self, partitions: Iterable[Partition]) -> None:
        """Note which ways claims have already, so that no other gets them."""
        for one in partitions:
            for domain, ways in one.ways.items():
                if mask := self._has(one, domain, ways):
                    self._kept[one.group, domain] = mask
                    self._give(domain, mask)

    def add_class(self, one: SharedClass) -> None:
        """Add a shared class."""
        try:
            self._take_closid()
            masks = dict(self._class_masks(one))
            bandwidth = self._bandwidth(one.percent, one.mbps)
        except InputError as error:
            self.errors[one.group] = f"cannot make class {one.name}: {error}"
        else:
            every = frozenset(bandwidth)
            self.groups[one.group] = GroupPlan(schemata=self._with(masks, bandwidth, every))

    def add_partition(self, one: Partition) -> None:
        """Add what a claim has for itself."""
        try:
            if not one.domains:
                raise InputError("the L3 caches of its CPUs are not known (cache/index3/id)")
            self._take_closid()
            own = self._own(one)
            bandwidth = self._bandwidth(one.percent, one.mbps)
        except InputError as error:
            self.errors[one.group] = str(error)
            return
        for domain, mask in own.items():
            self._give(domain, mask)
        l3 = self._tree.at_level(3)
        masks = {cache.name: own for cache in l3} if own else {}
        overlapped = any(mask & _used(self._foreign, l3, domain) for domain, mask in own.items())
        whole = bool(own) and len(l3) == len(self._tree.caches) and set(own) == set(l3[0].domains)
        self.groups[one.group] = GroupPlan(
            schemata=self._with(masks, bandwidth, one.domains),
            own=MappingProxyType(own),
            exclusive=whole and not overlapped,
        )

    def _give(self, domain: int, mask: int) -> None:
        self._given[domain] = self._given.get(domain, 0) | mask

    def _with(self, masks: Mapping[str, Values], bandwidth: Values, domains: frozenset[int]) -> Schemata:
        limits = {domain: value for domain, value in bandwidth.items() if domain in domains}
        changed = {**masks, **({BANDWIDTH: limits} if limits else {})}
        return _frozen({name: {**values, **changed.get(name, {})} for name, values in self._shared.items()})

    def _take_closid(self) -> None:
        """Raise InputError if no group is left."""
        theirs = sorted(name for name, one in self._foreign.items() if one.mode != Mode.LOCKED)
        if not self._tree.closids:
            raise InputError("nothing can be divided on this machine: resctrl only monitors here")
        mine = len(self.groups) + len(self.errors.keys() & self._held.groups.keys())
        if mine + len(theirs) + 1 >= self._tree.closids:
            others = f", {len(theirs)} of other programs ({', '.join(theirs)})" if theirs else ""
            raise InputError(
                f"all {self._tree.closids} groups that the hardware has (CLOSIDs) are in use: the default one, "
                f"{mine} of the agent{others}"
            )

    def _bandwidth(self, percent: int | None, mbps: int | None) -> Values:
        """Return a limit for every domain; empty if there is none."""
        value = limit(self._tree, percent, mbps)
        bandwidth = self._tree.bandwidth
        return {} if value is None or bandwidth is None else dict.fromkeys(bandwidth.domains, value)

    # ---------------------------------------------------------------- classes

    def _class_masks(self, one: SharedClass) -> Iterator[tuple[str, Values]]:
        for resource in (*one.masks, *one.ways):
            for cache in _resolved(self._tree, resource):
                yield cache.name, {domain: self._class_mask(one, resource, cache, domain) for domain in cache.domains}

    def _class_mask(self, one: SharedClass, resource: str, cache: Cache, domain: int) -> int:
        where, has = f"{cache.name} {domain}", self._shared[cache.name][domain]
        if resource in one.masks:
            mask = one.masks[resource]
        else:
            mask = highest_of(has, one.ways[resource])
            if not mask:
                raise InputError(f"{one.ways[resource]} ways of {where}, of which the default group has {has:#x}")
        if why := fault(cache, mask):
            raise InputError(f"{where} does not take it: {why}")
        if cache.level == 3 and mask & self._aside.get(domain, 0):
            raise InputError(f"{mask:#x} overlaps the ways {self._aside[domain]:#x} of {where}, set aside for claims")
        return mask

    # ---------------------------------------------------------------- claims

    def _own(self, one: Partition) -> dict[int, int]:
        """Return the ways of a claim, by L3 cache. Raise InputError if it cannot have as many."""
        caches = self._tree.at_level(3)
        if one.ways and not caches:
            raise InputError("the L3 caches of this machine cannot be divided")
        kept = {domain: self._kept.get((one.group, domain), 0) for domain in one.ways}
        return {domain: kept[domain] or self._new(domain, ways) for domain, ways in one.ways.items()}

    def _has(self, one: Partition, domain: int, ways: int) -> int:
        """Return the ways that a claim has already, or 0."""
        cache = next(iter(self._tree.at_level(3)), None)
        if cache is None:
            return 0
        mask = self._held.groups.get(one.group, NO_SCHEMATA).get(cache.name, NO_VALUES).get(domain, 0)
        free = self._aside.get(domain, 0) & ~self._given.get(domain, 0)
        if mask & ~free or mask.bit_count() != ways:
            return 0
        names = [name for name, group in self._foreign.items() if mask & _used({name: group}, [cache], domain)]
        if names:
            said = f"{one.holder} shares ways {mask:#x} of L3 {domain} with groups of other programs"
            self._notes.append(f"{said}: {', '.join(sorted(names))}")
        return mask

    def _new(self, domain: int, ways: int) -> int:
        caches = self._tree.at_level(3)
        cache, aside = caches[0], self._aside.get(domain, 0)
        if ways < cache.least_ways:
            raise InputError(f"cannot give {ways} ways of L3 {domain}: the hardware gives at least {cache.least_ways}")
        if not aside:
            raise InputError(f"cannot give {ways} ways of L3 {domain}: none are set aside for claims (exclusiveWays)")
        theirs = aside & _used(self._foreign, caches, domain)
        left = aside & ~theirs & ~self._given.get(domain, 0)
        if mask := choose(cache, left, ways):
            return mask
        names = [name for name, one in self._foreign.items() if theirs & _used({name: one}, caches, domain)]
        others = f", {theirs.bit_count()} are in groups of other programs ({', '.join(names)})" if theirs else ""
        raise InputError(
            f"cannot give {ways} ways of L3 {domain}: of {aside.bit_count()} that are set aside {left.bit_count()} are "
            f"free, at most {longest(left)} consecutive ones{others}"
        )


def _resolved(tree: Tree, resource: str) -> Sequence[Cache]:
    """Return the resources that a class means. Raise InputError if the machine has none of them."""
    if resource in tree.caches:
        return (tree.caches[resource],)
    apart = tuple(one for one in tree.caches.values() if one.name in (f"{resource}CODE", f"{resource}DATA"))
    if apart:
        return apart
    have = ", ".join(tree.caches) or "none"
    hint = ": code and data are apart only if resctrl is mounted with cdp or cdpl2" if len(resource) > 2 else ""
    raise InputError(f"the machine has no {resource} that can be divided, it has {have}{hint}")
