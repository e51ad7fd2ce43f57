"""Makes work queues for claims and takes them down, each step recorded before it is taken. Blocks.

Every step looks at what is there, so that after a crash at any point the same call completes what it had begun. An
accelerator is divided for the first claim and is as it was after the last; what is not exactly as recorded is left
alone, and stays recorded until it is again, or is not configured at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.core.dsa.division import (
    DEDICATED,
    ENABLED,
    GROUP,
    IDXD,
    NO_GROUP,
    NO_TYPE,
    SHARED,
    USER,
    Accelerator,
    Division,
    Held,
    Queue,
    differs,
    in_force,
    is_made,
    label,
    taken,
    unfit,
)
from nodeagent.core.model.device import ContainerEdits
from nodeagent.errors import HostError
from nodeagent.host.devices.base import nodes
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.managers.dsa.journal import DsaJournal

Place = tuple[str, int]
"""The address of an accelerator, and a slot."""
log = structlog.get_logger()


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A slot as a claim wants it made. queues: what the accelerator is divided into."""

    address: str
    slot: int
    claim: str
    grant: str
    queues: tuple[Queue, ...]

    @property
    def what(self) -> str:
        """Return it as errors call it."""
        return f"cannot make queue {self.slot} of {self.address}"


class QueueKeeper:
    """One caller at a time, on the node too."""

    def __init__(self, journal: DsaJournal, accelerators: Accelerators) -> None:
        self._journal = journal
        self._accelerators = accelerators

    def records(self) -> Mapping[str, Division]:
        """Return what is recorded, by address. Raise HostError if it cannot be read for the moment."""
        return self._journal.read(certain=True)

    # ---------------------------------------------------------------- for a claim

    def make(self, wanted: Wanted) -> bool:
        """Have a slot made a queue for a claim. Return whether anything was changed. Raise HostError; what was begun in
        this call is undone, as far as it can be."""
        seen = self._found(wanted)
        record = in_force(self.records().get(wanted.address), seen)
        held = record.of(wanted.slot) if record is not None else None
        if held is not None and held.claim != wanted.claim:
            raise HostError(f"{wanted.what}: what was made for claim {held.claim} is not taken down yet")
        if why := self._why_not(wanted, record, seen):
            raise HostError(f"{wanted.what}: {why}")
        is_its_own = held is not None and held.grant == wanted.grant and held.edits is not None
        if record is not None and is_its_own and _has(seen, record, wanted.slot):
            return False
        record = record or Division(address=wanted.address, queues=wanted.queues)
        record = self._kept(record, Held(slot=wanted.slot, claim=wanted.claim, grant=wanted.grant))
        try:
            self._enable(wanted, record)
        except HostError as error:
            left = self.take_down([(wanted.address, wanted.slot)])
            raise HostError("; ".join([f"{wanted.what}: {error}", *left.values()])) from None
        log.info("dsa-queue-made", device=wanted.address, slot=wanted.slot, claim=wanted.claim)
        return True

    def _found(self, wanted: Wanted) -> Accelerator:
        seen = self._accelerators.find(wanted.address)
        if seen is None:
            raise HostError(f"{wanted.what}: the driver {IDXD} does not have it")
        return seen

    def _why_not(self, wanted: Wanted, record: Division | None, seen: Accelerator) -> str:
        if record is None:
            enqcmd = self._accelerators.has_enqcmd()
            return taken(seen) or unfit(seen, wanted.queues, enqcmd=enqcmd)
        if record.queues != wanted.queues:
            return f"{seen.name} is still divided as it was configured before"
        if why := differs(seen, record):
            return why
        if record.ready and not seen.wqs[wanted.slot].size:
            return f"the kernel has cleared its size; all queues of {seen.name} have to be released first"
        return ""

    def _kept(self, record: Division, held: Held) -> Division:
        """Record a holder. Durable on return."""
        others = (one for one in record.held if one.slot != held.slot)
        return self._keep(replace(record, held=tuple(sorted((*others, held), key=lambda one: one.slot))))

    def _keep(self, record: Division) -> Division:
        self._journal.keep({record.address: record})
        return record

    def _enable(self, wanted: Wanted, record: Division) -> None:
        seen = self._found(wanted)
        if not seen.driver:
            self._lay_out(seen, record)
        self._quieten(seen, record)
        self._configure(self._found(wanted), wanted.slot, record.queues[wanted.slot])
        if not seen.driver:
            self._accelerators.bind(seen, seen.name, IDXD)
        seen = self._found(wanted)
        if why := differs(seen, replace(record, ready=True)):
            raise HostError(why)
        if not record.ready:
            record = self._keep(replace(record, ready=True))
        wq = seen.wqs[wanted.slot]
        if not wq.driver:
            self._accelerators.bind(seen, wq.name, USER)
        if not is_made(self._found(wanted).wqs[wanted.slot], wanted.slot, record.queues[wanted.slot]):
            raise HostError(f"the kernel took it, and {wq.name} is something else")
        paths = [self._accelerators.node(seen, wq.name)]
        edits = ContainerEdits(device_nodes=nodes(paths))
        self._kept(record, Held(slot=wanted.slot, claim=wanted.claim, grant=wanted.grant, edits=edits))

    def _lay_out(self, seen: Accelerator, record: Division) -> None:
        """Give engines and queues what they can have only as long as the accelerator is disabled."""
        for index, group in enumerate(seen.engines):
            if group != GROUP:
                self._accelerators.set(seen, _engine(seen, index), "group_id", GROUP)
        for one, queue in zip(seen.wqs, record.queues, strict=False):
            if one.size != queue.size:
                self._accelerators.set(seen, one.name, "size", queue.size)
            if one.group != GROUP:
                self._accelerators.set(seen, one.name, "group_id", GROUP)

    def _quieten(self, seen: Accelerator, record: Division) -> None:
        """Leave no queue in shared mode without a type: with one, the kernel enables no other."""
        for one in seen.wqs[: len(record.queues)]:
            if one.type == NO_TYPE and one.mode != DEDICATED:
                self._accelerators.set(seen, one.name, "mode", DEDICATED)

    def _configure(self, seen: Accelerator, slot: int, queue: Queue) -> None:
        """Give a queue that is disabled all that is left, its name after its type, which would clear it."""
        one = seen.wqs[slot]
        if one.driver:
            return
        set_one = self._accelerators.set
        if one.type != USER:
            set_one(seen, one.name, "type", USER)
        if one.label != label(slot):
            set_one(seen, one.name, "name", label(slot))
        if one.mode != queue.mode:
            set_one(seen, one.name, "mode", queue.mode)
        if queue.mode == SHARED and one.threshold != queue.threshold:
            set_one(seen, one.name, "threshold", queue.threshold)
        if one.priority != queue.priority:
            set_one(seen, one.name, "priority", queue.priority)
        if self._accelerators.has(seen, one.name, "driver_name"):
            set_one(seen, one.name, "driver_name", USER)

    # ---------------------------------------------------------------- back

    def take_down(self, places: Collection[Place]) -> dict[Place, str]:
        """Take down the queues of some slots, and with the last of an accelerator its division. Return, by slot, why
        one is not."""
        errors: dict[Place, str] = {}
        for address, slot in places:
            try:
                self._take_down(address, slot)
            except HostError as error:
                errors[address, slot] = str(error)
        return errors

    def _take_down(self, address: str, slot: int) -> None:
        record = self.records().get(address)
        held = record.of(slot) if record is not None else None
        if record is None or held is None:
            return
        seen = self._accelerators.find(address)
        if seen is not None and slot < len(seen.wqs):
            one = seen.wqs[slot]
            if one.clients and _has(seen, record, slot):
                raise HostError(f"cannot disable {one.name}: {one.clients} programs have it open")
            if held.edits is not None:  # from here on it is not made, whatever happens
                record = self._kept(record, replace(held, edits=None))
            self._disable(seen, record, slot)
        record = self._keep(replace(record, held=tuple(one for one in record.held if one.slot != slot)))
        log.info("dsa-queue-taken-down", device=address, slot=slot)
        if not record.held:
            self._end(record)

    def _disable(self, seen: Accelerator, record: Division, slot: int) -> None:
        """Disable a queue, if it is the agent's. Raise HostError."""
        one = seen.wqs[slot]
        if one.driver and _has(seen, record, slot):
            self._accelerators.unbind(seen, one.name, USER)
            one = self._again(seen.address).wqs[slot]
            if one.driver:
                raise HostError(f"cannot disable {one.name}: the kernel took it, and it is enabled")
        elif why := differs(seen, record):  # what is not enabled is the agent's only as a part of what it laid out
            log.warning("dsa-queue-left", device=seen.address, slot=slot, why=why)
            return
        if one.priority:
            self._accelerators.set(seen, one.name, "priority", 0)
        if one.mode != DEDICATED and not one.is_blank:
            self._accelerators.set(seen, one.name, "mode", DEDICATED)
        if one.type != NO_TYPE:
            self._accelerators.set(seen, one.name, "type", NO_TYPE)
        if self._accelerators.has(seen, one.name, "driver_name"):
            with contextlib.suppress(HostError):  # it has no meaning without a type
                self._accelerators.set(seen, one.name, "driver_name", "\n")

    def _again(self, address: str) -> Accelerator:
        seen = self._accelerators.find(address)
        if seen is None:
            raise HostError(f"cannot read {address}: it is gone")
        return seen

    def end(self) -> dict[str, str]:
        """Undo divisions of which no slot is held. Return, by address, why one stays."""
        left: dict[str, str] = {}
        for address, record in self.records().items():
            if not record.held:
                try:
                    if why := self._end(record):
                        left[address] = why
                except HostError as error:
                    left[address] = str(error)
        return left

    def _end(self, record: Division) -> str:
        """Have an accelerator that nothing holds as it was. Return why it is left alone, or "". Raise HostError."""
        seen = self._accelerators.find(record.address)
        if seen is not None and in_force(record, seen) is not None:
            if why := differs(seen, record):
                log.warning("accelerator-left", device=record.address, why=why)
                return f"{record.address} stays divided: {why}"
            if seen.driver:
                self._accelerators.unbind(seen, seen.name, IDXD)
            else:
                self._blank(seen, len(record.queues))
            seen = self._accelerators.find(record.address)
            if seen is not None and (why := taken(seen)):
                raise HostError(f"cannot undo the division of {record.address}: {why}")
        self._journal.forget(record.address)
        log.info("accelerator-given-back", device=record.address)
        return ""

    def _blank(self, seen: Accelerator, count: int) -> None:
        """Undo what was laid out of an accelerator that was not enabled."""
        for one in seen.wqs[:count]:
            if one.size:
                self._accelerators.set(seen, one.name, "size", 0)
            if one.group != NO_GROUP:
                self._accelerators.set(seen, one.name, "group_id", NO_GROUP)
            if one.mode != SHARED:
                self._accelerators.set(seen, one.name, "mode", SHARED)
        for index, group in enumerate(seen.engines):
            if group != NO_GROUP:
                self._accelerators.set(seen, _engine(seen, index), "group_id", NO_GROUP)

    def orphans(self, held: Mapping[str, Collection[Place]]) -> list[Place]:
        """Return the slots that are recorded although their grant does not hold them. held: slots by Grant.id."""
        every = ((address, one) for address, record in self.records().items() for one in record.held)
        return [(address, one.slot) for address, one in every if (address, one.slot) not in held.get(one.grant, ())]

    def faults(self) -> Mapping[Place, str]:
        """Return, for each slot that is held, why its queue is not as it was made, or "". One that is about to be made
        or taken down, or cannot be read for the moment, is left out."""
        found: dict[Place, str] = {}
        for address, record in self.records().items():
            with contextlib.suppress(HostError):
                seen = self._accelerators.find(address)
                for one in record.held:
                    if (why := _fault(seen, record, one)) is not None:
                        found[address, one.slot] = why
        return found

    def forget_changed(self) -> bool:
        """Record of queues that are not as they were made any longer that containers get nothing of them: another
        program may have them by now. Return whether there was any. Raise HostError."""
        changed = False
        for address, record in self.records().items():
            seen = self._accelerators.find(address)
            for one in (one for one in record.held if one.edits is not None):
                if seen is None or not _has(seen, record, one.slot):
                    record, changed = self._kept(record, replace(one, edits=None)), True
        return changed


def _has(seen: Accelerator, record: Division, slot: int) -> bool:
    """Return whether an accelerator has the queue of a slot as it was made."""
    return slot < len(seen.wqs) and is_made(seen.wqs[slot], slot, record.queues[slot])


def _fault(seen: Accelerator | None, record: Division, held: Held) -> str | None:
    """Return why the queue of a slot is not as it was made, "", or None if nothing can be said of it."""
    if seen is None:
        return f"the driver {IDXD} no longer has {record.address}"
    if held.edits is None:
        return differs(seen, record) or None
    if seen.state != ENABLED:
        return f"accelerator {seen.name} is {seen.state}"
    if not _has(seen, record, held.slot):
        return f"queue {held.slot} of {seen.name} was disabled or changed by another program"
    return ""


def _engine(seen: Accelerator, index: int) -> str:
    return f"engine{seen.name[len(seen.node_folder) :]}.{index}"
