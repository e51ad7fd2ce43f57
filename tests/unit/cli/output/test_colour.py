"""When output is coloured."""

from __future__ import annotations

import io

import pytest

from nodeagent.cli.output import colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "terminal", "pipe"),
    [
        ({}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"CLICOLOR_FORCE": "1"}, True, True),
        ({"CLICOLOR_FORCE": "0"}, True, False),
        ({"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, False, False),
    ],
)
def test_the_environment_and_the_terminal_decide(environ: dict[str, str], terminal: bool, pipe: bool) -> None:
    assert (colour.is_wanted(Terminal(), environ), colour.is_wanted(io.StringIO(), environ)) == (terminal, pipe)


@pytest.mark.parametrize(("when", "coloured"), [("always", True), ("never", False), ("auto", False)])
def test_the_option_overrides_the_environment(when: str, coloured: bool) -> None:
    for environ in ({}, {"NO_COLOR": "1"}, {"CLICOLOR_FORCE": "1"}):
        before = colour.is_wanted(io.StringIO(), environ)
        colour.choose(when, environ)
        assert colour.is_wanted(io.StringIO(), environ) == (before if when == "auto" else coloured)
