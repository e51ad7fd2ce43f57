"""Tables that fit a terminal: what is cut, and when rows become blocks."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli.output import fitting
from nodeagent.cli.shared import tables

HEADINGS = ("GRANT", "HOLDER", "CPUS", "NOTE")
ROWS = [("g-01", "shop/till/main", "0-3,128-131,64-67,192-195,16-19", ""), ("g-02", "claim shop/db", "", "held back")]


class Terminal(io.StringIO):
    """What a test writes to, with a width of its own."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, columns: int, *, whole: bool = False, encoding: str = "utf-8") -> list[str]:
    """The lines that a terminal of some columns gets."""
    terminal = Terminal()
    monkeypatch.setattr(terminal, "encoding", encoding, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", terminal)
    tables.print_table(HEADINGS, ROWS, whole=whole)
    return terminal.getvalue().splitlines()


def test_a_table_that_fits_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 120) == [
        "GRANT   HOLDER           CPUS                              NOTE",
        "g-01    shop/till/main   0-3,128-131,64-67,192-195,16-19   -",
        "g-02    claim shop/db    -                                 held back",
    ]


def test_the_widest_columns_are_cut_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 50)
    assert lines[1].startswith("g-01    shop/till/m") and "…" in lines[1]
    assert {len(line) <= 50 for line in lines} == {True}


def test_columns_that_are_empty_are_left_out_before_any_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROWS", [("g-01", "", "0-3,128-131,64-67,192-195,16-19", "")])
    assert shown(monkeypatch, 60) == [
        "GRANT   HOLDER   CPUS                              NOTE",
        "g-01    -        0-3,128-131,64-67,192-195,16-19   -",
    ]
    assert shown(monkeypatch, 45) == [
        "GRANT   CPUS",
        "g-01    0-3,128-131,64-67,192-195,16-19",
    ]


def test_nothing_is_cut_with_no_trunc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 50, whole=True) == shown(monkeypatch, 120)


def test_a_terminal_of_20_columns_gets_a_block_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 20) == [
        "GRANT  g-01",
        "HOLDER shop/till/main",
        "CPUS   0-3,128-131,64-67,192-195,16-19",
        "",
        "GRANT  g-02",
        "HOLDER claim shop/db",
        "NOTE   held back",
    ]


def test_a_terminal_without_unicode_gets_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 50, encoding="ascii")
    assert "~" in lines[1] and all(line.isascii() for line in lines)


def test_what_a_pipe_gets_is_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever COLUMNS says: scripts read it."""
    monkeypatch.setenv("COLUMNS", "20")
    tables.print_table(HEADINGS, ROWS)
    assert "0-3,128-131,64-67,192-195,16-19" in capsys.readouterr().out.splitlines()[1]


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A device may be called anything."""
    tables.print_table(("ID",), [("\x1b[2Jgone\nnext\x9b",)])
    assert capsys.readouterr().out == "ID\n?[2Jgone next?\n"


def test_zero_is_shown_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(("A", "B", "C"), [(0, None, "")])
    assert capsys.readouterr().out.splitlines()[1].split() == ["0", "-", "-"]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 200))
def test_widths_fit_and_cut_no_more_than_needed(natural: list[int], room: int) -> None:
    """Every column keeps what it has or LEAST; a narrower column is never cut before a wider one; no room is wasted."""
    found = fitting.widths_within(natural, room)
    gaps = len(fitting.GAP) * (len(natural) - 1)
    if found is None:
        least = natural[0] + sum(min(one, fitting.LEAST) for one in natural[1:])
        assert least + gaps > room
        return
    assert sum(found) + gaps <= room
    assert found[0] == natural[0]
    assert all(min(have, fitting.LEAST) <= got <= have for have, got in zip(natural, found, strict=True))
    if found != natural:
        assert sum(found) + gaps == room
        widest = max(found[1:])
        assert all(got >= widest - 1 for have, got in zip(natural, found, strict=True) if got < have)
