"""Accelerators of Intel's (DSA, IAA) and their work queues, laid out, enabled and disabled through sysfs.

Source: Documentation/ABI/stable/sysfs-driver-dma-idxd; drivers/dma/idxd, where sysfs.c says what is refused, device.c
what enabling checks and what disabling resets. What that comes to:

- Sizes are taken only while the accelerator is disabled; all else of a queue only while the queue is.
- An accelerator is enabled (bound to `idxd`) only with a queue and an engine in a group, and neither it nor any queue
  while one in a group has the mode "shared" and is not (about to be) used: so those that wait are "dedicated".
- A queue is enabled (bound to `user`) only with a group and a name, from 6.7 on with the name of the driver, and a
  shared one with a threshold.
- Disabling a queue resets its mode to "shared", its name and all else but size and group; disabling an accelerator
  resets everything of it, after it has disabled its queues.

Every step looks at what is there first, so that it can be taken again after a crash at any point. A write can hang, as
the driver waits until a queue is drained: it has a deadline (host/vfio.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from nodeagent.core.queues.layout import (
    DEDICATED,
    DISABLED,
    ENABLED,
    SHARED,
    UNUSED,
    Layout,
    Slot,
    is_others,
)
from nodeagent.core.queues.settings import Queue
from nodeagent.errors import HostError
from nodeagent.host import pci
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut

_BUS, _DRIVERS = "sys/bus/dsa/devices", "sys/bus/dsa/drivers"
_OF_ACCELERATORS, _OF_QUEUES = "idxd", "user"
_NONE = -1
_CAUSES: Mapping[str, str] = {
    "0x80050000": "shared queues need an IOMMU in scalable mode",
    "0x800c0000": "shared queues need ENQCMD and an IOMMU in scalable mode",
    "0x80110000": "queues for programs need an IOMMU in scalable mode",
}
"""What the kernel's cmd_status means (include/uapi/linux/idxd.h), where an admin can do something about it."""


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """A queue as the kernel shows it."""

    queue: str
    """wq0.1"""
    state: str
    type: str
    name: str
    mode: str
    size: int
    group: int
    """-1 if it is in none."""

    @property
    def number(self) -> int:
        """Return its number in its accelerator."""
        return int(self.queue.rpartition(".")[2])

    @property
    def is_others(self) -> bool:
        """Return whether an admin or another program uses it, or has begun to configure it."""
        return is_others(state=self.state, type=self.type, name=self.name)


class Accelerators:
    """The accelerators below a root. Every method blocks, and those that write raise HostError."""

    def __init__(self, sysfs: SysFs, put: TimedPut | None = None) -> None:
        self._sysfs = sysfs
        self._put = put or TimedPut()

    # ---------------------------------------------------------------- what is there

    def address(self, name: str) -> str:
        """Return the PCI address of an accelerator (dsa0), or "" if there is none of that name."""
        real = self._sysfs.real(f"{_BUS}/{name}")
        address, tail = pci.split(real)
        return address if address is not None and tail == name else ""

    def state(self, name: str) -> str:
        """Return the state of an accelerator or of a queue, or "" if there is none of that name."""
        return self._sysfs.text(f"{_BUS}/{name}/state", "")

    def queues(self, accelerator: str) -> list[QueueState]:
        """Return the queues of an accelerator, by number."""
        found = (self.queue(one) for one in self._sysfs.names(f"{_BUS}/{accelerator}") if one.startswith("wq"))
        return sorted(found, key=lambda one: one.number)

    def queue(self, queue: str) -> QueueState:
        """Return a queue. Raise HostError if it is not there."""
        folder = f"{_BUS}/{queue}"
        return QueueState(
            queue=queue,
            state=self._sysfs.text(f"{folder}/state"),
            type=self._sysfs.text(f"{folder}/type"),
            name=self._sysfs.text(f"{folder}/name"),
            mode=self._sysfs.text(f"{folder}/mode"),
            size=self._sysfs.number(f"{folder}/size") or 0,
            group=_group(self._sysfs.number(f"{folder}/group_id")),
        )

    def has_node(self, accelerator: str, queue: str) -> bool:
        """Return whether the node of a queue is there."""
        return self._sysfs.exists(node_of(accelerator, queue)[1:])

    def is_within(self, accelerator: str, layout: Layout) -> bool:
        """Return whether an accelerator has no sizes, groups and engines but those of a layout, which may be there only
        in part. An empty layout: whether it is as the kernel makes it."""
        for one in self.queues(accelerator):
            slot = layout.slot(one.number) or Slot(number=one.number, size=0, group=_NONE)
            if one.is_others or one.size not in (0, slot.size) or one.group not in (_NONE, slot.group):
                return False
        engines = [_group(self._sysfs.number(f"{_BUS}/{one}/group_id")) for one in self._engines(accelerator)]
        wanted = [*layout.engines, *[_NONE] * len(engines)]
        return all(group in (_NONE, its) for group, its in zip(engines, wanted, strict=False))

    def _engines(self, accelerator: str) -> list[str]:
        names = (one for one in self._sysfs.names(f"{_BUS}/{accelerator}") if one.startswith("engine"))
        return sorted(names, key=lambda one: int(one.rpartition(".")[2]))

    # ---------------------------------------------------------------- a disabled accelerator

    def lay_out(self, accelerator: str, layout: Layout) -> None:
        """Give the queues and engines of a disabled accelerator their sizes and groups, and those beyond the layout
        none."""
        every = self.queues(accelerator)
        sizes = {one.queue: slot.size if (slot := layout.slot(one.number)) is not None else 0 for one in every}
        for one in sorted(every, key=lambda one: sizes[one.queue] > one.size):  # what shrinks makes room for the others
            self._set(one.queue, "size", sizes[one.queue])
        for one in every:
            slot = layout.slot(one.number)
            self._set(one.queue, "mode", DEDICATED if slot is not None else SHARED)
            self._set(one.queue, "group_id", slot.group if slot is not None else _NONE)
        for number, engine in enumerate(self._engines(accelerator)):
            self._set(engine, "group_id", layout.engines[number] if number < len(layout.engines) else _NONE)

    def enable(self, accelerator: str) -> None:
        """Enable an accelerator that is laid out."""
        self._bind(_OF_ACCELERATORS, accelerator, accelerator)

    def disable(self, accelerator: str) -> None:
        """Disable an accelerator with all of its queues; the kernel forgets how it was laid out."""
        if self._sysfs.link_name(f"{_BUS}/{accelerator}/driver") is not None:
            self._write(f"{_DRIVERS}/{_OF_ACCELERATORS}/unbind", accelerator)
        if (state := self.state(accelerator)) not in (DISABLED, ""):
            raise HostError(f"cannot disable {accelerator}: it is {state}")

    # ---------------------------------------------------------------- a queue

    def rest(self, accelerator: str, layout: Layout) -> None:
        """Let the queues of a layout that nothing uses wait in a mode that hinders no other."""
        for one in self.queues(accelerator):
            if layout.slot(one.number) is not None and (one.state, one.type) == (DISABLED, UNUSED):
                self._set(one.queue, "mode", DEDICATED)

    def enable_queue(self, accelerator: str, queue: str, name: str, wanted: Queue) -> None:
        """Set a queue of an enabled accelerator and enable it for programs."""
        self._set(queue, "mode", wanted.mode)
        if wanted.mode == SHARED:
            self._set(queue, "threshold", wanted.threshold)
        self._set(queue, "priority", wanted.priority)
        self._set(queue, "block_on_fault", int(wanted.block_on_fault))
        if self._sysfs.exists(f"{_BUS}/{queue}/driver_name"):
            self._set(queue, "driver_name", _OF_QUEUES)
        self._set(queue, "name", name)
        self._bind(_OF_QUEUES, queue, accelerator)

    def disable_queue(self, queue: str) -> None:
        """Disable a queue; the driver waits until what was submitted to it is done."""
        if self.state(queue) == ENABLED:
            self._write(f"{_DRIVERS}/{_OF_QUEUES}/unbind", queue)
        if (state := self.state(queue)) == ENABLED:
            raise HostError(f"cannot disable {queue}: it is still {state}")

    def unname(self, queue: str) -> None:
        """Take its name from a disabled queue."""
        if self._sysfs.text(f"{_BUS}/{queue}/name", ""):
            self._write(f"{_BUS}/{queue}/name", "\n")

    # ---------------------------------------------------------------- writing

    def _bind(self, driver: str, what: str, accelerator: str) -> None:
        try:
            self._write(f"{_DRIVERS}/{driver}/bind", what)
        except HostError as error:
            status = self._sysfs.text(f"{_BUS}/{accelerator}/cmd_status", "")
            why = _CAUSES.get(status) or (f"cmd_status of {accelerator} is {status}" if status else "")
            raise HostError(f"cannot enable {what}: {'; '.join(filter(None, [str(error), why]))}") from None
        if (state := self.state(what)) != ENABLED:
            raise HostError(f"cannot enable {what}: it is {state or 'gone'}")

    def _set(self, what: str, file: str, value: str | int) -> None:
        """Write a file of a queue or an engine, unless it says that already."""
        path = f"{_BUS}/{what}/{file}"
        if self._sysfs.text(path, "") != str(value):
            self._write(path, str(value))

    def _write(self, path: str, text: str) -> None:
        full = self._sysfs.path(path)
        what = text if path.startswith(_DRIVERS) else path.split("/")[-2]
        if self._put.hangs(f"/{what}/") or self._put.hangs(f"bind {what}"):
            raise HostError(f"cannot change {what}: an earlier write has not ended")
        self._put(full, text)


def node_of(accelerator: str, queue: str) -> str:
    """Return the device node of a queue that is enabled for programs (drivers/dma/idxd/cdev.c)."""
    return f"/dev/{accelerator[:3]}/{queue}"


def first_of_others(queues: Iterable[QueueState]) -> str:
    """Return the first queue that an admin or another program uses, or ""."""
    return next((one.queue for one in queues if one.is_others), "")


def _group(said: int | None) -> int:
    return _NONE if said is None else said
