"""Moments on the command line and in tables: in local time for people, in RFC 3339 and UTC for programs."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from nodeagent.cli.shared.request_options import shortened
from nodeagent.errors import InputError

FORMS = "03:12, 2026-11-28, '2026-11-28 03:12', 2026-11-28T02:12:00Z, 90m, 2h or 3d (ago), today, yesterday or now"
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_AGO = re.compile(r"-?(\d{1,6})(s|m|min|h|d|w)(?: ago)?")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def moment(text: str, now_s: float, *, option: str) -> float:
    """Return a moment in seconds since the epoch. Raise InputError, naming the option, if it is none.

    A time without a date is the latest such time that has passed; one without a zone is local. now_s: the present
    moment.
    """
    try:
        found = _relative(text.strip(), now_s)
        return _absolute(text.strip()) if found is None else found
    except (ValueError, OverflowError, OSError):
        raise InputError(f"cannot use {option} {shortened(text)}: expected {FORMS}") from None


def _relative(text: str, now_s: float) -> float | None:
    """Return a moment that depends on the present one, or None if it is none of that kind."""
    now = datetime.fromtimestamp(now_s)  # noqa: DTZ006 - local time is meant
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if text in ("now", "today", "yesterday"):
        return {"now": now_s, "today": midnight.timestamp(), "yesterday": _day_before(midnight).timestamp()}[text]
    if ago := _AGO.fullmatch(text):
        return now_s - int(ago[1]) * _SECONDS[ago[2]]
    if clock := _CLOCK.fullmatch(text):
        today = midnight.replace(hour=int(clock[1]), minute=int(clock[2]), second=int(clock[3] or 0))
        return (today if today.timestamp() <= now_s else _day_before(today)).timestamp()
    return None


def _day_before(local: datetime) -> datetime:
    return local - timedelta(days=1)


def _absolute(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def local(at_s: float) -> str:
    """Return a moment in local time with its zone, to the second."""
    return datetime.fromtimestamp(at_s).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def rfc3339(at_s: float) -> str:
    """Return a moment in UTC, to the millisecond."""
    text = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
