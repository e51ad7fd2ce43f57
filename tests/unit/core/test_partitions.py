"""How GPUs divide: what excludes what, and in which order positions are offered, on every card of NVIDIA's tables."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from nodeagent.core.partitions.geometry import (
    Profile,
    Profiles,
    counters,
    draws,
    overlapping,
    partition_id,
    place_of,
    places,
    things,
)
from nodeagent.core.partitions.order import best_positions, offered
from tests.support.long_form import share_of
from tests.support.mig_driver import CARDS, MigDriver, library, profiles_of, uuid

STEPS = share_of(10_000, 0.2)
CARD = pytest.mark.parametrize("card", sorted(CARDS))
RTX_PRO_6000: Profiles = tuple(
    Profile(
        id=id,
        name=name,
        memory_bytes=size * (24 << 30),
        most=most,
        size=size,
        starts=tuple(range(0, 4, size)),
        slices=size,
        multiprocessors=46 * size,
        copy_engines=size,
        decoders=media,
        encoders=media,
        jpeg_engines=media,
        ofa_engines=ofa,
    )
    for id, (name, size, most, media, ofa) in enumerate(
        (
            ("1g.24gb", 1, 4, 1, 0),
            ("1g.24gb+me", 1, 1, 1, 1),
            ("1g.24gb+me.all", 1, 1, 4, 1),
            ("1g.24gb-me", 1, 4, 0, 0),
            ("2g.48gb", 2, 2, 2, 0),
            ("2g.48gb-me", 2, 2, 0, 0),
            ("4g.96gb", 4, 1, 4, 1),
        )
    )
)
"""NVIDIA Multi-Instance GPU User Guide, RTX PRO 6000 Blackwell: the profiles that differ in what they take."""


def named(profiles: Profiles, name: str) -> Profile:
    return next(one for one in profiles if one.name == name)


def exclude(profiles: Profiles, a: tuple[str, int], b: tuple[str, int]) -> bool:
    """Whether two possible instances cannot exist together."""
    mine, theirs = (set(things("gpu", profiles, named(profiles, name), start)) for name, start in (a, b))
    return not mine.isdisjoint(theirs)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (("3g.40gb", 4), ("4g.40gb", 0), False),
        (("3g.40gb", 0), ("4g.40gb", 0), True),
        (("3g.40gb", 4), ("1g.10gb", 6), True),
        (("1g.20gb", 6), ("1g.10gb", 5), False),
        (("1g.10gb+me", 0), ("1g.10gb+me", 5), True),
        (("1g.10gb+me", 0), ("1g.10gb", 5), False),
        (("7g.80gb", 0), ("1g.10gb", 6), True),
    ],
)
def test_instances_exclude_each_other_where_slices_or_the_one_media_engine_are_shared(
    a: tuple[str, int], b: tuple[str, int], wanted: bool
) -> None:
    assert exclude(profiles_of("h100-80"), a, b) == wanted


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (("1g.24gb+me.all", 0), ("1g.24gb", 3), True),
        (("1g.24gb+me.all", 0), ("2g.48gb", 2), True),
        (("1g.24gb+me.all", 0), ("1g.24gb-me", 3), False),
        (("1g.24gb+me", 0), ("1g.24gb", 1), False),
        (("1g.24gb", 0), ("2g.48gb", 2), False),
    ],
)
def test_an_instance_with_all_media_engines_leaves_others_those_without(
    a: tuple[str, int], b: tuple[str, int], wanted: bool
) -> None:
    assert exclude(RTX_PRO_6000, a, b) == wanted


class Driver:
    """The library's own answers, called in this process."""

    def __init__(self, driver: MigDriver) -> None:
        os.environ["FAKE_NVML_STATE"] = str(driver.path)
        self._lib = ctypes.CDLL(str(library() / "libnvidia-ml.so.1"))
        assert self._lib.nvmlInitWithFlags(0) == 0
        self._gpu = ctypes.c_void_p()
        assert self._lib.nvmlDeviceGetHandleByUUID(uuid(0).encode(), ctypes.byref(self._gpu)) == 0

    def create(self, profile: Profile, start: int) -> ctypes.c_void_p | int:
        """The instance's handle, or the error's code."""
        made, placement = ctypes.c_void_p(), (ctypes.c_uint * 2)(start, profile.size)
        code: int = self._lib.nvmlDeviceCreateGpuInstanceWithPlacement(
            self._gpu, profile.id, placement, ctypes.byref(made)
        )
        return code or made

    def destroy(self, handle: ctypes.c_void_p) -> None:
        assert self._lib.nvmlGpuInstanceDestroy(handle) == 0


@CARD
def test_exactly_what_excludes_nothing_is_what_the_driver_makes(
    tmp_path: Path, card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random creations and destructions: things decide as the driver does, and so do the counters of a scheduler."""
    monkeypatch.setenv("FAKE_NVML_STATE", "")  # put back afterwards
    profiles, drawn = profiles_of(card), random.Random(card)
    driver = Driver(MigDriver.of(tmp_path / "state", card))
    every = [(one, start) for one in profiles for start in one.starts]
    there: dict[tuple[str, int], tuple[Profile, ctypes.c_void_p]] = {}
    for _ in range(STEPS // len(CARDS) + 1):
        if there and drawn.random() < 0.35:
            driver.destroy(there.pop(drawn.choice(sorted(there)))[1])
            continue
        profile, start = drawn.choice(every)
        held = {thing for name, at in there for thing in things("g", profiles, named(profiles, name), at)}
        fits = held.isdisjoint(things("g", profiles, profile, start))
        made = driver.create(profile, start)
        assert fits == (made != 23), (profile.name, start, sorted(there))
        assert fits == _scheduler_fits(profiles, there.keys(), profile, start)
        if fits:
            assert isinstance(made, ctypes.c_void_p)
            there[profile.name, start] = profile, made


def _scheduler_fits(profiles: Profiles, there: object, profile: Profile, start: int) -> bool:
    left = counters(profiles)
    for name, at in [*there, (profile.name, start)]:  # type: ignore[misc]
        for counter, amount in draws(profiles, named(profiles, name), at).items():
            left[counter] -= amount
    return min(left.values()) >= 0


@CARD
def test_counters_are_the_memory_slices_and_what_is_scarcer_than_they(card: str) -> None:
    """What can run out only after the slices would refuse nothing, and is left out."""
    profiles = profiles_of(card)
    slices = 4 if card == "a30" else 8
    found = counters(profiles)
    assert [name for name in found if name[1:].isdigit()] == [f"m{n}" for n in range(slices)]
    more = {name: amount for name, amount in found.items() if not name[1:].isdigit()}
    scarce = {"jpeg-engines": 1, "ofa-engines": 1}
    assert more == ({**scarce, **more} if card.startswith("a") else {"ofa-engines": 1})
    for profile, start in offered(profiles):
        assert draws(profiles, profile, start).items() >= {f"m{start}": 1}.items()


@CARD
def test_an_instance_is_known_by_its_place(card: str) -> None:
    profiles = profiles_of(card)
    ids = {partition_id("0000:41:00.0", profile, start) for profile, start in offered(profiles)}
    assert len(ids) == len(places(profiles))
    whole = max(places(profiles), key=lambda one: one.size)
    assert set(overlapping(whole, places(profiles))) == set(places(profiles))
    for profile, start in offered(profiles):
        assert place_of(profile, start) in places(profiles)


# ---------------------------------------------------------------- order


def left_possible(profiles: Profiles, profile: Profile, starts: tuple[int, ...]) -> tuple[int, ...]:
    """How many instances remain possible after each step: the oracle, from the memory slices and engines as such."""
    return tuple(_left(profiles, profile, frozenset(starts[:count])) for count in range(1, len(starts) + 1))


@functools.cache
def _left(profiles: Profiles, profile: Profile, starts: frozenset[int]) -> int:
    used: dict[str, set[object]] = {}
    for start in starts:
        _use(used, profiles, profile, start)
    return sum(_free(used, profiles, one, start) for one in profiles for start in one.starts)


def _use(used: dict[str, set[object]], profiles: Profiles, profile: Profile, start: int) -> None:
    for kind, units in _needs(profiles, profile, start).items():
        used.setdefault(kind, set()).update(units)


def _free(used: Mapping[str, set[object]], profiles: Profiles, profile: Profile, start: int) -> bool:
    return all(used.get(kind, set()).isdisjoint(units) for kind, units in _needs(profiles, profile, start).items())


def _needs(profiles: Profiles, profile: Profile, start: int) -> dict[str, set[object]]:
    needs: dict[str, set[object]] = {"memory": set(range(start, start + profile.size))}
    if profile.ofa_engines:
        needs["media"] = {"the one"}
    return needs


@CARD
def test_no_order_of_positions_leaves_more_possible(card: str) -> None:
    """At the first step where another order differs in what remains possible, ours leaves more."""
    profiles = profiles_of(card)
    for profile in profiles:
        mine = best_positions(profiles, profile)
        assert sorted(mine) == sorted(profile.starts)
        ours = left_possible(profiles, profile, mine)
        assert ours == max(left_possible(profiles, profile, one) for one in itertools.permutations(profile.starts))


@pytest.mark.parametrize(
    ("name", "first"), [("1g.10gb", 6), ("1g.20gb", 6), ("2g.20gb", 4), ("3g.40gb", 4), ("4g.40gb", 0)]
)
def test_small_instances_begin_at_the_end(name: str, first: int) -> None:
    """There they leave the largest others possible."""
    profiles = profiles_of("h100-80")
    assert best_positions(profiles, named(profiles, name))[0] == first


def test_small_profiles_are_offered_before_large_ones() -> None:
    names = list(dict.fromkeys(profile.name for profile, _ in offered(profiles_of("h100-80"))))
    assert names == ["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]
