"""`nodeagent replay`: another verb on a captured node, with the answers that it gave there."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from nodeagent.errors import InputError

EXAMPLES = (
    ("nodeagent replay node.tar.zst status", "how the agent stood when the node was captured"),
    ("nodeagent replay node.tar.zst explain pod shop/till", "as on the node itself"),
)
EXIT_CODES = {3: "refused, by the other command"}
FOREIGN = ("root", "socket", "state_dir", "kubelet_dir", "config", "watch")
"""Options that name another node, or wait for changes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent replay`."""
    parser.add_argument("file", metavar="FILE", help="what `nodeagent capture` wrote, or a folder with a captured tree")
    parser.add_argument("other", metavar="VERB", help="the command to run on it")
    parser.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="its options")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return the exit code of the other one."""
    from nodeagent.cli.node.replay.opened import opened

    module, other = _parsed(args.other, args.words)
    with opened(Path(args.file)) as facts:
        other.facts = facts
        try:
            return int(module.run(other))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            why = f"its pages are not those of an agent ({type(error).__name__}: {error})"
            raise InputError(f"cannot replay {args.file}: {why}") from error


def _parsed(verb: str, words: list[str]) -> tuple[Any, argparse.Namespace]:
    """Return the module of a verb that can be replayed, and its options. Raise InputError if it cannot."""
    from nodeagent import cli
    from nodeagent.cli.help.parser import Parser

    if verb not in cli.VERBS or not replayable(verb):
        raise InputError(f"cannot replay {verb}: expected one of {', '.join(filter(replayable, cli.VERBS))}")
    module, usual = _module(verb), Parser(add_help=False)
    other = cli.parser([verb]).parse_args([verb, *words])
    module.add_arguments(usual)
    for name in FOREIGN:
        if getattr(other, name, None) != usual.get_default(name):
            raise InputError(f"cannot use --{name.replace('_', '-')} with a capture: it is of one node at one moment")
    return module, other


def replayable(verb: str) -> bool:
    """Return whether a verb takes everything from Facts, as its module declares."""
    return bool(getattr(_module(verb), "REPLAYABLE", False))


def _module(verb: str) -> Any:
    from nodeagent import cli

    return importlib.import_module(f"nodeagent.cli.{cli.VERBS[verb].module}")
