"""Which devices are linked each with each, compared with trying every set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.placement.linked import MOST_MEMBERS, Pair, Weight, best_sets, complete_groups, linked_sets

IDS = "abcdefgh"
PAIRS = st.sets(st.sampled_from(list(combinations(IDS, 2))))


def _by_trying(pairs: set[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The largest sets first, each the first in order of id, of what earlier ones leave."""
    left, found = set(IDS), list[tuple[str, ...]]()
    for size in range(len(IDS), 1, -1):
        while group := next((one for one in combinations(sorted(left), size) if _complete(one, pairs)), None):
            found.append(group)
            left -= set(group)
    return found


def _complete(ids: tuple[str, ...], pairs: set[tuple[str, str]]) -> bool:
    return all(pair in pairs for pair in combinations(ids, 2))


@given(PAIRS)
def test_the_groups_are_those_that_trying_every_set_finds(pairs: set[tuple[str, str]]) -> None:
    assert list(complete_groups(pairs)) == _by_trying(pairs)


def test_a_node_with_sixteen_gpus_on_switches_is_one_group() -> None:
    ids = [f"0000:{bus:02x}:00.0" for bus in range(MOST_MEMBERS)]
    assert complete_groups(combinations(ids, 2)) == (tuple(ids),)


def test_two_quads_with_links_between_them_are_two_groups() -> None:
    """A hybrid cube mesh: every GPU of a quad is linked with one of the other."""
    quads = [*combinations("abcd", 2), *combinations("efgh", 2)]
    assert complete_groups([*quads, *zip("abcd", "efgh", strict=True)]) == (tuple("abcd"), tuple("efgh"))


# ---------------------------------------------------------------- ready-made sets

FEW = "abcdef"
WEIGHTS = st.dictionaries(
    st.sampled_from(list(combinations(FEW, 2))), st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=15
)
Sets = tuple[tuple[str, ...], ...]


def _every_choice(ids: tuple[str, ...], size: int, weights: Mapping[Pair, Weight]) -> Iterator[Sets]:
    """Every choice of disjoint sets that are linked each with each."""
    yield ()
    for one in combinations(ids, size):
        if all(pair in weights for pair in combinations(one, 2)):
            later = tuple(other for other in ids if other > one[0] and other not in one)
            yield from ((one, *others) for others in _every_choice(later, size, weights))


def _worth(sets: Sets, weights: Mapping[Pair, Weight]) -> tuple[int, int, int]:
    pairs = [weights[pair] for one in sets for pair in combinations(one, 2)]
    return len(sets), sum(links for links, _ in pairs), sum(places for _, places in pairs)


@given(WEIGHTS, st.sampled_from([2, 3, 4]))
def test_the_sets_are_the_best_of_all_choices(weights: dict[Pair, Weight], size: int) -> None:
    every = list(_every_choice(tuple(FEW), size, weights))
    best = max(_worth(one, weights) for one in every)
    found = best_sets(FEW, size, weights)
    assert _worth(found, weights) == best
    assert found == min(one for one in every if _worth(one, weights) == best)


@given(WEIGHTS)
def test_smaller_sets_lie_within_larger_ones_and_no_device_is_in_two_of_a_size(weights: dict[Pair, Weight]) -> None:
    found = linked_sets(weights)
    for sets in found.values():
        members = [one for some in sets for one in some]
        assert len(set(members)) == len(members)
        assert all(pair in weights for some in sets for pair in combinations(some, 2))
    quads = [set(one) for one in found.get(4, ())]
    for pair in found.get(2, ()):
        assert all(quad.isdisjoint(pair) or quad.issuperset(pair) for quad in quads)


def test_sets_follow_the_places_where_all_links_are_alike() -> None:
    """Eight GPUs on switches; every second one is on the other socket."""
    ids = "abcdefgh"
    weights = {(a, b): (100, 30 if (ord(a) - ord(b)) % 2 == 0 else 10) for a, b in combinations(ids, 2)}
    found = linked_sets(weights)
    assert found[8] == (tuple(ids),)
    assert found[4] == (("a", "c", "e", "g"), ("b", "d", "f", "h"))
    assert found[2] == (("a", "c"), ("b", "d"), ("e", "g"), ("f", "h"))


def test_sixteen_gpus_are_two_sets_of_eight() -> None:
    ids = "abcdefghijklmnop"
    found = linked_sets(dict.fromkeys(combinations(ids, 2), (100, 10)))
    assert {size: len(sets) for size, sets in found.items()} == {8: 2, 4: 4, 2: 8}
