"""`nodeagent map`: a picture of the machine, with who holds which part of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nodeagent.cli.picture.svg import svg_of
from nodeagent.cli.picture.terminal import columns, print_lines
from nodeagent.cli.picture.text import picture_lines
from nodeagent.cli.shared.facts import add_facts, facts_of
from nodeagent.cli.shared.held import ledger_of, online_cpus, read_grants
from nodeagent.cli.shared.node_state import NodeState, health_of
from nodeagent.cli.shared.request_options import RequestLine, add_request_options, request_of, written_request
from nodeagent.cli.shared.source import add_root, read_file, read_root
from nodeagent.cli.shared.tables import print_document
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.health import NO_HEALTH, Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement
from nodeagent.core.picture.document import to_document
from nodeagent.core.picture.draw import draw
from nodeagent.core.picture.values import Picture
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from nodeagent.host.sysfs import atomic_file

EXAMPLES = (
    ("nodeagent map", "who has which part of this machine"),
    ("nodeagent map --svg map.svg", "the same as a picture, for a ticket or a document"),
    ("nodeagent map --cpus 8 --devices gpu=2 --place", "where a request would go"),
)
EXIT_CODES = {3: "refused: the request of --place does not fit"}
REPLAYABLE = True
DONE, REFUSED = 0, 3
_OPTIONS = {"options": "--option", "memory_kind": "--memory-kind"}
"""Options of a request that are not named as its fields are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent map`."""
    add_facts(parser)
    add_root(parser)
    parser.add_argument("--inventory", metavar="FILE", help="read what `nodeagent inventory -o json` (or yaml) wrote")
    parser.add_argument("--state", metavar="FILE", help="what is held there, as `nodeagent grants -o json` writes it")
    parser.add_argument("--reserved", metavar="LIST", help="CPUs reserved there for the system, such as 0-1")
    parser.add_argument("--place", action="store_true", help="show also where the request of these options would go:")
    add_request_options(parser)
    parser.add_argument("-o", "--output", choices=["text", "json", "yaml"], default="text", help="how to write it")
    parser.add_argument("--svg", metavar="FILE", help="draw it into a file that does not exist yet")
    parser.add_argument("--force", action="store_true", help="with --svg: replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.svg is not None and not args.force:
        _check_new(Path(args.svg))
    try:
        picture = _picture(args)
    except Refused as refusal:
        print(f"refused: {refusal}")
        return REFUSED
    if args.svg is not None:
        _write(Path(args.svg), svg_of(picture))
    elif args.output != "text":
        print_document(to_document(picture), args.output)
    else:
        print_lines(picture_lines(picture, columns()))
    return DONE


def _check_new(path: Path) -> None:
    """Raise InputError if there is something at a path."""
    if os.path.lexists(path):
        raise InputError(f"cannot write --svg {path}: it exists; --force replaces it")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if (path.exists() and not path.is_file()) or path.is_symlink():
        raise InputError(f"cannot write --svg {path}: it is no regular file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write --svg {path}: there is no folder {path.parent}")
    atomic_file.replace(path, text.encode(errors="replace"), durable=False)


# ---------------------------------------------------------------- what is drawn


def _picture(args: argparse.Namespace) -> Picture:
    """Raise Refused if a request on trial does not fit."""
    machine, line = _machine(args), _request_line(args)
    return draw(
        machine.inventory,
        machine.grants,
        reserved=machine.reserved,
        health=machine.health or NO_HEALTH,
        placement=_placement(machine, line),
    )


class _Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a picture is made of."""

    inventory: Inventory
    grants: Sequence[Grant]
    reserved: CpuSet
    health: Health | None
    """None if nothing is known of it."""


def _machine(args: argparse.Namespace) -> _Machine:
    """Return the machine that the options name: a captured tree, a file, or what an agent knows."""
    if args.inventory is not None and args.root is not None:
        raise InputError("cannot use --inventory and --root together: expected one of them")
    if args.inventory is None and args.root is None:
        return _known(args)
    inventory = read_file(args.inventory) if args.inventory is not None else read_root(args.root)
    reserved = online_cpus(inventory, args.reserved or "", "--reserved")
    grants = read_grants(args.state) if args.state is not None else ()
    return _Machine(inventory=inventory, grants=grants, reserved=reserved, health=None)


def _known(args: argparse.Namespace) -> _Machine:
    for name in ("state", "reserved"):
        if getattr(args, name) is not None:
            raise InputError(f"cannot use --{name} without --root or --inventory: the agent knows it")
    facts = facts_of(args)
    inventory = facts.inventory()
    health = health_of(facts.page("/v1/health"))
    return _Machine(inventory=inventory, grants=facts.grants(), reserved=facts.reserved(), health=health)


# ---------------------------------------------------------------- a placement on trial


def _request_line(args: argparse.Namespace) -> RequestLine | None:
    """Return the request on the command line, or None if nothing is to be placed."""
    written, nothing = RequestLine(**written_request(args)), RequestLine()
    asked = msgspec.structs.asdict(written)
    given = [name for name, value in msgspec.structs.asdict(nothing).items() if asked[name] != value]
    if given and not args.place:
        raise InputError(f"cannot use {_OPTIONS.get(given[0], f'--{given[0]}')} without --place")
    if args.place and not given:
        raise InputError("cannot use --place: expected a request, such as --cpus 8")
    return written if args.place else None


def _placement(machine: _Machine, line: RequestLine | None) -> Placement | None:
    """Return where a request would go. Raise Refused if it does not fit."""
    if line is None:
        return None
    request, ledger = request_of(machine.inventory, line), ledger_of(machine.grants, machine.reserved)
    if machine.health is not None:
        state = NodeState(inventory=machine.inventory, ledger=ledger, health=machine.health)
        request = state.for_the_healthy(request)
    return place(machine.inventory, ledger, request)
