"""Which devices are linked each with each, compared with trying every set."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.placement.linked import MOST_MEMBERS, complete_groups

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
