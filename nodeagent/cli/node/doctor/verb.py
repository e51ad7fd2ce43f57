"""`nodeagent doctor`: about fifty checks of this node, what each saw, and what to do.

It works before there is an agent, while one runs and after it has ended. It runs nothing and changes nothing. Exit code
0: all is well; 1: warnings, or something is unknown; 2: failures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.node.doctor import show
from nodeagent.cli.node.doctor.model import Check, Finding
from nodeagent.cli.node.doctor.node import Node
from nodeagent.cli.node.doctor.registry import exit_code, findings
from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.shared.ask import SOCKET
from nodeagent.cli.shared.facts import Facts, facts_of
from nodeagent.cli.shared.source import add_root, check_root
from nodeagent.errors import InputError, NodeagentError, PeerError

EXAMPLES = (
    ("nodeagent doctor", "what on this node hinders the agent, and what to do"),
    ("nodeagent doctor --fix-hint", "with commands to copy; none of them is run"),
    ("nodeagent doctor -o json", "for a program"),
)
EXIT_CODES = {1: "warnings", 2: "failures, or bad input"}
REPLAYABLE = True
FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent doctor`."""
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="how to write it")
    parser.add_argument("-a", "--all", action="store_true", help="also show the checks that do not apply here")
    parser.add_argument("--fix-hint", action="store_true", help="print commands to copy; nothing is run")
    parser.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
    parser.add_argument("--kubelet-dir", metavar="DIR", help="kubelet's folder (default: the configuration's)")
    parser.add_argument("--state-dir", metavar="DIR", help="the ledger's folder (default: the configuration's)")
    parser.add_argument("--socket", metavar="PATH", help=f"the agent's status socket ({SOCKET})")
    add_root(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    found: list[tuple[Check, Finding]] = []
    seen = _kept(findings(node_of(args)), found)
    if args.fix_hint:
        show.print_commands(seen)
    elif args.output == "json":
        show.print_json(seen)
    else:
        show.print_findings(seen, everything=args.all)
    return exit_code(found)


def compare(config_file: Path, root: str | None) -> int:
    """Print what the checks that concern the configuration have against this one. Return 1 if one fails, else 0."""
    args = argparse.Namespace(
        config=str(config_file), root=root, kubelet_dir=None, state_dir=None, socket=None, facts=None
    )
    found = list(findings(node_of(args), configuration=True))
    show.print_findings(found, everything=False)
    return int(exit_code(found) == FAILED)


def _kept(seen: Iterator[tuple[Check, Finding]], kept: list[tuple[Check, Finding]]) -> Iterator[tuple[Check, Finding]]:
    """Yield findings as they come, and keep them."""
    for one in seen:
        kept.append(one)
        yield one


def node_of(args: argparse.Namespace) -> Node:
    """Return the node that the options name: a replayed capture, a captured tree, or this machine."""
    replayed: Facts | None = getattr(args, "facts", None)
    given = {"config_file": args.config, "kubelet_dir": args.kubelet_dir}
    if args.config and not Path(args.config).exists():
        raise InputError(f"cannot read --config {args.config}: there is no such file")
    paths: dict[str, Any] = {name: Path(one) for name, one in given.items() if one}
    if replayed is not None:
        return Node(
            root=replayed.root,
            page=replayed.page,
            live=False,
            now_s=replayed.now_s,
            state_dir=replayed.state_dir,
            config_file=replayed.config_file,
            kubelet_dir=replayed.kubelet_dir,
        )
    if args.state_dir:
        paths["state_dir"] = Path(args.state_dir)
    if args.root is not None:
        check_root(args.root)
        facts = msgspec.structs.replace(_live(args, SOCKET), page=_no_page, root=args.root)
        return Node(root=args.root, page=facts.page, live=False, now_s=facts.now_s, **paths)
    return _here(args, paths)


def _here(args: argparse.Namespace, paths: dict[str, Any]) -> Node:
    draft = Node(root="/", page=_no_page, live=True, now_s=0.0, **paths)
    socket = args.socket or _socket(draft)
    facts = _live(args, socket)
    return Node(root="/", page=facts.page, live=True, now_s=facts.now_s, socket=Path(socket), **paths)


def _socket(node: Node) -> str:
    """Return the configured status socket, or the default one where the configuration cannot be read."""
    try:
        return str(node.socket)
    except (NodeagentError, OSError):
        return SOCKET


def _live(args: argparse.Namespace, socket: str) -> Facts:
    return facts_of(argparse.Namespace(socket=socket, state_dir=args.state_dir or ""))


def _no_page(path: str) -> Any:
    raise PeerError(f"cannot read {path}: a captured tree has no agent")
