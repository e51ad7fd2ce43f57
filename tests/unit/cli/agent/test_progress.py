"""Progress is for terminals: what is written to a pipe or a file is the answer alone."""

from __future__ import annotations

import io
import sys

import pytest

from nodeagent.cli.agent.planning.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_shown_of_what_is_quick_or_not_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("nodeagent.cli.agent.planning.progress.time.monotonic", lambda: now[0])
    for stream, at_s, shown in ((Terminal(), 0.9, ""), (io.StringIO(), 5.0, ""), (Terminal(), 5.0, "\rtried 3 sets …")):
        monkeypatch.setattr(sys, "stderr", stream)
        now[0] = 0.0
        progress = Progress("tried {} sets")
        now[0] = at_s
        progress(3)
        assert stream.getvalue() == shown
        progress.end()
        assert stream.getvalue() == (f"{shown}\r\x1b[K" if shown else "")
