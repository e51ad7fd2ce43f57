"""What the log looks like: lines of JSON for machines, colours for a person at a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from nodeagent.telemetry import log as log_of


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_without_a_terminal_each_event_is_a_line_of_json() -> None:
    out = io.StringIO()
    log_of.configure("info", "auto", out)
    structlog.get_logger().info("granted", resource="a/b", ids=("0", "1"), text="two\nlines")
    (line,) = lines(out)
    assert line["event"] == "granted"
    assert line["level"] == "info"
    assert line["ids"] == ["0", "1"]
    assert line["text"] == "two\nlines"
    assert str(line["timestamp"]).endswith("Z")


def test_an_error_carries_its_traceback_in_the_same_line() -> None:
    out = io.StringIO()
    log_of.configure("info", "json", out)
    try:
        raise ValueError("broken")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
    (line,) = lines(out)
    assert "ValueError: broken" in str(line["exception"])


def test_an_error_is_said_although_its_traceback_cannot_be_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> str:
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(log_of._EXCEPTIONS, "format_exception", fails)
    out = io.StringIO()
    log_of.configure("info", "json", out)
    structlog.get_logger().error("failed", exc_info=ValueError("broken"))
    assert lines(out)[0]["exception"] == "ValueError('broken')"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("form", ["json", "console"])
def test_a_full_disk_costs_the_line_and_not_the_call_that_logs(form: str) -> None:
    with contextlib.suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:
        log_of.configure("info", form, full)
        structlog.get_logger().error("granted", n=3)
        said = "the call goes on"
    assert said


def test_a_reader_that_has_gone_costs_the_line_and_not_the_call_that_logs() -> None:
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(OSError), os.fdopen(write, "w") as pipe:
        log_of.configure("info", "json", pipe)
        structlog.get_logger().warning("granted", n=3)
        said = "the call goes on"
    assert said


def test_a_closed_stream_costs_the_line_and_not_the_call_that_logs() -> None:
    out = io.StringIO()
    log_of.configure("info", "json", out)
    logger = structlog.get_logger()
    out.close()
    logger.exception("failed")


@pytest.mark.parametrize(("level", "kept"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_not_said(level: str, kept: int) -> None:
    out = io.StringIO()
    log_of.configure(level, "json", out)
    for name in ("debug", "info", "warning", "error"):
        structlog.get_logger().log({"debug": 10, "info": 20, "warning": 30, "error": 40}[name], name)
    assert len(lines(out)) == kept


def test_a_level_changes_for_loggers_that_exist_already() -> None:
    """A reload takes effect everywhere."""
    logger = structlog.get_logger()
    first, second = io.StringIO(), io.StringIO()
    log_of.configure("error", "json", first)
    logger.info("unheard")
    log_of.configure("info", "json", second)
    logger.info("heard")
    assert (first.getvalue(), [line["event"] for line in lines(second)]) == ("", ["heard"])


def test_all_lines_of_a_call_have_its_op() -> None:
    out = io.StringIO()
    log_of.configure("info", "json", out)
    with structlog.contextvars.bound_contextvars(op=log_of.new_op()):
        structlog.get_logger().info("one")
        structlog.get_logger("elsewhere").info("two")
    structlog.get_logger().info("three")
    one, two, three = lines(out)
    assert one["op"] == two["op"]
    assert "op" not in three
    assert log_of.new_op() != log_of.new_op()


def test_on_a_terminal_it_is_for_people(tmp_path: Path) -> None:
    """A real terminal: a pty."""
    ours, theirs = pty.openpty()
    said = "import structlog; from nodeagent.telemetry import log\n"
    said += "log.configure(); structlog.get_logger().info('granted', n=3)"
    subprocess.run([sys.executable, "-c", said], stderr=theirs, check=True, timeout=30)
    os.close(theirs)
    text = os.read(ours, 4096).decode()
    os.close(ours)
    assert "granted" in text and "n" in text
    assert not text.startswith("{")
    assert "\x1b[" in text
