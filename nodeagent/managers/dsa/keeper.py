"""Makes work queues for claims and takes them down, each step recorded before it is taken. Blocks.

Every step looks at what is there, so that after a crash at any point the same call completes what it had begun. An
accelerator is divided for the first claim and is as it was after the last; what is not exactly as recorded is left
alone, and is forgotten once nothing of it is held and no queue of it has a name that the agent gave.

A record takes as long as the disk does, and an admin may act meanwhile. So after a record that something is about to be
changed the accelerator is looked at again, and judged by what was recorded before it.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import structlog
from msgspec.structs import replace

from nodeagent.core.dsa.division import (
    DEDICATED,
    ENABLED,
    GROUP,
    HALTED,
    IDXD,
    NO_GROUP,
    NO_TYPE,
    NONCE_BYTES,
    SHARED,
    USER,
    Accelerator,
    Division,
    Held,
    Step,
    Wq,
    differs,
    in_force,
    is_configured,
    is_idle,
    is_laid_out,
    is_up,
    still_bound,
    taken,
    unfit,
    why_not_own,
)
from nodeagent.core.model.device import ContainerEdits
from nodeagent.errors import HostError
from nodeagent.host.devices.base import nodes
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.wanted import Place, Wanted

NOTHING = "\n"
"""What clears a text of a queue: the kernel refuses to be given nothing at all."""
BLINK_S, LOOKS = 0.05, 3
"""A program that opens a dedicated queue disables it for a moment: one that is disabled at all of so many looks, so far
apart, is disabled."""
log = structlog.get_logger()


class QueueKeeper:
    """One caller at a time, on the node too."""

    def __init__(
        self, journal: DsaJournal, accelerators: Accelerators, wait: Callable[[float], object] = time.sleep
    ) -> None:
        """wait: passes some seconds between two looks."""
        self._journal = journal
        self._accelerators = accelerators
        self._wait = wait
        self._stuck: dict[Place, str] = {}
        """Why a slot could not be taken down when that was tried last."""
        self._enabled: set[str] = set()
        """Addresses of accelerators that the current call of make() has enabled, and no other program."""
        self.is_to_hide = False
        """Whether containers may still get a queue that forget_changed() has found to be lost."""

    def records(self) -> Mapping[str, Division]:
        """Return what is recorded, by address. Raise HostError if it cannot be read for the moment."""
        return self._journal.read(certain=True)

    def has_any(self) -> bool:
        """Return whether anything is recorded, of an earlier boot too. Raise HostError as records() does."""
        return bool(self.records()) or self._journal.is_of_earlier_boot()

    def _find(self, address: str) -> Accelerator | None:
        """Return an accelerator, or None if no driver has it. A queue that is enabled shows itself so, even if a
        program is opening it. Raise HostError."""
        seen = self._accelerators.find(address)
        for _ in range(LOOKS - 1):
            if seen is None or not any(one.driver and one.state != ENABLED for one in seen.wqs):
                break
            self._wait(BLINK_S)
            seen = self._accelerators.find(address)
        return seen

    # ---------------------------------------------------------------- for a claim

    def make(self, wanted: Wanted) -> bool:
        """Have a slot made a queue for a claim. Return whether anything was changed. Raise HostError; what was begun in
        this call is undone, as far as it can be."""
        with contextlib.suppress(HostError):  # of an accelerator that cannot be read no node is handed over twice
            self.forget_changed()
        seen = self._found(wanted)
        before = in_force(self.records().get(wanted.address), seen)
        held = before.of(wanted.slot) if before is not None else None
        if held is not None and held.claim != wanted.claim:
            raise HostError(f"{wanted.what}: what was made for claim {held.claim} is not taken down yet")
        is_its_own = held is not None and held.grant == wanted.grant and held.step is Step.MADE
        if before is not None and is_its_own and is_up(seen, before, wanted.slot):
            self._stuck.pop(wanted.place, None)
            return False
        self._check(wanted, before, seen)
        record = self._kept(before or _division(wanted, seen), wanted.held())
        try:
            seen = self._found(wanted)
            self._check(wanted, before, seen)
        except HostError:
            self._restore(wanted.address, before)
            raise
        self._enabled.clear()
        try:
            self._enable(wanted, record, seen)
        except HostError as error:
            left = self._take_down_all([wanted.place], is_laid_out=not seen.driver)
            raise HostError("; ".join([f"{wanted.what}: {error}", *left.values()])) from None
        self._stuck.pop(wanted.place, None)
        log.info("dsa-queue-made", device=wanted.address, slot=wanted.slot, claim=wanted.claim)
        return True

    def _found(self, wanted: Wanted) -> Accelerator:
        seen = self._find(wanted.address)
        if seen is None:
            raise HostError(f"{wanted.what}: the driver {IDXD} does not have it")
        return seen

    def _check(self, wanted: Wanted, record: Division | None, seen: Accelerator) -> None:
        """Raise HostError if a slot cannot be made a queue. record: of before it was to be made."""
        if why := self._why_not(wanted, record, seen):
            raise HostError(f"{wanted.what}: {why}")

    def _why_not(self, wanted: Wanted, record: Division | None, seen: Accelerator) -> str:
        if record is None:
            return taken(seen) or unfit(seen, wanted.queues)
        if record.queues != wanted.queues:
            return f"{seen.name} is still divided as it was configured before"
        if why := differs(seen, record):
            return why
        if record.ready and not seen.wqs[wanted.slot].size:
            return f"the kernel has cleared its size; all queues of {seen.name} have to be released first"
        one = seen.wqs[wanted.slot]
        if one.driver and one.clients and not is_up(seen, record, wanted.slot):
            return f"{one.name} was disabled or changed, and {one.clients} programs have it open"
        return ""

    def _kept(self, record: Division, held: Held) -> Division:
        """Record a holder. Durable on return."""
        others = (one for one in record.held if one.slot != held.slot)
        return self._keep(replace(record, held=tuple(sorted((*others, held), key=lambda one: one.slot))))

    def _keep(self, record: Division) -> Division:
        self._journal.keep({record.address: record})
        return record

    def _restore(self, address: str, before: Division | None) -> None:
        """Record what was recorded before, as nothing was changed."""
        with contextlib.suppress(HostError):  # then it is taken down later, which finds nothing to do
            if before is None:
                self._journal.forget(address)
            else:
                self._keep(before)

    def _enable(self, wanted: Wanted, record: Division, seen: Accelerator) -> None:
        slot, name = wanted.slot, seen.wqs[wanted.slot].name
        if seen.wqs[slot].driver and not is_up(seen, record, slot):
            self._disable(seen, record, slot)
            seen = self._as_recorded(wanted, record)
        if not seen.driver:
            self._lay_out(seen, record)
        self._quieten(seen, record)
        self._configure(self._as_recorded(wanted, record), record, slot)
        seen = self._as_configured(wanted, record)
        if not seen.driver:
            if not is_laid_out(seen, record):
                raise HostError(f"{seen.name} was configured by another program meanwhile")
            self._accelerators.bind(seen, seen.name, IDXD)
            self._enabled.add(seen.address)
        if not record.ready:
            self._as_configured(wanted, replace(record, ready=True))
            record = self._keep(replace(record, ready=True))
        seen = self._as_configured(wanted, record)
        self._check_node(wanted, seen.node_of(name))
        if not seen.wqs[slot].driver:
            self._accelerators.bind(seen, name, USER)
        if not is_up(self._found(wanted), record, slot):
            raise HostError(f"the kernel took it, and {name} is something else, or disabled")
        edits = ContainerEdits(device_nodes=nodes([self._accelerators.node(seen, name)]))
        self._kept(record, replace(wanted.held(), step=Step.MADE, edits=edits))

    def _as_recorded(self, wanted: Wanted, record: Division) -> Accelerator:
        seen = self._found(wanted)
        if why := differs(seen, record):
            raise HostError(why)
        return seen

    def _as_configured(self, wanted: Wanted, record: Division) -> Accelerator:
        """Return the accelerator as it is right before something of it is enabled. Raise HostError if another program
        has changed it since it was configured, the queue that is being made too."""
        seen = self._as_recorded(wanted, record)
        if not is_configured(seen.wqs[wanted.slot], wanted.slot, record):
            raise HostError(f"{seen.wqs[wanted.slot].name} was configured by another program meanwhile")
        return seen

    def _check_node(self, wanted: Wanted, path: str) -> None:
        """Raise HostError if containers of another claim get a node: names of accelerators are used again."""
        every = ((address, one) for address, record in self.records().items() for one in record.held)
        for address, one in every:
            paths = [node.host_path for node in one.edits.device_nodes] if one.edits is not None else []
            if path in paths and (address, one.slot) != wanted.place:
                raise HostError(f"{path} is still recorded as queue {one.slot} of {address}, for claim {one.claim}")

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

    def _configure(self, seen: Accelerator, record: Division, slot: int) -> None:
        """Give a queue that is disabled all that is left, its name after its type, which would clear it."""
        one, queue = seen.wqs[slot], record.queues[slot]
        if one.driver:
            return
        set_one = self._accelerators.set
        if one.type != USER:
            set_one(seen, one.name, "type", USER)
        if one.type != USER or one.label != record.label(slot):
            set_one(seen, one.name, "name", record.label(slot))
        if one.mode != DEDICATED:
            set_one(seen, one.name, "mode", DEDICATED)
        if one.priority != queue.priority:
            set_one(seen, one.name, "priority", queue.priority)
        if self._accelerators.has(seen, one.name, "driver_name"):
            set_one(seen, one.name, "driver_name", USER)

    # ---------------------------------------------------------------- back

    def take_down(self, places: Collection[Place]) -> dict[Place, str]:
        """Take down the queues of some slots, and with the last of an accelerator its division. Return, by slot, why
        one is not."""
        return self._take_down_all(places, is_laid_out=False)

    def _take_down_all(self, places: Collection[Place], *, is_laid_out: bool) -> dict[Place, str]:
        """is_laid_out: whether it was disabled when this call began, which may have laid it out since."""
        errors: dict[Place, str] = {}
        for address, slot in places:
            try:
                self._take_down(address, slot, is_laid_out=is_laid_out)
                self._stuck.pop((address, slot), None)
            except HostError as error:
                errors[address, slot] = self._stuck[address, slot] = str(error)
        return errors

    def _take_down(self, address: str, slot: int, *, is_laid_out: bool) -> None:
        before = self.records().get(address)
        held = before.of(slot) if before is not None else None
        if before is None or held is None:
            return
        record, seen = before, self._find(address)
        if seen is not None and self._is_own(seen, before, slot):
            _check_closed(seen, slot)
            if held.step in (Step.MADE, Step.LOST):  # from here on it is not made, whatever happens
                record = self._kept(before, replace(held, step=Step.ENDING, edits=None))
            seen = self._find(address)
            if seen is not None and self._is_own(seen, before, slot):
                _check_closed(seen, slot)
                self._disable(seen, record, slot)
        if is_laid_out:
            record = self._withdraw(record)
        record = self._keep(replace(record, held=tuple(one for one in record.held if one.slot != slot)))
        log.info("dsa-queue-taken-down", device=address, slot=slot)
        if not record.held:
            self._end(record)

    def _withdraw(self, record: Division) -> Division:
        """Undo what this call has enabled and laid out of an accelerator that another program has begun to configure
        meanwhile: nothing would be recorded of it. Another's queue that is enabled keeps it enabled. Return what is
        recorded. Raise HostError."""
        seen = self._find(record.address)
        if seen is None or seen.state == HALTED or not (why := differs(seen, record)):
            return record
        if seen.address in self._enabled and not _has_queues(seen):
            record = self._keep(replace(record, ready=False))
            seen = self._again(record.address)
            if seen.driver == IDXD and not _has_queues(seen):
                log.warning("accelerator-disabled-again", device=seen.address, why=why)
                self._accelerators.unbind(seen, seen.name, IDXD)
                seen = self._again(record.address)
        if seen.driver:
            return record
        mine = [one for slot, one in enumerate(seen.wqs[: len(record.queues)]) if is_idle(one, slot, record)]
        others = any(one.group != NO_GROUP for one in seen.wqs if one not in mine)  # which need an engine
        engines = () if others else [index for index, group in enumerate(seen.engines) if group == GROUP]
        self._blank(seen, mine, engines)
        return record

    def _is_own(self, seen: Accelerator, record: Division, slot: int) -> bool:
        if why := why_not_own(seen, record, slot):
            log.warning("dsa-queue-left", device=seen.address, slot=slot, why=why)
        return not why

    def _disable(self, seen: Accelerator, record: Division, slot: int) -> None:
        """Disable a queue that is the agent's, and clear what the kernel does not clear: if it was not enabled, or
        could not be, that is all but its type. Raise HostError."""
        one = seen.wqs[slot]
        if one.driver:
            self._accelerators.unbind(seen, one.name, USER)
            seen = self._again(seen.address)
            one = seen.wqs[slot]
            if one.driver:
                raise HostError(f"cannot disable {one.name}: the kernel took it, and it is enabled")
            if not self._is_own(seen, record, slot):
                return
        if one.priority:
            self._accelerators.set(seen, one.name, "priority", 0)
        if one.mode != DEDICATED and not one.is_blank:
            self._accelerators.set(seen, one.name, "mode", DEDICATED)
        if one.type != NO_TYPE:
            self._accelerators.set(seen, one.name, "type", NO_TYPE)
        if one.label:
            self._accelerators.set(seen, one.name, "name", NOTHING)
        if one.driver_name:
            with contextlib.suppress(HostError):  # it has no meaning without a type
                self._accelerators.set(seen, one.name, "driver_name", NOTHING)

    def _again(self, address: str) -> Accelerator:
        seen = self._find(address)
        if seen is None:
            raise HostError(f"cannot read {address}: it is gone")
        return seen

    def end(self) -> dict[str, str]:
        """Undo divisions of which no slot is held, and remove records of an earlier boot. Return, by address, why one
        stays. Raise HostError."""
        left: dict[str, str] = {}
        for address, record in self.records().items():
            if not record.held:
                try:
                    if why := self._end(record):
                        left[address] = why
                except HostError as error:
                    left[address] = str(error)
        if self._journal.is_of_earlier_boot():
            self._journal.forget()
        return left

    def _end(self, record: Division) -> str:
        """Have an accelerator that nothing holds as it was. Return why it is left alone, or "". Raise HostError."""
        seen = self._find(record.address)
        if seen is not None and in_force(record, seen) is not None:
            if why := differs(seen, record):
                return f"{record.address} stays divided: {why}"
            if seen.driver:  # an older kernel leaves sizes and groups of queues that are disabled
                undone = self._keep(replace(record, ready=False))
                seen = self._again(record.address)
                if why := differs(seen, record):
                    raise HostError(f"cannot disable {seen.name}: {why}")
                self._accelerators.unbind(seen, seen.name, IDXD)
                seen = self._again(record.address)
                if why := differs(seen, undone):
                    raise HostError(f"cannot undo the division of {record.address}: {why}")
            self._blank(seen, seen.wqs[: len(record.queues)], range(len(seen.engines)))
            seen = self._find(record.address)
            if seen is not None and (why := taken(seen)):
                raise HostError(f"cannot undo the division of {record.address}: {why}")
        self._journal.forget(record.address)
        log.info("accelerator-given-back", device=record.address)
        return ""

    def _blank(self, seen: Accelerator, wqs: Sequence[Wq], engines: Iterable[int]) -> None:
        """Undo what was laid out of an accelerator that was not enabled."""
        for one in wqs:
            if one.size:
                self._accelerators.set(seen, one.name, "size", 0)
            if one.group != NO_GROUP:
                self._accelerators.set(seen, one.name, "group_id", NO_GROUP)
            if one.mode != SHARED:
                self._accelerators.set(seen, one.name, "mode", SHARED)
        for index in engines:
            if seen.engines[index] != NO_GROUP:
                self._accelerators.set(seen, _engine(seen, index), "group_id", NO_GROUP)

    def orphans(self, held: Mapping[str, Collection[Place]]) -> list[Place]:
        """Return the slots that are recorded although their grant does not hold them. held: slots by Grant.id."""
        every = ((address, one) for address, record in self.records().items() for one in record.held)
        return [(address, one.slot) for address, one in every if (address, one.slot) not in held.get(one.grant, ())]

    def faults(self) -> Mapping[Place, str | None]:
        """Return, for each slot that is held, why its queue is not as it was made, or could not be taken down, or "";
        None if that cannot be read for the moment. One that is about to be made or taken down is left out. What is
        known already takes no look at the accelerator."""
        found: dict[Place, str | None] = {}
        for address, record in self.records().items():
            seen, is_read = None, True
            try:
                seen = self._find(address)
            except HostError:
                is_read = False
            for one in record.held:
                why = _fault(seen, record, one) if is_read or one.step is Step.LOST else ""
                why = why or self._stuck.get((address, one.slot), "")
                if why or one.step is Step.MADE or not is_read:
                    found[address, one.slot] = why if why or is_read else None
        return found

    def forget_changed(self) -> bool:
        """Record of queues that are no longer as they were made that they are lost, and containers get nothing of them:
        another program may have them by now. They stay so until they are made again or released. Return whether there
        was any; `is_to_hide` then is set. Raise HostError, after those that can be read."""
        changed, errors = False, []
        for address, record in self.records().items():
            try:
                seen = self._find(address)
            except HostError as error:
                errors.append(error)
                continue
            for one in record.held:
                if one.step is Step.MADE and (seen is None or not is_up(seen, record, one.slot)):
                    why = _fault(seen, record, one)
                    record = self._kept(record, replace(one, step=Step.LOST, edits=None, why=why))
                    changed = self.is_to_hide = True
        if errors:
            raise errors[0]
        return changed


def _division(wanted: Wanted, seen: Accelerator) -> Division:
    """Return what is recorded of an accelerator before it is divided."""
    defaults = seen.wqs[0].more.defaults
    return Division(
        address=wanted.address, nonce=secrets.token_hex(NONCE_BYTES), queues=wanted.queues, defaults=defaults
    )


def _has_queues(seen: Accelerator) -> bool:
    """Return whether a queue of an accelerator is enabled."""
    return any(one.driver for one in seen.wqs)


def _check_closed(seen: Accelerator, slot: int) -> None:
    """Raise HostError if a program has a queue open."""
    one = seen.wqs[slot]
    if one.driver and one.clients:
        raise HostError(f"cannot disable {one.name}: {one.clients} programs have it open")


def _fault(seen: Accelerator | None, record: Division, held: Held) -> str:
    """Return why the queue of a slot is not as it was made, or "" if it is, or nothing can be said of it."""
    if held.step is Step.LOST:
        return held.why
    if seen is None:
        return f"the driver {IDXD} no longer has {record.address}"
    if held.step is not Step.MADE:
        return differs(seen, record)
    if seen.state != ENABLED:
        return still_bound(seen) or f"accelerator {seen.name} is {seen.state}"
    if not is_up(seen, record, held.slot):
        return f"queue {held.slot} of {seen.name} was disabled or changed by another program"
    return ""


def _engine(seen: Accelerator, index: int) -> str:
    return f"engine{seen.name[len(seen.node_folder) :]}.{index}"
