"""`nodeagent wait`: wait until the agent is as it should be."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nodeagent.cli.shared import ask
from nodeagent.errors import InputError, PeerError

EXAMPLES = (
    ("nodeagent wait", "until the agent is ready, for at most a minute"),
    ("nodeagent wait --for=registered --timeout=5m", "until kubelet has registered all that is served"),
    ("nodeagent wait --for=whole --timeout=0", "only look whether the ledger is whole"),
)
EXIT_CODES = {1: "it was not so in time"}
LOOK_S = 0.2
_DURATION = re.compile(r"(?=\d)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6}(?:\.\d{1,6})?)s?)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent wait`."""
    parser.add_argument(
        "--for",
        dest="condition",
        choices=list(CONDITIONS),
        default="ready",
        help="ready: as /readyz (the default); whole: the ledger accounts for all that is in use; "
        "registered: kubelet has registered all that is served",
    )
    parser.add_argument("--timeout", metavar="TIME", default="60s", help="such as 90s, 5m or 1h; 0: look once (60s)")
    ask.add_socket(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    deadline_s = time.monotonic() + seconds(args.timeout)
    while True:
        left_s = deadline_s - time.monotonic()
        why = _why_not(args, min(max(left_s, 1.0), ask.TIMEOUT_S))
        if why is None:
            print(args.condition)
            return 0
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise PeerError(f"cannot wait longer than {args.timeout} for {args.condition}: {why}")
        time.sleep(min(LOOK_S, left_s))


def seconds(text: str) -> float:
    """Return the seconds of a time such as 90, 90s, 5m or 1h30m. Raise InputError if it is none."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise InputError(f"cannot use --timeout {text[:40]!r}: expected a time such as 90s, 5m or 1h30m")
    hours, minutes, rest = found.groups()
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(rest or 0)


def _why_not(args: argparse.Namespace, timeout_s: float) -> str | None:
    """Return why a condition does not hold now, or None if it does."""
    try:
        status = ask.ask(args.socket, "/v1/status", timeout_s=timeout_s)
    except PeerError as error:
        return str(error)
    return next(CONDITIONS[args.condition](status), None)


def _not_ready(status: Any) -> Iterator[str]:
    yield from status["not_ready"]


def _not_whole(status: Any) -> Iterator[str]:
    if not status["ledger"]["whole"]:
        yield f"ledger: {status['ledger']['loss']}"


def _not_registered(status: Any) -> Iterator[str]:
    for one in status["resources"]:
        if not one["registered"]:
            yield f"{one['name']}: {one['registration']}"
    dra = status["dra"]
    if dra and not dra["registered"]:
        yield f"{dra['driver']}: {dra['reason'] or dra['registration']}"


CONDITIONS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "ready": _not_ready,
    "whole": _not_whole,
    "registered": _not_registered,
}
"""What can be waited for; each yields why it does not hold."""
