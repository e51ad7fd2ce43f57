"""`nodeagent release`: take a grant back by hand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nodeagent.cli.output import forms
from nodeagent.cli.shared import ask, grant_text
from nodeagent.errors import InputError, PeerError

EXAMPLES = (
    ("nodeagent release g-1f0c55ab12", "what the grant holds is free again; asks before"),
    ("nodeagent release g-1f0c55ab12 --yes", "without asking, as in scripts"),
)
FORMS = (forms.TABLE, forms.JSON, forms.YAML, forms.NAME, forms.JSONPATH)
OTHER_PLUGIN = "other-plugin"
"""Value of `api`: what another device plugin gave out, which is not ours to release."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent release`."""
    parser.add_argument("grants", metavar="GRANT", nargs="+", help="ids, as `nodeagent grants` shows them")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask; needed where there is no terminal")
    ask.add_socket(parser)
    forms.add_output(parser, FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    held = {one["id"]: one for one in ask.ask(args.socket, "/v1/grants")}
    wanted = [_found(held, identity) for identity in dict.fromkeys(args.grants)]
    if not args.yes and not _confirmed(wanted):
        print("nodeagent: nothing is released", file=sys.stderr)
        return 1
    gone: dict[str, Any] = {}
    for one in wanted:
        if one["id"] not in gone:  # a claim has all of its grants released at once
            now = ask.request(args.socket, "DELETE", f"/v1/grants/{_path(one['id'])}")
            gone |= {it["id"]: it for it in now}
            if args.output.kind == forms.TABLE:  # at once: the next one may fail
                print(*(f"released {_described(it)}" for it in now), sep="\n", flush=True)
    if args.output.kind != forms.TABLE:
        forms.write_list(args, list(gone.values()), (), name=lambda one: one["id"])
    return 0


def _found(held: Mapping[str, Any], identity: str) -> Any:
    """Return the grant of an id. Raise PeerError if there is none that can be released."""
    if identity not in held:
        from nodeagent.cli.help.parser import did_you_mean

        raise PeerError(f"cannot release {identity}: there is no such grant{did_you_mean(identity, held)}")
    if held[identity]["api"] == OTHER_PLUGIN:
        raise PeerError(f"cannot release {identity}: another device plugin gave it out")
    return held[identity]


def _confirmed(grants: Sequence[Any]) -> bool:
    """Return what the person at the terminal answers. Raise InputError if there is none."""
    if not sys.stdin.isatty():
        names = " ".join(one["id"] for one in grants)
        raise InputError(f"cannot release {names}: there is no terminal to ask at; give --yes")
    for one in grants:
        print(_described(one), file=sys.stderr)
    print("Processes that run on it are not stopped. Release it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _described(grant: Any) -> str:
    parts = (f"CPUs {grant['cpus']}" if grant["cpus"] else "", grant_text.memory(grant), " ".join(grant["devices"]))
    return f"{grant['id']} of {grant_text.holder(grant)}: {', '.join(filter(None, parts)) or grant['resource']}"


def _path(identity: str) -> str:
    """Return an id as part of an address."""
    from urllib.parse import quote

    return quote(os.fsencode(identity))
