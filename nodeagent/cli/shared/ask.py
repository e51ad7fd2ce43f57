"""Queries a running agent over its status socket."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from nodeagent.errors import PeerError, cause_of

SOCKET = "/run/nodeagent/status.sock"
TIMEOUT_S = 10.0
WATCH_S = 0.5
RESTLESS = frozenset({"uptime_s", "listed_at"})
VERBS = {"GET": "read", "DELETE": "clear"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of verbs that query a running agent."""
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"the agent's status socket ({SOCKET})")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument("-w", "--watch", action="store_true", help="show it again whenever it changes")


def show(args: argparse.Namespace, page: str, print_table: Callable[[Any], None]) -> int:
    """Print a page once, or, when watching, each time it changes; a watch survives a restart of the agent."""
    replayed = getattr(args, "facts", None)
    seen = ask(args.socket, page) if replayed is None else replayed.page(page)
    _print(args, seen, print_table)
    while args.watch:
        time.sleep(WATCH_S)
        try:
            document = ask(args.socket, page)
        except PeerError as error:
            if seen is not None:
                print(f"nodeagent: {error}", file=sys.stderr, flush=True)
            seen = None
            continue
        if _still(document) != _still(seen):
            _print(args, document, print_table)
        seen = document
    return 0


def _still(document: Any) -> Any:
    """Return a page without what changes although nothing happens."""
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if key not in RESTLESS}


def _print(args: argparse.Namespace, document: Any, print_table: Callable[[Any], None]) -> None:
    if args.output == "json":
        print(json.dumps(document, indent=1))
    else:
        print_table(document)
    sys.stdout.flush()


def ask(path: str, page: str) -> Any:
    """Return the JSON of one page. Raise PeerError if the agent does not answer."""
    return request(path, "GET", page)


def request(path: str, method: str, page: str) -> Any:
    """Return the JSON that answers a request. Raise PeerError if the agent does not answer or refuses it."""
    status, body = _answer(path, method, page)
    try:
        document = json.loads(body)
    except ValueError as error:
        raise PeerError(f"cannot ask the agent at {path}: {cause_of(error)}") from None
    if status != http.client.OK:
        reason = document.get("error", http.client.responses.get(status, status))
        raise PeerError(f"cannot {VERBS[method]} {page} at {path}: {reason}")
    return document


def text(path: str, page: str) -> str:
    """Return a page that is text. Raise PeerError if the agent does not answer or refuses it."""
    status, body = _answer(path, "GET", page)
    if status != http.client.OK:
        raise PeerError(f"cannot read {page} at {path}: {http.client.responses.get(status, status)}")
    return body.decode(errors="replace")


def _answer(path: str, method: str, page: str) -> tuple[int, bytes]:
    """Return the status and the body of an answer. Raise PeerError if there is none."""
    connection = _Connection(path)
    try:
        connection.request(method, page)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise PeerError(f"cannot ask the agent at {path}: {cause_of(error)}") from None
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
