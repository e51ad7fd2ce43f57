"""What an admin reads gives each reason once, with all that it is the reason for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import example, given
from hypothesis import strategies as st

from nodeagent.admin.reasons import merged, once

ENOENT = "No such file or directory"
CLAUSES = st.lists(st.sampled_from(["a", "b", "not shown", "kubelet is away", ENOENT]), min_size=1, max_size=4)
LINES = st.lists(CLAUSES.map(": ".join), max_size=8)


def reasons(line: str) -> set[str]:
    """A line and its ends after each colon; single words are states, and the kernel's words no reason alone."""
    clauses = line.split(": ")
    return {text for number in range(len(clauses)) if " " in (text := ": ".join(clauses[number:])) and text != ENOENT}


def given_twice(lines: Iterable[str]) -> list[str]:
    """The reasons that more than one line gives."""
    return [reason for reason, times in Counter(one for line in lines for one in reasons(line)).items() if times > 1]


def test_subjects_of_one_reason_become_one_line_in_the_place_of_the_first() -> None:
    lines = ["cpu: waiting for kubelet", "ledger: x", "gpu: waiting for kubelet", "dra: not shown: waiting for kubelet"]
    assert merged(lines) == ["cpu, gpu, dra: not shown: waiting for kubelet", "ledger: x"]


def test_a_line_stands_once_and_what_has_no_subject_stays_as_it_is() -> None:
    assert merged(["it is so", "it is so", "b: it is so", "alone"]) == ["b: it is so", "alone"]
    assert merged([f"a: {ENOENT}", f"b: {ENOENT}"]) == [f"a: {ENOENT}", f"b: {ENOENT}"], (
        "nor are the kernel's words alone"
    )
    assert merged(["a: none", "b: none"]) == ["a: none", "b: none"], "one word is a state, not a reason"


@given(LINES)
@example(["a: x y", "b: c: x y", "d: c: x y"])
def test_no_reason_is_given_by_two_lines_and_none_is_lost(lines: list[str]) -> None:
    found = merged(lines)
    assert given_twice(found) == []
    for line in lines:
        assert any(set(line.split(": ")) <= set(one.replace(", ", ": ").split(": ")) for one in found), line


@given(st.lists(st.tuples(st.sampled_from(["not ready", "note", "dra"]), LINES), max_size=4))
def test_no_reason_is_given_in_two_sections(sections: list[tuple[str, list[str]]]) -> None:
    shown = [line.partition(": ")[2] for line in once(sections)]
    assert given_twice(shown) == []


def test_a_later_section_keeps_what_is_new_about_it() -> None:
    sections = [("not ready", ["pinning: it does not ask: no socket /x"]), ("pinning", ["NOT connected: no socket /x"])]
    assert list(once(sections)) == [
        "not ready: pinning: it does not ask: no socket /x",
        "pinning: NOT connected",
    ]
    assert list(once([("note", ["it is so"]), ("warning", ["it is so"])])) == ["note: it is so"]
