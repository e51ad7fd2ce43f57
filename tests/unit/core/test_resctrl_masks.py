"""Masks of cache ways: against a plain search through all masks of a small cache."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.resctrl.masks import choose, fault, highest_of, longest, lowest_of, runs, set_aside
from nodeagent.core.resctrl.model import Cache

BITS = 9
MASKS = st.integers(0, (1 << BITS) - 1)


def cache(least: int = 1, *, sparse: bool = False, hardware: int = 0, full: int = (1 << BITS) - 1) -> Cache:
    return Cache(
        name="L3", full=full, least_ways=least, sparse=sparse, hardware=hardware, closids=16, domains=(0,)
    )  # fmt: skip


def plain_fault(one: Cache, mask: int) -> bool:
    """The kernel's rule, read bit by bit."""
    if not 0 < mask <= one.full:
        return True
    ones = [bit for bit in range(BITS) if mask >> bit & 1]
    first_run = [bit for number, bit in enumerate(ones) if bit == ones[0] + number]
    return (not one.sparse and first_run != ones) or len(first_run) < one.least_ways


@given(MASKS, st.integers(1, 3), st.booleans())
def test_a_mask_is_wrong_where_the_kernel_says_so(mask: int, least: int, sparse: bool) -> None:
    assert bool(fault(cache(least, sparse=sparse), mask)) == plain_fault(cache(least, sparse=sparse), mask)


@given(MASKS)
def test_runs_are_the_whole_mask(mask: int) -> None:
    found = list(runs(mask))
    assert sum(one.mask for one in found) == mask
    assert all(a.first + a.length < b.first for a, b in itertools.pairwise(found))
    assert longest(mask) == max((one.length for one in found), default=0)


@given(MASKS, st.integers(0, BITS + 1), st.integers(1, 3), st.booleans())
def test_ways_are_found_exactly_where_any_mask_of_them_is_free(free: int, ways: int, least: int, sparse: bool) -> None:
    one = cache(least, sparse=sparse)
    every = [mask for mask in range(1 << BITS) if mask.bit_count() == ways and not mask & ~free]
    possible = [mask for mask in every if not plain_fault(one, mask)]
    found = choose(one, free, ways)
    assert bool(found) == bool(possible)
    assert not found or found in possible


def test_a_sum_of_free_ways_promises_what_consecutive_ones_refuse() -> None:
    """Why ways are no capacity that the scheduler adds up (docs/decisions/0020)."""
    one, left, given = cache(full=0xF), 0xF, list[int]()
    for _ in range(4):
        given.append(choose(one, left, 1))
        left &= ~given[-1]
    assert (given, left) == ([1, 2, 4, 8], 0)
    left |= given[1] | given[3]
    assert (left.bit_count(), choose(one, left, 2)) == (2, 0)


@given(st.lists(st.tuples(st.integers(1, BITS), st.integers(0, 3)), max_size=20), st.integers(0, 1))
def test_a_sum_is_exact_where_masks_may_have_gaps(steps: list[tuple[int, int]], least: int) -> None:
    """Whatever claims come and go: so many ways can be given if so many are free."""
    one, left, given = cache(least, sparse=True), (1 << BITS) - 1, list[int]()
    for ways, ends in steps:
        mask = choose(one, left, ways)
        assert bool(mask) == (ways <= left.bit_count())
        left &= ~mask
        given += [mask] * bool(mask)
        if ends < len(given):
            left |= given.pop(ends)


@given(MASKS, st.integers(1, BITS))
def test_the_smallest_run_that_fits_is_taken(free: int, ways: int) -> None:
    found = choose(cache(), free, ways)
    if found:
        of = next(one for one in runs(free) if one.mask & found)
        assert of.length == min(one.length for one in runs(free) if one.length >= ways)
        assert found & -found == 1 << of.first


@given(MASKS, st.integers(0, BITS))
def test_the_lowest_and_the_highest_ways_of_a_mask(mask: int, ways: int) -> None:
    ones = [bit for bit in range(BITS) if mask >> bit & 1]
    enough = ways <= len(ones)
    assert lowest_of(mask, ways) == (sum(1 << bit for bit in ones[:ways]) if enough else 0)
    assert highest_of(mask, ways) == (sum(1 << bit for bit in ones[len(ones) - ways :]) if enough else 0)


@given(MASKS, MASKS, MASKS, st.integers(1, BITS), st.integers(1, 2), st.booleans())
def test_ways_are_set_aside_where_the_default_group_stays_valid(
    root: int, foreign: int, hardware: int, ways: int, least: int, sparse: bool
) -> None:
    one = cache(least, sparse=sparse, hardware=hardware)
    windows = [((1 << ways) - 1) << first for first in range(BITS - ways + 1)]
    possible = [mask for mask in windows if not mask & hardware and not plain_fault(one, root & ~mask)]
    found = set_aside([one], [root], foreign, ways)
    assert bool(found) == bool(possible)
    if found:
        prices = [((foreign & mask).bit_count(), (root & mask).bit_count(), mask) for mask in possible]
        assert ((foreign & found).bit_count(), (root & found).bit_count(), found) == min(prices)


def test_the_low_end_is_set_aside_where_devices_use_the_high_one() -> None:
    intel = cache(full=0x7FF, hardware=0x600)
    assert set_aside([intel], [0x7FF], 0, 4) == 0xF
    assert set_aside([cache(full=0x7FF, hardware=0x3)], [0x7FF], 0, 4) == 0x780
    assert set_aside([intel], [0x7FF], 0, 9) == 0x1FF
    assert set_aside([intel], [0x7FF], 0, 10) == 0


def test_where_an_admin_has_left_ways_to_nobody_these_are_set_aside() -> None:
    assert set_aside([cache()], [0x0FF], 0, 1) == 0x100
