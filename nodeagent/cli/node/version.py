"""`nodeagent version`: the version of this program and of the agent that runs."""

from __future__ import annotations

import argparse
from typing import Any

from nodeagent.cli.output import forms
from nodeagent.cli.shared import ask
from nodeagent.errors import PeerError
from nodeagent.version import VERSION

EXAMPLES = (
    ("nodeagent version", "of this program and of the agent, if one answers"),
    ("nodeagent version -o jsonpath='{.agent.version}'", "of the agent alone; empty if none answers"),
)
AGENT_S = 2.0
"""How long an agent may take to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent version`."""
    ask.add_socket(parser)
    forms.add_output(parser, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    document = {"client": client(), "agent": _agent(args.socket)}
    forms.write(args, document, lambda shown: _print(args.socket, shown))
    return 0


def client() -> dict[str, Any]:
    """Return the version of this program, whether its core is compiled, as the core reports it, and the core's file."""
    import nodeagent._fastpath as core

    compiled = bool(core.COMPILED) and not str(core.__file__).endswith((".py", ".pyc"))
    return {"version": VERSION, "core_compiled": compiled, "core": str(core.__file__)}


def line(one: dict[str, Any]) -> str:
    """Return the version of this program in one line."""
    kind = "compiled" if one["core_compiled"] else "NOT compiled"
    return f"nodeagent {one['version']} (core: {kind}, {one['core']})"


def _agent(socket: str) -> dict[str, Any] | None:
    try:
        status = ask.ask(socket, "/v1/status", timeout_s=AGENT_S)
    except PeerError:
        return None
    return {"version": status["version"], "ready": status["ready"], "uptime_s": status["uptime_s"]}


def _print(socket: str, shown: dict[str, Any]) -> None:
    print(line(shown["client"]))
    agent = shown["agent"]
    if agent is None:
        print(f"agent: none answers at {socket}")
    else:
        print(f"agent {agent['version']}, up {agent['uptime_s']} s, {'ready' if agent['ready'] else 'NOT ready'}")
