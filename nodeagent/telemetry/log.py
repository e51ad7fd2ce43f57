"""Logging: events with fields. Console format on a terminal, JSON lines otherwise; one op id per call (contextvars).

A line that cannot be written, because the disk is full or its reader has gone, is lost; the call that logs goes on.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
from typing import Any, TextIO

import structlog

_EXCEPTIONS = structlog.processors.ExceptionRenderer()


class _Lines(structlog.WriteLogger):
    """Writes lines to a stream, as far as it takes them."""

    def msg(self, message: str) -> None:
        """Write a line, unless the stream refuses it or is closed."""
        with contextlib.suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def configure(level: str = "info", form: str = "auto", stream: TextIO | None = None) -> None:
    """Set up logging for the whole process. form: auto, console or json."""
    out = sys.stderr if stream is None else stream
    console = form == "console" or (form == "auto" and out.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(_traceback),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: _Lines(out),
        cache_logger_on_first_use=False,
    )


def _traceback(exc_info: Any) -> str:
    """Return an exception with its traceback, or without it where CPython 3.11 fails to parse the line that it shows
    because a finalizer that runs meanwhile parses too (gh-106905)."""
    try:
        return str(_EXCEPTIONS.format_exception(exc_info))
    except SystemError:
        return repr(exc_info[1])


def new_op() -> str:
    """Return a short id for one call, to find all its log lines by."""
    return secrets.token_hex(4)
