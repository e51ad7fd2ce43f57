"""How accelerators (Intel DSA and IAA) that are given to the agent are divided into work queues, and whose a queue is.

Pure. An accelerator is taken only if nobody has begun to configure it. What becomes of it is recorded (Division), and
from then on it is changed only as long as it is exactly what the record says. A queue is the agent's by its type, its
name, its size and its driver, never by its state: opening a dedicated queue disables it for a moment.

The kernel's rules (drivers/dma/idxd: sysfs.c, device.c, cdev.c): sizes can be written only while the accelerator is
disabled, and the hardware takes groups only then, so all queues get them before it is enabled. Disabling a queue clears
all else of it, before 5.18 sizes and groups too. Enabling any queue checks all that have a group, and refuses a shared
one without a type; so a queue that is not in use is left in dedicated mode. Disabling the accelerator clears
everything.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

import msgspec

from nodeagent.core.model.device import ContainerEdits

KIND = "dsa-queue"
SOURCE = "queue"
"""The source of evidence that says whether a queue that is held is still as it was made."""
ENABLED, DISABLED = "enabled", "disabled"
DEDICATED, SHARED = "dedicated", "shared"
USER, NO_TYPE = "user", "none"
IDXD = "idxd"
"""The driver of an accelerator that is enabled. That of an enabled queue of type `user` is called like the type."""
NO_GROUP, GROUP = -1, 0
"""All queues and engines are in one group: every engine works for every queue, by priority."""
_ID = re.compile(r"([0-9a-f:.]+)/queue-([0-9]{1,3})")
LABEL = "nodeagent-"
"""How the names begin that the agent gives to queues."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A work queue as configured. threshold: 0 for a dedicated one, as the kernel shows it."""

    mode: str
    size: int
    priority: int
    threshold: int = 0


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """accelerators: shell patterns of names or PCI addresses. queues: by slot."""

    accelerators: tuple[str, ...]
    queues: tuple[Queue, ...]


class Wq(msgspec.Struct, frozen=True, kw_only=True):
    """A work queue as the kernel shows it."""

    name: str
    """Such as wq0.1."""
    label: str
    """What it is called for users; "" for nothing."""
    type: str
    mode: str
    size: int
    group: int
    priority: int
    threshold: int
    driver: str
    """"" if it is not enabled."""
    clients: int
    """How many programs have it open."""

    @property
    def is_blank(self) -> bool:
        """Return whether nobody has begun to configure it."""
        return not (self.size or self.label or self.driver) and self.type == NO_TYPE and self.group == NO_GROUP


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

    @property
    def node_folder(self) -> str:
        """Return the folder of the nodes of its queues below /dev."""
        return self.name.rstrip("0123456789")


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A slot that is, or is about to be, a queue for a grant."""

    slot: int
    claim: str
    """UID."""
    grant: str
    """Grant.id."""
    edits: ContainerEdits | None = None
    """What the claim's container gets; None until the queue is enabled."""


class Division(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of an accelerator from before it is changed until it is as it was."""

    address: str
    queues: tuple[Queue, ...]
    """By slot, which is also the number of the work queue."""
    ready: bool = False
    """Whether it was enabled, with all sizes and groups."""
    held: tuple[Held, ...] = ()
    """In order of slot."""

    def of(self, slot: int) -> Held | None:
        """Return who holds a slot, or None."""
        return next((one for one in self.held if one.slot == slot), None)


def label(slot: int) -> str:
    """Return the name that the agent gives to a queue."""
    return f"{LABEL}{slot}"


def device_id(address: str, slot: int) -> str:
    """Return the id of the device that a slot is. Those of queues that admins make are called wq-N."""
    return f"{address}/queue-{slot}"


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
    """Return why an accelerator of which nothing is recorded is not taken, or "": somebody has begun to use it."""
    if seen.state != DISABLED or seen.driver:
        return f"{seen.name} is {seen.state}, and the agent has no record of it"
    if begun := [one.name for one in seen.wqs if not one.is_blank]:
        return f"{begun[0]} of {seen.name} is configured, and the agent has no record of it"
    if any(group != NO_GROUP for group in seen.engines):
        return f"an engine of {seen.name} has a group, and the agent has no record of it"
    return ""


def in_force(record: Division | None, seen: Accelerator) -> Division | None:
    """Return what is recorded, or None if it has ended: nothing is held, and the accelerator is as it was."""
    return record if record is not None and (record.held or taken(seen)) else None


def unfit(seen: Accelerator, queues: Sequence[Queue], *, enqcmd: bool) -> str:
    """Return why an accelerator cannot have some queues, or "". enqcmd: whether the CPUs have that instruction."""
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
    if not enqcmd and any(one.mode == SHARED for one in queues):
        return "the CPUs have no ENQCMD, which shared queues need"
    return ""


def differs(seen: Accelerator, record: Division) -> str:
    """Return why an accelerator is not what is recorded of it, or "". Then it is not the agent's to change."""
    if record.ready and (seen.state != ENABLED or seen.driver != IDXD):
        return f"{seen.name} is {seen.state}, although the agent enabled it: another program did that"
    if len(seen.wqs) < len(record.queues):
        return f"{seen.name} has {len(seen.wqs)} work queues, and had {len(record.queues)}: it is another one"
    if seen.driver not in ("", IDXD) or any(group not in _groups(record) for group in seen.engines):
        return f"{seen.name} was configured by another program"
    for slot, one in enumerate(seen.wqs):
        is_ours = _is_ours(one, slot, record) if slot < len(record.queues) else one.is_blank
        if not is_ours:
            return f"{one.name} of {seen.name} was configured by another program"
    return ""


def _is_ours(one: Wq, slot: int, record: Division) -> bool:
    """Return whether a queue is as recorded: one that is held may be in any of the steps to and from being enabled."""
    queue, held = record.queues[slot], record.of(slot)
    if one.is_blank:  # not laid out yet, or cleared by an older kernel
        return True
    if one.group not in _groups(record) or one.size not in ((queue.size,) if record.ready else (0, queue.size)):
        return False
    if held is None:
        return one.type == NO_TYPE and not one.label and not one.driver
    if one.driver:
        return is_made(one, slot, queue)
    return one.type in (NO_TYPE, USER) and one.label in ("", label(slot))


def _groups(record: Division) -> tuple[int, ...]:
    return (GROUP,) if record.ready else (NO_GROUP, GROUP)


def is_made(one: Wq, slot: int, queue: Queue) -> bool:
    """Return whether a queue is enabled as the agent makes it."""
    there = one.driver, one.type, one.label, one.mode, one.size, one.priority, one.threshold
    return there == (USER, USER, label(slot), queue.mode, queue.size, queue.priority, queue.threshold)
