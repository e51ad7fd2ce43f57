"""Logging a condition when it changes instead of each time it is met."""

from __future__ import annotations

from typing import Any

import structlog

log = structlog.get_logger()


class Once:
    """One condition, such as "the file cannot be read: CAUSE". It is logged when its text differs from the last one."""

    def __init__(self, event: str, *, level: str = "warning") -> None:
        """event: name of the log event. level: a structlog level, such as "warning"."""
        self._event = event
        self._level = level
        self.last = ""
        """The text that was last logged; empty if the condition does not hold."""

    def report(self, text: str, **fields: Any) -> None:
        """Log the text as `error`, with more fields, unless it equals the last one. "" is
        never logged and clears it."""
        if text and text != self.last:
            getattr(log, self._level)(self._event, error=text, **fields)
        self.last = text

    def clear(self) -> None:
        """Note that the condition no longer holds, so it is logged again when it next does."""
        self.last = ""
