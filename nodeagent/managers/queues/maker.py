"""Enables work queues for claims and disables them, each step recorded before it is taken. Blocks.

Every step looks at what is there, so that after a crash at any point the same call completes what it had begun. An
accelerator is laid out and enabled with its first recorded queue and disabled with its last; one on which others have
configured anything is never touched, and of an enabled one no queue but those that are recorded.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.core.queues.layout import DISABLED, ENABLED, OWN, Layout
from nodeagent.core.queues.settings import Queue
from nodeagent.errors import HostError
from nodeagent.host.idxd import Accelerators, first_of_others, node_of
from nodeagent.managers.queues.journal import Enabled, QueueJournal

NODE_S, POLL_S = 3.0, 0.02
"""How long udev may take to make the node of a queue."""
_UNTOUCHED = Layout()
"""What the kernel makes of an accelerator."""
log = structlog.get_logger()


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as a claim wants it."""

    device: str
    claim: str
    grant: str
    address: str
    accelerator: str
    queue: str
    wanted: Queue
    layout: Layout


class QueueMaker:
    """One caller at a time, on the node too."""

    def __init__(self, journal: QueueJournal, accelerators: Accelerators, *, node_s: float = NODE_S) -> None:
        """node_s: how long a node may take to appear."""
        self._journal = journal
        self._accelerators = accelerators
        self._node_s = node_s

    def records(self) -> Mapping[str, Enabled]:
        """Return what is recorded, by device."""
        return self._journal.read()

    def stands(self, record: Enabled) -> bool:
        """Return whether a recorded queue is enabled, under the name that it was given."""
        if self._accelerators.address(record.accelerator) != record.address:
            return False
        now = self._accelerators.queue(record.queue)
        return (now.state, now.name) == (ENABLED, record.name)

    # ---------------------------------------------------------------- for a claim

    def has(self, device: str, grant: str) -> bool:
        """Return whether a queue is enabled for a grant, as it was recorded."""
        record = self._journal.read().get(device)
        return record is not None and record.ready and record.grant == grant and self.stands(record)

    def make(self, wanted: Wanted) -> bool:
        """Have a queue enabled for a claim. Return whether anything was changed. Raise HostError; what was begun in
        this call is undone, as far as it can be. What an earlier call has enabled for the same grant is kept, whatever
        is configured now: programs may use it."""
        record = self._journal.read().get(wanted.device)
        if record is not None and record.claim != wanted.claim:
            raise HostError(f"cannot enable {wanted.queue}: it is still enabled for claim {record.claim}")
        if self.has(wanted.device, wanted.grant):
            return False
        if record is not None and (record.ready or record.lost or record.grant != wanted.grant):
            self._end(record)
            record = None
        if record is None:
            record = self._recorded(wanted)
        try:
            self._enable(record)
        except HostError as error:
            left = self.give_back([wanted.device])
            raise HostError("; ".join([str(error), *left.values()])) from None
        log.info("queue-enabled", device=record.device, queue=record.queue, claim=record.claim)
        return True

    def _recorded(self, wanted: Wanted) -> Enabled:
        """Record a queue that is about to be enabled. Raise HostError if its accelerator is not the agent's."""
        accelerator = wanted.accelerator
        if self._accelerators.address(accelerator) != wanted.address:
            raise HostError(f"cannot enable {wanted.queue}: {accelerator} is not at {wanted.address} any longer")
        if not self._others(accelerator, wanted.device):
            self._refuse_others(wanted.queue, accelerator, _UNTOUCHED)
            state = self._accelerators.state(accelerator)
            if state != DISABLED:
                raise HostError(f"cannot enable {wanted.queue}: {accelerator} is {state}, and not by this agent")
        record = Enabled(
            device=wanted.device,
            claim=wanted.claim,
            grant=wanted.grant,
            address=wanted.address,
            accelerator=accelerator,
            queue=wanted.queue,
            name=f"{OWN}{wanted.claim}",
            wanted=wanted.wanted,
            layout=wanted.layout,
        )
        self._journal.keep({record.device: record})
        return record

    def _others(self, accelerator: str, device: str) -> list[Enabled]:
        """Return what is recorded of the other queues of an accelerator."""
        every = self._journal.read().values()
        return [one for one in every if one.accelerator == accelerator and one.device != device]

    def _refuse_others(self, queue: str, accelerator: str, layout: Layout) -> None:
        """Raise HostError if anything but what a layout may have left is configured of an accelerator."""
        stranger = first_of_others(self._accelerators.queues(accelerator)) or accelerator
        if not self._accelerators.is_within(accelerator, layout):
            raise HostError(f"cannot enable {queue}: another program has configured {stranger}")

    def _enable(self, record: Enabled) -> None:
        accelerator, queue = record.accelerator, record.queue
        state = self._accelerators.state(accelerator)
        if state == DISABLED:
            self._refuse_others(queue, accelerator, record.layout)
            self._accelerators.lay_out(accelerator, record.layout)
            self._accelerators.enable(accelerator)
        elif state != ENABLED:
            raise HostError(f"cannot enable {queue}: {accelerator} is {state or 'gone'}")
        now = self._accelerators.queue(queue)
        slot = record.layout.slot(now.number)
        if slot is None or (now.size, now.group) != (slot.size, slot.group):
            raise HostError(
                f"cannot enable {queue}: as long as claims have queues of {accelerator}, it stays laid out as it is, "
                f"and {queue} has {now.size} entries in group {now.group}"
            )
        if now.state == ENABLED and now.name != record.name:
            raise HostError(f"cannot enable {queue}: it is enabled already, as {now.name!r}, and not by this agent")
        self._accelerators.rest(accelerator, record.layout)
        if now.state != ENABLED:
            self._accelerators.enable_queue(accelerator, queue, record.name, record.wanted)
        self._wait_for_node(record)
        self._journal.keep({record.device: replace(record, ready=True, lost=False)})

    def _wait_for_node(self, record: Enabled) -> None:
        until_s = time.monotonic() + self._node_s
        while not self._accelerators.has_node(record.accelerator, record.queue):
            if time.monotonic() > until_s:
                node = node_of(record.accelerator, record.queue)
                raise HostError(f"cannot use {record.queue}: there is no {node} after {self._node_s:g} s")
            time.sleep(POLL_S)

    def look(self) -> dict[str, bool]:
        """Return whether each queue that a claim was given is still enabled, by device. One that others have disabled
        is not handed over any longer, as its node may be another's by now. Raise HostError."""
        records = {id: one for id, one in self._journal.read().items() if one.ready or one.lost}
        lost = {id: one for id, one in records.items() if one.ready and not self.stands(one)}
        if lost:
            self._journal.change(
                lambda known: {id: _lost(one) if lost.get(id) == one else one for id, one in known.items()}
            )
        return {id: one.ready and id not in lost for id, one in records.items()}

    # ---------------------------------------------------------------- back

    def give_back(self, devices: Collection[str]) -> dict[str, str]:
        """Disable some queues, and their accelerators with the last. Return, by device, why one still is enabled."""
        errors: dict[str, str] = {}
        for id, record in self._journal.read().items():
            if id in devices:
                try:
                    self._end(record)
                except HostError as error:
                    errors[id] = str(error)
        return errors

    def _end(self, record: Enabled) -> None:
        if record.ready or record.lost:  # from here on it is not handed over, whatever happens
            self._journal.keep({record.device: _unready(record)})
        if self._accelerators.address(record.accelerator) == record.address:  # else the kernel has forgotten it
            self._undo(record)
        self._journal.forget(record.device)
        log.info("queue-disabled", device=record.device, queue=record.queue, claim=record.claim)

    def _undo(self, record: Enabled) -> None:
        accelerator = record.accelerator
        if self._accelerators.queue(record.queue).name == record.name:
            self._accelerators.disable_queue(record.queue)
            self._accelerators.unname(record.queue)
        if self._accelerators.state(accelerator) == DISABLED:
            if self._accelerators.is_within(accelerator, record.layout):  # laid out, perhaps in part
                self._accelerators.lay_out(accelerator, _UNTOUCHED)
        elif self._others(accelerator, record.device):
            self._accelerators.rest(accelerator, record.layout)
        elif not first_of_others(self._accelerators.queues(accelerator)):
            self._accelerators.disable(accelerator)

    def orphans(self, held: Mapping[str, Collection[str]]) -> list[str]:
        """Return the devices that are enabled although their grant does not hold them. held: devices by Grant.id."""
        return [id for id, one in self._journal.read().items() if id not in held.get(one.grant, ())]


def _lost(record: Enabled) -> Enabled:
    return replace(record, ready=False, lost=True)


def _unready(record: Enabled) -> Enabled:
    return replace(record, ready=False, lost=False)
