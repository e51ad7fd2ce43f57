"""Colours on terminals: exact where the terminal has all of them, the nearest elsewhere, none where none are wanted."""

from __future__ import annotations

import pytest

from nodeagent.cli.picture.lines import Span
from nodeagent.cli.picture.terminal import print_lines, style_of


@pytest.mark.parametrize("colour", ["#000000", "#ff0000", "#5f87af", "#ffffff", "#7a8b9c"])
def test_a_terminal_of_256_colours_shows_the_nearest(colour: str) -> None:
    levels = (0, 95, 135, 175, 215, 255)
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    number = int(style_of(colour, {}).removeprefix("30;48;5;")) - 16
    shown = [levels[number // part % 6] for part in (36, 6, 1)]
    for one, found in zip(wanted, shown, strict=True):
        assert abs(one - found) <= min(abs(one - level) for level in levels) + 20


def test_a_terminal_of_all_colours_shows_it_exactly() -> None:
    assert style_of("#102030", {"COLORTERM": "truecolor"}) == "30;48;2;16;32;48"


@pytest.mark.parametrize(("environ", "coloured"), [({"NO_COLOR": "1"}, False), ({"CLICOLOR_FORCE": "1"}, True)])
def test_only_what_belongs_to_a_holder_is_coloured_and_only_if_it_is_wanted(
    environ: dict[str, str], coloured: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    print_lines([(Span("node 0  "), Span("aaaa", 0))])
    said = capsys.readouterr().out
    assert said.startswith("node 0  ") and "aaaa" in said
    assert ("\x1b[" in said) is coloured
