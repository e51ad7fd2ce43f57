"""Ages and folded names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli.output.words import age, folded


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (10799, "179m"),
        (10800, "3h"),
        (172799, "47h"),
        (172800, "2d"),
        (-5, "0s"),
    ],
)
def test_an_age_has_one_unit(seconds: int, shown: str) -> None:
    assert age(1_000_000.0, 1_000_000.0 + seconds) == shown


def test_an_age_that_is_not_known_is_empty() -> None:
    assert age(0.0, 1_000_000.0) == ""


def test_runs_of_numbers_are_folded() -> None:
    names = ["cpu8", "cpu0", "cpu1", "cpu2", "0000:41:00.0", "0000:41:00.1", "fuse", "cpu01"]
    assert folded(names) == "cpu0-2,8 0000:41:00.0-1 fuse cpu01"


def unfolded(text: str) -> Iterator[str]:
    """The names that a folded text stands for, by its plain meaning."""
    for word in text.split():
        found = re.fullmatch(r"(.*?)(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)", word)
        if found is None or ("-" not in found[2] and "," not in found[2]):
            yield word
            continue
        for run in found[2].split(","):
            first, _, last = run.partition("-")
            yield from (f"{found[1]}{number}" for number in range(int(first), int(last or first) + 1))


@given(st.sets(st.from_regex(r"[a-z:.]{1,4}[0-9]{0,3}", fullmatch=True)))
def test_folding_loses_and_invents_nothing(names: set[str]) -> None:
    assert set(unfolded(folded(sorted(names)))) == names
