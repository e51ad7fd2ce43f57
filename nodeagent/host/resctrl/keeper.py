"""Makes the groups of resctrl what a plan says, and removes those that are no longer wanted.

What is about to be done is on disk before the kernel is asked, so that a restarted agent can undo it. A group that
cannot be made as wanted is removed again. Groups that are not recorded are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.core.resctrl.model import ROOT, Group, Mode, Schemata, Tree
from nodeagent.core.resctrl.plan import GroupPlan, Held, ResctrlPlan
from nodeagent.errors import HostError
from nodeagent.host.resctrl.journal import GroupRecord, Journal, load, save
from nodeagent.host.resctrl.read import group, read
from nodeagent.host.resctrl.write import GroupWriter, alike
from nodeagent.host.sysfs.sysfs import SysFs


class KeptGroups(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the groups after a round."""

    made: frozenset[str] = frozenset()
    """Groups that are as wanted."""
    repaired: tuple[str, ...] = ()
    """Groups that another program had changed or removed and that are as wanted again; "" is the default group."""
    errors: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why a group is not as it should be, by name."""
    notes: tuple[str, ...] = ()


class GroupKeeper:
    """Keeps groups, with a record in a file of its own. Everything blocks; one round at a time."""

    def __init__(self, sysfs: SysFs, memory: Path) -> None:
        """memory: the record. Another agent of the node may change it between two rounds."""
        self._sysfs = sysfs
        self._memory = memory
        self._writer = GroupWriter(sysfs)
        self._journal = Journal()
        self._unread = ""
        self._confirmed: set[str] = set()
        """Groups that were as recorded when they were last read: what differs then was changed by another program."""

    def held(self) -> Held:
        """Read the record and return what was done before."""
        self._journal, self._unread = load(self._sysfs, self._memory)
        one = self._journal
        return Held(
            groups={name: group.schemata for name, group in one.groups.items()},
            aside=one.aside,
            earlier=tuple(one.earlier),
            root=one.before,
        )

    def forget(self) -> None:
        """Forget everything that was done: resctrl is not mounted any longer. Raise HostError."""
        self._record(groups={}, before={}, aside={}, earlier=[])

    def keep(self, tree: Tree, plan: ResctrlPlan, *, ended: bool = True) -> KeptGroups:
        """Carry out a plan that was made of `held` and of the tree. Raise HostError if something cannot be recorded; it
        is not done then.

        ended: whether groups that the plan does not have may be removed.
        """
        errors: dict[str, str] = dict(plan.errors)
        repaired: list[str] = []
        if ended:
            self._remove({*self._journal.groups} - {*plan.groups} - {*plan.errors}, errors)
        self._default(tree, plan, errors, repaired)
        if ROOT in errors:  # what is not given up by the default group cannot be given to others
            errors |= {name: errors[ROOT] for name, one in plan.groups.items() if one.own}
        wanted = {name: one for name, one in plan.groups.items() if name not in errors}
        fresh = {name: one for name, one in wanted.items() if name not in self._journal.groups}
        known = dict(self._journal.groups)
        self._record(groups={**known, **{name: _recorded(one) for name, one in wanted.items()}})
        for name, one in wanted.items():
            self._keep(name, one, tree, known.get(name), errors, repaired)
        self._check_alone({name: one for name, one in fresh.items() if name not in errors}, errors)
        self._undo([name for name in fresh if name in errors], errors)
        notes = (self._unread,) if self._unread else ()
        return KeptGroups(
            made=frozenset(plan.groups.keys() - errors.keys()),
            repaired=tuple(repaired),
            errors=MappingProxyType(errors),
            notes=notes,
        )

    # ---------------------------------------------------------------- removing

    def _remove(self, names: set[str], errors: dict[str, str]) -> None:
        left = dict(self._journal.groups)
        for name in sorted(names):
            try:
                self._writer.remove(name)
                del left[name]
                self._confirmed.discard(name)
            except HostError as error:
                errors[name] = str(error)
        self._record(groups=left)

    def _undo(self, names: list[str], errors: dict[str, str]) -> None:
        """Remove groups that could not be made as wanted."""
        left = dict(self._journal.groups)
        for name in names:
            try:
                self._writer.remove(name)
                left.pop(name, None)
            except HostError as error:
                errors[name] = f"{errors[name]}; {error}"
        self._record(groups=left)

    # ---------------------------------------------------------------- the default group

    def _default(self, tree: Tree, plan: ResctrlPlan, errors: dict[str, str], repaired: list[str]) -> None:
        """Have the default group give up ways, or take them back. What it had is recorded first, and forgotten last."""
        due = _due(tree, tree.root, plan.root)
        before, aside, known = _plain(plan.before), dict(plan.aside), self._journal
        unchanged = before == known.before and aside == known.aside
        if before and not unchanged:
            self._record(before=before, aside=aside, earlier=[*known.earlier, known.aside])
        try:
            if due:
                self._writer.write(ROOT, due, tree)
        except HostError as error:
            errors[ROOT] = str(error)
            return
        repaired += [ROOT] if due and before and unchanged and ROOT in self._confirmed else []
        self._confirmed.add(ROOT)
        self._record(before=before, aside=aside if before else {}, earlier=[])

    # ---------------------------------------------------------------- other groups

    def _keep(
        self,
        name: str,
        one: GroupPlan,
        tree: Tree,
        known: GroupRecord | None,
        errors: dict[str, str],
        repaired: list[str],
    ) -> None:
        """Make one group what it should be, whatever it is."""
        now = tree.groups.get(name)
        mode = Mode.EXCLUSIVE if one.exclusive else Mode.SHAREABLE
        try:
            if now is None:
                self._writer.make(name, tree)
                now = group(self._sysfs, name)
            if now is not None and now.mode != mode and not one.exclusive:
                now = self._writer.set_mode(name, mode)
            due = _due(tree, now, one.schemata)
            if due:
                now = self._writer.write(name, due, tree)
            if now is not None and now.mode != mode:
                self._writer.set_mode(name, mode)
                due = one.schemata
        except HostError as error:
            errors[name] = str(error)
            return
        if known == _recorded(one) and name in self._confirmed and (due or name not in tree.groups):
            repaired.append(name)
        self._confirmed.add(name)

    def _check_alone(self, fresh: Mapping[str, GroupPlan], errors: dict[str, str]) -> None:
        """Check that nothing else has the ways that new groups have for themselves: another program may have made a
        group meanwhile, which begins with every way that none has."""
        if not any(one.own for one in fresh.values()):
            return
        tree = read(self._sysfs)
        for name, one in fresh.items():
            for other in tree.groups.values():
                shared = [d for d, mask in one.own.items() if other.name != name and mask & _mask(tree, other, d)]
                if shared:
                    whose = f"group {other.name}" if other.name else "the default group"
                    errors[name] = f"its ways of L3 {shared[0]} are also those of {whose}"

    def _record(
        self,
        groups: dict[str, GroupRecord] | None = None,
        before: dict[str, dict[int, int]] | None = None,
        aside: dict[int, int] | None = None,
        earlier: list[dict[int, int]] | None = None,
    ) -> None:
        """Record what is about to be done. Nothing is written if nothing has changed."""
        now = self._journal
        after = Journal(
            groups=now.groups if groups is None else groups,
            before=now.before if before is None else before,
            aside=now.aside if aside is None else aside,
            earlier=now.earlier if earlier is None else earlier,
        )
        save(self._sysfs, self._memory, after)
        self._journal = after


def _recorded(one: GroupPlan) -> GroupRecord:
    return GroupRecord(schemata=_plain(one.schemata), exclusive=one.exclusive)


def _plain(schemata: Schemata) -> dict[str, dict[int, int]]:
    return {name: dict(values) for name, values in schemata.items()}


def _mask(tree: Tree, one: Group, domain: int) -> int:
    mask = 0
    for cache in tree.at_level(3):
        mask |= one.schemata.get(cache.name, {}).get(domain, 0)
    return mask


def _due(tree: Tree, now: Group | None, wanted: Schemata) -> Schemata:
    """Return the part of a schemata that a group does not have."""
    found: dict[str, dict[int, int]] = {}
    for name, values in wanted.items():
        has = now.schemata.get(name, {}) if now is not None else {}
        due = {domain: value for domain, value in values.items() if not alike(tree, name, has.get(domain), value)}
        if due:
            found[name] = due
    return found
