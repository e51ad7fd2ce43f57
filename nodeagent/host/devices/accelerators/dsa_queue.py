"""Slots of Intel's DSA and IAA that the admin gives to the agent: the kind `dsa-queue`, one device a slot, whether or
not its work queue is made.

The agent makes the queue for the claim that holds the slot (managers/dsa). A slot is offered only if that would be
done now: for an accelerator that no program has begun to configure, or that is exactly as the agent divided it. A slot
that is held stays a device in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType

from nodeagent.core.dsa.division import (
    CHANGING,
    DEDICATED,
    KIND,
    Accelerator,
    Division,
    Queue,
    Rule,
    device_id,
    differs,
    in_force,
    taken,
    unfit,
)
from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, DEGRADED, PRESENT, KindState
from nodeagent.errors import HostError
from nodeagent.host.devices.base import Context, DsaSelector, Found, part_of
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.sysfs import SysFs

_TYPES = {"dsa": "dsa", "iax": "iaa"}
LOOKS = 3
"""How often an accelerator is read that the agent changes meanwhile."""


class DsaQueue:
    """The kind `dsa-queue`."""

    name = KIND
    connects = True
    """A device is handed over once the agent has made its queue; see `prepares` in host/devices/hooks.py."""

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        if not context.dsa.rules and not context.dsa.divided():
            return Found(state=KindState(kind=KIND, state=ABSENT, reason="no accelerator is given to the agent"))
        look = _Look(sysfs, context.dsa)
        devices = [one for function in context.functions for one in look.slots(function)]
        state = KindState(kind=KIND, state=PRESENT if devices else ABSENT)
        if look.faults:
            state = KindState(kind=KIND, state=DEGRADED, reason="; ".join(look.faults))
        elif not devices:
            state = KindState(kind=KIND, state=ABSENT, reason="none of the accelerators given to the agent is here")
        return Found(state=state, devices=tuple(devices))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return one variable with the nodes of all queues; the nodes themselves are known once a queue is made."""
        made = (
            node.host_path for one in devices if one.prepared is not None for node in one.prepared.edits.device_nodes
        )
        every = ",".join(dict.fromkeys(made))
        return ContainerEdits(env=MappingProxyType({"NODEAGENT_DSA_QUEUES": every} if every else {}))


class _Look:
    """One look at the accelerators."""

    def __init__(self, sysfs: SysFs, selector: DsaSelector) -> None:
        from nodeagent.host.dsa.accelerators import Accelerators  # no node without such accelerators needs it

        self._selector = selector
        self._before = selector.divided()
        self._accelerators = Accelerators(sysfs)
        self._names: dict[str, str] = {}
        self._unlisted = ""
        try:
            self._names = dict(self._accelerators.places())
        except HostError as error:
            self._unlisted = str(error)
        self.faults: list[str] = []
        """Why slots are not offered, one sentence for each accelerator."""

    def slots(self, function: Function) -> Iterator[Device]:
        """Yield the slots of a PCI function."""
        address, name = function.address, self._names.get(function.address, "")
        rule, record = self._selector.rule(address, name), self._before.get(address)
        if rule is None and record is None:
            return
        try:
            if self._unlisted:
                raise HostError(self._unlisted)
            if not name:
                raise HostError(f"{address} is bound to {function.driver or 'no driver'}, expected idxd")
            seen, record, is_changing = self._read(address, name, record)
            offered, why = _unjudged(rule, record) if is_changing else self._offered(seen, rule, record)
        except HostError as error:
            offered, why, seen = frozenset[int](), str(error), None
        if why:
            self.faults.append(why)
        queues = record.queues if record is not None else rule.queues if rule is not None else ()
        held = {one.slot for one in record.held} if record is not None else set()
        for slot, queue in enumerate(queues):
            if slot in offered or slot in held:
                yield _slot(function, seen.name if seen is not None else name, slot, queue)

    def _read(self, address: str, name: str, record: Division | None) -> tuple[Accelerator, Division | None, bool]:
        """Return an accelerator, the record by which it is to be judged, and whether it cannot be: the agent changes it
        all the time. record: from before. Raise HostError."""
        for left in reversed(range(LOOKS)):
            seen, before, record = self._accelerators.read(address, name), record, self._selector.divided().get(address)
            if record == before and not (left and _may_be_torn(seen, record)):
                return seen, in_force(record, seen), False
        return seen, record, True

    def _offered(self, seen: Accelerator, rule: Rule | None, record: Division | None) -> tuple[frozenset[int], str]:
        """Return the slots that could be made now, and why others could not, or ""."""
        if why := self._accelerators.why_read_only(seen):
            return frozenset(), why
        if record is None:
            queues: tuple[Queue, ...] = rule.queues if rule is not None else ()
            why = taken(seen) or unfit(seen, queues)
            return frozenset(range(len(queues))) if not why else frozenset(), why
        if why := differs(seen, record):
            return frozenset(), why
        if rule is None:
            return frozenset(), ""
        if rule.queues != record.queues:
            return frozenset(), f"{seen.name} is divided as configured once its queues are released"
        there = frozenset(slot for slot in range(len(rule.queues)) if not record.ready or seen.wqs[slot].size)
        return there, ""


def _may_be_torn(seen: Accelerator, record: Division | None) -> bool:
    """Return whether an accelerator may have been read while a queue of it was half made: file by file."""
    is_changing = record is not None and any(one.step in CHANGING for one in record.held)
    return record is not None and is_changing and bool(differs(seen, record))


def _unjudged(rule: Rule | None, record: Division | None) -> tuple[frozenset[int], str]:
    """Return what is offered of an accelerator that the agent is just changing: what is configured."""
    fits = rule is not None and (record is None or record.queues == rule.queues)
    return frozenset(range(len(rule.queues))) if rule is not None and fits else frozenset(), ""


def _slot(function: Function, name: str, slot: int, queue: Queue) -> Device:
    attributes: dict[str, str | int | bool] = {
        "slot": slot,
        "mode": DEDICATED,
        "size": queue.size,
        "priority": queue.priority,
    }
    if name:
        attributes |= {"accelerator": name, "device_type": _TYPES.get(name.rstrip("0123456789"), name)}
    return part_of(function, kind=KIND, id=device_id(function.address, slot, queue), paths=(), attributes=attributes)
