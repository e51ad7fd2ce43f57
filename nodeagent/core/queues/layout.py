"""How an accelerator of Intel's (DSA, IAA) is divided into work queues that are made for claims. Pure.

The kernel changes the size of a queue only while the whole accelerator is disabled, and the hardware takes groups and
engines only then; disabling an accelerator ends all of its queues (drivers/dma/idxd/sysfs.c, device.c). So all queues
of an accelerator are laid out at once. What else a queue is set to, each claim chooses for its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

KIND = "dsa"
DEDICATED, SHARED = "dedicated", "shared"
ENABLED, DISABLED = "enabled", "disabled"
"""What the kernel calls the states of queues and accelerators; an accelerator may also be "halted"."""
UNUSED = "none"
"""The type of a queue that nothing uses."""
OWN = "nodeagent-"
"""What the names of the queues that the agent enables begin with."""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Engines, and the queues that they serve."""

    engines: int
    sizes: tuple[int, ...]
    """Entries of each queue."""


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One queue of a layout."""

    number: int
    size: int
    """Entries."""
    group: int


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """All queues and engines of an accelerator that are used; those beyond them are in no group."""

    slots: tuple[Slot, ...] = ()
    """In order of number, from 0."""
    engines: tuple[int, ...] = ()
    """The group of each engine, from engine 0."""

    def slot(self, number: int) -> Slot | None:
        """Return a queue by its number, or None if the layout does not use it."""
        return self.slots[number] if number < len(self.slots) else None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an accelerator has."""

    queues: int
    groups: int
    engines: int
    entries: int
    """Of all queues together."""


def layout_of(groups: Iterable[Group]) -> Layout:
    """Return the layout of some groups: each has the next engines and the next queues."""
    slots: list[Slot] = []
    engines: list[int] = []
    for number, group in enumerate(groups):
        engines += [number] * group.engines
        slots += [Slot(number=len(slots) + n, size=size, group=number) for n, size in enumerate(group.sizes)]
    return Layout(slots=tuple(slots), engines=tuple(engines))


def misfit(layout: Layout, limits: Limits) -> str:
    """Return what a layout has more of than an accelerator, or "" if it fits."""
    return "; ".join(_too_many(layout, limits))


def _too_many(layout: Layout, limits: Limits) -> Iterator[str]:
    for what, wanted, there in (
        ("queues", len(layout.slots), limits.queues),
        ("groups", len({*layout.engines}), limits.groups),
        ("engines", len(layout.engines), limits.engines),
        ("entries", sum(one.size for one in layout.slots), limits.entries),
    ):
        if wanted > there:
            yield f"{wanted} {what} are configured, it has {there}"


def is_others(*, state: str, type: str, name: str) -> bool:
    """Return whether an admin or another program uses a queue, or has begun to configure it."""
    return not name.startswith(OWN) and (bool(name) or type != UNUSED or state != DISABLED)
