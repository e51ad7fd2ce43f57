"""How a GPU can be divided: which of its possible MIG instances exclude each other, and what each takes of it.

Pure. A GPU instance lies on consecutive memory slices and takes engines. Where an engine is scarcer than the slices, as
the one optical flow engine of a "+me" profile, instances exclude each other that share no slice. Source: NVIDIA
Multi-Instance GPU User Guide, "Partitioning" and "Supported MIG Profiles"; nvmlGpuInstanceProfileInfo_t.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import msgspec

MEMORY_SLICE = "m"
"""Name of the counters of memory slices, with the number of the slice. It is short, since every part repeats it for
each slice that it lies on, and no claim names counters."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One size of instance, with everything that an instance of it takes of the GPU."""

    id: int
    """Of NVML, for this model of GPU."""
    name: str
    """1g.10gb, 1g.10gb+me."""
    memory_bytes: int
    most: int
    """How many instances of it can exist at the same time."""
    size: int
    """Number of memory slices."""
    starts: tuple[int, ...]
    """Numbers of the memory slices at which an instance can begin."""
    slices: int
    """Number of compute slices."""
    multiprocessors: int
    copy_engines: int = 0
    decoders: int = 0
    encoders: int = 0
    jpeg_engines: int = 0
    ofa_engines: int = 0

    @property
    def amounts(self) -> Mapping[str, int]:
        """Return what an instance takes besides memory slices, by the name of its counter."""
        return {
            "compute-slices": self.slices,
            "multiprocessors": self.multiprocessors,
            "copy-engines": self.copy_engines,
            "decoders": self.decoders,
            "encoders": self.encoders,
            "jpeg-engines": self.jpeg_engines,
            "ofa-engines": self.ofa_engines,
        }


Profiles = tuple[Profile, ...]
"""All profiles of one GPU."""


class Place(msgspec.Struct, frozen=True, order=True):
    """A profile at one of its placements: an instance that exists or could be made."""

    profile: int
    """Profile.id."""
    start: int
    size: int

    @property
    def slices(self) -> range:
        """Return the numbers of its memory slices."""
        return range(self.start, self.start + self.size)


def place_of(profile: Profile, start: int) -> Place:
    """Return the place of a possible instance."""
    return Place(profile.id, start, profile.size)


def places(profiles: Profiles) -> tuple[Place, ...]:
    """Return every instance that could be made of an empty GPU."""
    return tuple(place_of(one, start) for one in profiles for start in one.starts)


def partition_id(gpu: str, profile: Profile, start: int) -> str:
    """Return the id of the device that stands for a possible instance. It names the place and not the instance, so it
    stays the same however often the instance is made."""
    return f"{gpu}/mig-{profile.name}-{start}"


@functools.cache
def supply(profiles: Profiles) -> Mapping[str, int]:
    """Return how much a GPU has of everything but memory slices: as much as instances of one profile can take."""
    found: dict[str, int] = {}
    for one in profiles:
        for name, amount in one.amounts.items():
            found[name] = max(found.get(name, 0), amount * one.most)
    return found


@functools.cache
def scarce(profiles: Profiles) -> frozenset[str]:
    """Return the names of what can run out while there are memory slices left."""
    return frozenset(name for name, amount in supply(profiles).items() if _most_drawn(profiles, name) > amount)


def counters(profiles: Profiles) -> dict[str, int]:
    """Return the counters of a GPU: its memory slices, one each, and what is scarce."""
    slices = max((start + one.size for one in profiles for start in one.starts), default=0)
    return {
        **{f"{MEMORY_SLICE}{number}": 1 for number in range(slices)},
        **{name: supply(profiles)[name] for name in sorted(scarce(profiles))},
    }


def draws(profiles: Profiles, profile: Profile, start: int) -> dict[str, int]:
    """Return what a possible instance takes of the counters of its GPU."""
    slices = place_of(profile, start).slices
    return {
        **{f"{MEMORY_SLICE}{number}": 1 for number in slices},
        **{name: profile.amounts[name] for name in sorted(scarce(profiles)) if profile.amounts[name]},
    }


def things(gpu: str, profiles: Profiles, profile: Profile, start: int) -> tuple[str, ...]:
    """Return what only one instance can have, as Device.exclusive: two instances that share none of it fit together."""
    found = [f"mig-memory:{gpu}/{number}" for number in place_of(profile, start).slices]
    alone = False
    for name in sorted(_contested(profiles)):
        amount, total = profile.amounts[name], supply(profiles)[name]
        first = 0 if amount == total else start
        found += [f"mig-{name}:{gpu}/{unit}" for unit in range(first, first + amount)]
        alone = alone or amount == total
    if profile.most == 1 and len(profile.starts) > 1 and not alone:
        found.append(f"mig-profile:{gpu}/{profile.id}")
    return tuple(found)


@functools.cache
def _contested(profiles: Profiles) -> frozenset[str]:
    """Return the names of what a single instance that leaves memory slices to others can take all of."""
    largest = max((one.size for one in profiles), default=0)
    return frozenset(
        name
        for one in profiles
        for name, amount in one.amounts.items()
        if one.size < largest and amount and amount == supply(profiles)[name]
    )


def _most_drawn(profiles: Profiles, name: str) -> int:
    """Return the most that instances which share no memory slice can take of something together."""
    ends = {0: 0}  # the most that can be taken of the slices below a number
    for end in range(1, 1 + max((start + one.size for one in profiles for start in one.starts), default=0)):
        ends[end] = max(ends[end - 1], *(ends[start] + amount for start, amount in _ending(profiles, name, end)), 0)
    return max(ends.values())


def _ending(profiles: Profiles, name: str, end: int) -> Iterator[tuple[int, int]]:
    """Yield (start, amount) of the possible instances whose slices end before a number."""
    for one in profiles:
        if end - one.size in one.starts:
            yield end - one.size, one.amounts[name]


def overlapping(place: Place, others: Iterable[Place]) -> list[Place]:
    """Return those of some instances that share a memory slice with one."""
    return [one for one in others if not set(one.slices).isdisjoint(place.slices)]
