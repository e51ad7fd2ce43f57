"""Queries a running agent over its status socket.

HTTP/1.1 is spoken here in a few lines: importing the standard library's client alone takes longer than everything else
that `nodeagent status` does.
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from nodeagent.errors import ConfigError, PeerError, cause_of

SOCKET = "/run/nodeagent/status.sock"
TIMEOUT_S = 10.0
"""For a whole answer."""
LARGEST_ANSWER_BYTES = 256 << 20
OK, CONFLICT = 200, 409
_CHUNK_BYTES = 1 << 16


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the agent to ask."""
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"the agent's status socket ({SOCKET})")


def pages(args: argparse.Namespace) -> Callable[[str], Any]:
    """Return what reads a page: of a capture that is replayed, else of the running agent."""
    replayed = getattr(args, "facts", None)
    return replayed.page if replayed is not None else lambda page: ask(args.socket, page)


def now_s(args: argparse.Namespace) -> float:
    """Return the time of the answers in seconds since the epoch: that of a capture that is replayed, else now."""
    replayed = getattr(args, "facts", None)
    return float(replayed.now_s) if replayed is not None else time.time()


def ask(path: str, page: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Return the JSON of one page. Raise PeerError if the agent does not answer in time."""
    return request(path, "GET", page, timeout_s=timeout_s)


def request(path: str, method: str, page: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """Return the JSON that answers a request. Raise PeerError if the agent does not answer in time or refuses it, and
    ConfigError if it refuses its configuration."""
    status, body = _answer(path, method, page, timeout_s)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"cannot ask the agent at {path}: {cause_of(error)}") from None
    if status == OK:
        return document
    reason = document.get("error") if isinstance(document, dict) else None
    if status == CONFLICT and reason:
        raise ConfigError(reason)
    raise PeerError(reason or f"cannot {method} {page} at {path}: HTTP status {status}")


def text(path: str, page: str) -> str:
    """Return a page that is text. Raise PeerError if the agent does not answer or refuses it."""
    status, body = _answer(path, "GET", page, TIMEOUT_S)
    if status != OK:
        raise PeerError(f"cannot read {page} at {path}: HTTP status {status}")
    return body.decode(errors="replace")


def _answer(path: str, method: str, page: str, timeout_s: float) -> tuple[int, bytes]:
    """Return the status and the body of an answer. Raise PeerError if there is none."""
    head = f"{method} {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    try:
        return _parsed(_exchange(path, head.encode("ascii"), time.monotonic() + timeout_s))
    except (OSError, ValueError) as error:
        raise PeerError(f"cannot ask the agent at {path}: {cause_of(error)}") from None


def _exchange(path: str, message: bytes, deadline_s: float) -> bytes:
    """Return everything that the agent sends until it closes the connection. Raise OSError if that takes too long, and
    ValueError if it is too much."""
    found = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_left(deadline_s))
        connection.connect(path)
        connection.sendall(message)
        while part := connection.recv(_CHUNK_BYTES):
            found += part
            if len(found) > LARGEST_ANSWER_BYTES:
                raise ValueError(f"its answer is larger than {LARGEST_ANSWER_BYTES >> 20} MiB")
            connection.settimeout(_left(deadline_s))
    return bytes(found)


def _left(deadline_s: float) -> float:
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _parsed(message: bytes) -> tuple[int, bytes]:
    """Return the status and the body of a whole HTTP/1.1 answer. Raise ValueError if it is none."""
    head, separator, body = message.partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    code = rest[:3]
    if not separator or not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit() and len(code) == 3):
        raise ValueError(f"expected an answer in HTTP, not {first[:40]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or int(length[:12]) != len(body):
        raise ValueError(f"its answer has {len(body)} bytes, expected Content-Length: {length[:20] or 'missing'}")
    return int(code), body
