"""How accelerators (Intel DSA and IAA) that are given to the agent are divided into work queues, and whose a queue is.

Pure. An accelerator is taken only if no other program has begun to configure it: every file is at its reset value. What
becomes of it is recorded (Division), and from then on it is changed only as long as it is exactly what the record says.
A queue is the agent's by its type, name, size and driver. Its name has a nonce of the record: another agent, or this
one with another state folder, gives other names. A queue may be in a state between two writes only while the record
says that it is being made or taken down (Step).

The kernel's rules (drivers/dma/idxd: sysfs.c, device.c, cdev.c): sizes can be written only while the accelerator is
disabled, and the hardware takes groups only then, so all queues get them before it is enabled. Disabling a queue clears
all else of it but `driver_name`, before 5.18 sizes and groups too; disabling one whose state is `disabled` already, or
enabling one in vain, clears nothing but its type. Enabling any queue checks all that have a group, and refuses a shared
one without a type; so a queue that is not in use is left in dedicated mode. It also writes all of them to the
hardware, where it sets the bit of a dedicated one and never clears it (idxd_wq_config_write): one that was left in
dedicated mode stays dedicated there, whatever its mode says later. So all queues that are made are dedicated. Disabling
the accelerator clears everything but `driver_name`, before 5.18 nothing of queues that are disabled. Opening a
dedicated queue disables it for a moment.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from nodeagent.core.model.device import ContainerEdits

KIND = "dsa-queue"
SOURCE = "queue"
"""The source of evidence that says whether a queue that is held is still as it was made."""
ENABLED, DISABLED, HALTED = "enabled", "disabled", "halted"
DEDICATED, SHARED = "dedicated", "shared"
USER, NO_TYPE = "user", "none"
IDXD = "idxd"
"""The driver of an accelerator that is enabled. That of an enabled queue of type `user` is called like the type."""
NO_GROUP, GROUP = -1, 0
"""All queues and engines are in one group: every engine works for every queue, by priority."""
_ID = re.compile(r"([0-9a-f:.]+)/queue-([0-9]{1,3})-[0-9]{1,5}-[0-9]{1,2}")
_LABEL = re.compile(r"nodeagent-[0-9]+-[0-9a-f]{8}")
NONCE_BYTES = 4
ZERO = "", "0"
"""A file whose reset value is 0; "" if this kernel has none."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A work queue as configured; it is a dedicated one."""

    size: int
    priority: int


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """accelerators: shell patterns of names or PCI addresses. queues: by slot."""

    accelerators: tuple[str, ...]
    queues: tuple[Queue, ...]


class More(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a queue or a group that the agent leaves at their reset values; "" for one that cannot be read."""

    zeros: tuple[str, ...] = ()
    """Those whose reset value is 0."""
    defaults: tuple[str, ...] = ()
    """Those whose reset value depends on the hardware and the kernel: it is the same for all of an accelerator."""

    def is_reset(self, defaults: tuple[str, ...]) -> bool:
        """Return whether all are at their reset values. defaults: those of another one that is."""
        same = (one == other or not one or not other for one, other in zip(self.defaults, defaults, strict=False))
        return all(one in ZERO for one in self.zeros) and all(same)


class Wq(msgspec.Struct, frozen=True, kw_only=True):
    """A work queue as the kernel shows it."""

    name: str
    """Such as wq0.1."""
    label: str
    """What it is called for users; "" for nothing."""
    type: str
    mode: str
    state: str
    size: int
    group: int
    priority: int
    threshold: int
    driver_name: str
    """Of the driver that may enable it; "" for none, or if this kernel has no such file."""
    driver: str
    """"" if it is not enabled."""
    clients: int
    """How many programs have it open."""
    more: More = More()

    @property
    def is_off(self) -> bool:
        """Return whether it is configured for nothing, whatever its mode, size and group are. A queue of type `user`
        that was disabled keeps its driver_name."""
        named = self.type != NO_TYPE or self.label or self.driver_name not in ("", USER)
        return not (named or self.driver or self.state != DISABLED or self.priority or self.threshold)

    @property
    def is_blank(self) -> bool:
        """Return whether it is as the kernel resets it, apart from `more`."""
        return self.is_off and not self.size and self.group == NO_GROUP and self.mode == SHARED


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """An accelerator as the kernel shows it."""

    address: str
    """Of its PCI function."""
    name: str
    """Such as dsa0, which depends on the order in which they are found."""
    state: str
    driver: str
    configurable: bool
    pasid: bool
    total: int
    """Entries of all queues together."""
    wqs: tuple[Wq, ...]
    engines: tuple[int, ...]
    """The group of each."""
    groups: tuple[More, ...] = ()
    more: More = More()

    @property
    def node_folder(self) -> str:
        """Return the folder of the nodes of its queues below /dev."""
        return self.name.rstrip("0123456789")

    def node_of(self, wq: str) -> str:
        """Return the path of the node that a queue has while it is enabled. wq: its name, such as wq0.1."""
        return f"/dev/{self.node_folder}/{wq}"


class Step(StrEnum):
    """What is known of a slot that is held."""

    MAKING = "making"
    """Its queue is being made: it may be in any state from idle to enabled."""
    MADE = "made"
    """It was enabled. Anything but that, or idle, is another program's."""
    LOST = "lost"
    """It was found to be no longer as it was made."""
    ENDING = "ending"
    """It is being taken down: it may be in any state from enabled to idle."""


CHANGING = Step.MAKING, Step.ENDING


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A slot that is, or is about to be, a queue for a grant."""

    slot: int
    claim: str
    """UID."""
    grant: str
    """Grant.id."""
    step: Step = Step.MAKING
    edits: ContainerEdits | None = None
    """What the claim's container gets; None unless the queue is made."""
    why: str = ""
    """Why it is lost."""


class Division(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of an accelerator from before it is changed until it is as it was."""

    address: str
    nonce: str
    """Drawn for this division, as a part of the names of its queues."""
    queues: tuple[Queue, ...]
    """By slot, which is also the number of the work queue."""
    defaults: tuple[str, ...] = ()
    """More.defaults of its queues before it was changed."""
    ready: bool = False
    """Whether it was enabled, with all sizes and groups."""
    held: tuple[Held, ...] = ()
    """In order of slot."""

    def of(self, slot: int) -> Held | None:
        """Return who holds a slot, or None."""
        return next((one for one in self.held if one.slot == slot), None)

    def label(self, slot: int) -> str:
        """Return the name that the agent gives to a queue."""
        return f"nodeagent-{slot}-{self.nonce}"

    def id(self, slot: int) -> str:
        """Return the id of the device that a slot is."""
        return device_id(self.address, slot, self.queues[slot])

    def names_any(self, seen: Accelerator) -> bool:
        """Return whether any queue of an accelerator has the name that the agent gave to it."""
        return any(one.label == self.label(slot) for slot, one in enumerate(seen.wqs))


def device_id(address: str, slot: int, queue: Queue) -> str:
    """Return the id of the device that a slot is. It has all that is configured of the queue: what a claim was given
    under one configuration is never another queue under the next. Those of queues that admins make are called wq-N."""
    return f"{address}/queue-{slot}-{queue.size}-{queue.priority}"


def is_agents(label: str) -> bool:
    """Return whether a queue has a name as agents give them."""
    return _LABEL.fullmatch(label) is not None


def place_of(id: str) -> tuple[str, int] | None:
    """Return the address and the slot of such an id, or None of any other."""
    found = _ID.fullmatch(id)
    return (found[1], int(found[2])) if found is not None else None


def rule_for(rules: Sequence[Rule], address: str, name: str) -> Rule | None:
    """Return the rule by which an accelerator is given to the agent, or None. name: "" if it has none."""
    return next((one for one in rules if any(_fits(pattern, address, name) for pattern in one.accelerators)), None)


def _fits(pattern: str, address: str, name: str) -> bool:
    return any(text and fnmatch.fnmatchcase(text, pattern) for text in (address, name))


def taken(seen: Accelerator) -> str:
    """Return why an accelerator of which nothing is recorded is not taken, or "": another program has begun to use it,
    as not every file is at its reset value."""
    if named := [one for one in seen.wqs if is_agents(one.label)]:
        return f"{named[0].name} of {seen.name} is {named[0].label}, of an agent whose records are not here"
    if why := still_bound(seen):
        return why
    if seen.state != DISABLED or seen.driver:
        return f"{seen.name} is {seen.state}, and the agent has no record of it"
    if begun := [one.name for one in seen.wqs if not _is_reset(one, seen)]:
        return f"{begun[0]} of {seen.name} is configured, and the agent has no record of it"
    if any(group != NO_GROUP for group in seen.engines):
        return f"an engine of {seen.name} has a group, and the agent has no record of it"
    if not _has_reset_groups(seen):
        return f"a group of {seen.name} is configured, and the agent has no record of it"
    return ""


def _is_reset(one: Wq, seen: Accelerator) -> bool:
    return one.is_blank and one.more.is_reset(seen.wqs[0].more.defaults)


def _has_reset_groups(seen: Accelerator) -> bool:
    return all(one.is_reset(seen.groups[0].defaults) for one in seen.groups) and seen.more.is_reset(())


def still_bound(seen: Accelerator) -> str:
    """Return why an accelerator that is disabled and yet bound is not served, or "". The kernel leaves it like that
    when it resets one that was halted, and its queues too; what is to be done is the admin's."""
    if seen.state != DISABLED or seen.driver != IDXD:
        return ""
    bound = (f"{one.name} to {one.driver}" for one in seen.wqs if one.driver and one.state == DISABLED)
    every = ", ".join((*bound, f"{seen.name} to {IDXD}"))
    return (
        f"{seen.name} is disabled and still bound, as after a reset by the kernel; to have it served, write each name "
        f"to `unbind` of its driver in /sys/bus/dsa/drivers: {every}"
    )


def in_force(record: Division | None, seen: Accelerator) -> Division | None:
    """Return what is recorded, or None if it has ended: nothing is held, and the accelerator is as it was, or another
    program has configured it since and left no queue of the agent's."""
    if record is None or record.held:
        return record
    is_others = seen.state != HALTED and differs(seen, record) and not record.names_any(seen)
    return None if is_others or not taken(seen) else record


def unfit(seen: Accelerator, queues: Sequence[Queue]) -> str:
    """Return why an accelerator cannot have some queues, or ""."""
    if not seen.configurable:
        return f"{seen.name} cannot be configured"
    if not seen.pasid:
        return f"{seen.name} has no PASID, which queues for user space need: the IOMMU has to be on, in scalable mode"
    if len(queues) > len(seen.wqs):
        return f"{seen.name} has {len(seen.wqs)} work queues, {len(queues)} are configured"
    if (total := sum(one.size for one in queues)) > seen.total:
        return f"{seen.name} has {seen.total} entries for all its queues, {total} are configured"
    if not seen.engines:
        return f"{seen.name} has no engine"
    return ""


def differs(seen: Accelerator, record: Division) -> str:
    """Return why an accelerator is not what is recorded of it, or "". Then it is not the agent's to change."""
    if seen.state == HALTED:
        return f"{seen.name} is {HALTED}"
    if record.ready and (why := still_bound(seen)):
        return why
    if record.ready and (seen.state != ENABLED or seen.driver != IDXD):
        return f"{seen.name} is {seen.state}, although the agent enabled it: another program did that"
    if len(seen.wqs) < len(record.queues):
        return f"{seen.name} has {len(seen.wqs)} work queues, and had {len(record.queues)}: it is another one"
    if seen.driver not in ("", IDXD) or any(group not in _groups(record) for group in seen.engines):
        return f"{seen.name} was configured by another program"
    if not record.ready and not _has_reset_groups(seen):
        return f"a group of {seen.name} was configured by another program"
    for slot, one in enumerate(seen.wqs):
        if not _is_ours(one, slot, record):
            return f"{one.name} of {seen.name} was configured by another program"
    return ""


def why_not_own(seen: Accelerator, record: Division, slot: int) -> str:
    """Return why the queue of a slot that is held is not the agent's to disable, or "". One that has the agent's name
    is, whatever is alongside it; one without a name only as a part of an accelerator that is as recorded."""
    if slot < len(seen.wqs) and seen.wqs[slot].label == record.label(slot) and _is_ours(seen.wqs[slot], slot, record):
        return ""
    return differs(seen, record)


def _is_ours(one: Wq, slot: int, record: Division) -> bool:
    """Return whether a queue is as recorded."""
    if slot >= len(record.queues):
        return one.is_blank and one.more.is_reset(record.defaults)
    held = record.of(slot)
    if held is None:
        in_mode = one.mode == DEDICATED or not record.ready or one.is_blank  # an older kernel has cleared it
        return in_mode and is_idle(one, slot, record)
    if is_made(one, slot, record) or is_idle(one, slot, record):
        return True
    return held.step in CHANGING and _is_between(one, slot, record)


def is_idle(one: Wq, slot: int, record: Division) -> bool:
    """Return whether a queue is in no use, and laid out as recorded."""
    return one.is_off and one.more.is_reset(record.defaults) and _is_laid_out(one, slot, record)


def _is_between(one: Wq, slot: int, record: Division) -> bool:
    """Return whether a queue is in a state that making it or taking it down goes through: it has its name before, or
    loses it after, everything else but its type."""
    if one.driver or one.type not in (NO_TYPE, USER) or not _is_laid_out(one, slot, record):
        return False
    bare = not (one.label or one.priority or one.threshold)
    return one.label == record.label(slot) or (bare and one.driver_name in ("", USER))


def _is_laid_out(one: Wq, slot: int, record: Division) -> bool:
    size, cleared = record.queues[slot].size, (one.size, one.group) == (0, NO_GROUP)
    if record.ready:
        return cleared or (one.size, one.group) == (size, GROUP)
    return one.size in (0, size) and one.group in _groups(record)


def _groups(record: Division) -> tuple[int, ...]:
    return (GROUP,) if record.ready else (NO_GROUP, GROUP)


def is_made(one: Wq, slot: int, record: Division) -> bool:
    """Return whether a queue is the one that the agent made, be it enabled or, for as long as a program opens it,
    not."""
    return one.driver == USER and is_configured(one, slot, record)


def is_configured(one: Wq, slot: int, record: Division) -> bool:
    """Return whether a queue has all that the agent writes to it before it is enabled."""
    queue = record.queues[slot]
    there = one.type, one.label, one.mode, one.size, one.priority, one.threshold
    return there == (USER, record.label(slot), DEDICATED, queue.size, queue.priority, 0)


def is_laid_out(seen: Accelerator, record: Division) -> bool:
    """Return whether an accelerator has all that the agent writes to it before it is enabled, apart from the queue of
    the slot that is being made."""
    sizes = all(one.size == queue.size for one, queue in zip(seen.wqs, record.queues, strict=False))
    mine = (*seen.engines, *(one.group for one in seen.wqs[: len(record.queues)]))
    return sizes and all(group == GROUP for group in mine)


def is_up(seen: Accelerator, record: Division, slot: int) -> bool:
    """Return whether the queue of a slot is the one that the agent made, and enabled."""
    there = slot < len(seen.wqs) and is_made(seen.wqs[slot], slot, record)
    return there and seen.wqs[slot].state == ENABLED
