"""`nodeagent web`: the agent's page in a browser on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping

from nodeagent.admin.http import HttpAnswer, HttpRequest
from nodeagent.admin.listener import HttpListener
from nodeagent.cli.shared.ask import SOCKET, ask
from nodeagent.cli.web.gate import ADDRESS, Gate
from nodeagent.cli.web.upstream import Upstream
from nodeagent.errors import HostError, InputError

EXAMPLES = (
    ("nodeagent web", "open the page of this node's agent in a browser"),
    ("nodeagent web --port 8080 --no-open", "print the address, for a browser behind `ssh -L 8080:127.0.0.1:8080`"),
)
DONE = 0
HIGHEST_PORT = 65535
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent web`."""
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"the agent's status socket ({SOCKET})")
    parser.add_argument("--port", metavar="N", default="0", help=f"port of {ADDRESS} (default: a free one)")
    parser.add_argument("--no-open", action="store_true", help="print the address and open no browser")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    port = _port(args.port)
    ask(args.socket, "/v1/status")  # where no agent answers, say so at once
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        asyncio.run(_serve(args.socket, _bound(port), opens=not args.no_open))
    return DONE


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= HIGHEST_PORT):
        raise InputError(f"cannot use --port {text[:20]!r}: expected a number from 0 to {HIGHEST_PORT}")
    return int(text)


def _bound(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((ADDRESS, port))
    except OSError as error:
        bound.close()
        raise HostError(f"cannot listen on {ADDRESS}:{port}: {error.strerror}") from None
    return bound


async def _serve(path: str, bound: socket.socket, *, opens: bool) -> None:
    """Serve the page until cancelled."""
    port = bound.getsockname()[1]
    gate, upstream = Gate(port), Upstream(path)

    async def handle(request: HttpRequest) -> HttpAnswer:
        return gate.answer(request) or await upstream.pass_on(request)

    listener = HttpListener(handle)
    listener.start(bound)
    address = f"http://{ADDRESS}:{port}{gate.address_of_page}"
    print(f"{address}\nThe address is good for one browser. Ctrl-C ends it.", flush=True)
    if opens and (words := browser(address, os.environ)):
        _open(words)
    try:
        await asyncio.Event().wait()
    finally:
        await listener.stop()


def browser(address: str, env: Mapping[str, str]) -> list[str]:
    """Return the command that opens an address, or [] if this machine has no browser to open: the first program of
    $BROWSER (where `%s` stands for the address) that there is, else xdg-open, if there is a display."""
    for one in filter(None, env.get("BROWSER", "").split(":")):
        words = shlex.split(one)
        if words and shutil.which(words[0]):
            return [word.replace("%s", address) for word in words] if "%s" in one else [*words, address]
    if any(env.get(name) for name in DISPLAYS) and (opener := shutil.which("xdg-open")):
        return [opener, address]
    return []


def _open(words: list[str]) -> None:
    """Start a browser, which outlives this program."""
    try:
        quiet = subprocess.DEVNULL
        subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError as error:
        print(f"nodeagent: cannot start {words[0]}: {error.strerror}", file=sys.stderr)
