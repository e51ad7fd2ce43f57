"""`nodeagent place`: where a request would go, without granting anything. One request, or one per line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.shared.facts import machine_of
from nodeagent.cli.shared.held import online_cpus, read_grants
from nodeagent.cli.shared.request_options import RequestLine, add_request_options, request_of, written_request
from nodeagent.cli.shared.source import add_root, read_file
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.describe import describe
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused

DONE, REFUSED = 0, 3
REPLAYABLE = True


class Line(RequestLine):
    """One request of a batch, as written, and what is held and reserved as it is placed."""

    held: str = ""
    reserved: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent place`."""
    add_root(parser)
    parser.add_argument("--inventory", metavar="FILE", help="read what `nodeagent inventory -o json` (or yaml) wrote")
    add_request_options(parser)
    parser.add_argument("--held", metavar="LIST", default="", help="CPUs that others hold, such as 0-3,8")
    parser.add_argument("--state", metavar="FILE", help="what is held, as `nodeagent grants -o json` writes it")
    parser.add_argument("--reserved", metavar="LIST", default="", help="CPUs that are never granted")
    parser.add_argument("--batch", metavar="FILE", help="one request object a line; - is standard input")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.inventory is not None and args.root is not None:
        raise InputError("cannot use --inventory and --root together: expected one of them")
    inventory = read_file(args.inventory) if args.inventory is not None else machine_of(args)
    line = Line(**written_request(args), held=args.held, reserved=args.reserved)
    state = read_grants(args.state) if args.state is not None else ()
    if args.batch is not None:
        return _batch(inventory, args.batch, line, state)
    return _one(inventory, line, state, args.output)


# ---------------------------------------------------------------- one request


def _one(inventory: Inventory, line: Line, state: Sequence[Grant], form: str) -> int:
    request, ledger = request_of(inventory, line), _ledger(inventory, line, state)
    try:
        placement = place(inventory, ledger, request)
    except Refused as refusal:
        if form == "json":
            print(json.dumps(_refusal(refusal)))
        else:
            print(f"refused: {refusal}")
        return REFUSED
    document = _document(inventory, request, placement)
    if form == "json":
        print(json.dumps(document))
    else:
        print_table(("WHAT", "WHERE"), _rows(document))
    return DONE


def _ledger(inventory: Inventory, line: Line, state: Sequence[Grant]) -> Ledger:
    """Return a ledger with what is held and reserved."""
    held, reserved = online_cpus(inventory, line.held, "held"), online_cpus(inventory, line.reserved, "reserved")
    grants = {one.id: one for one in state}
    if held:
        grants["--held"] = Grant(id="--held", holder=Holder(api=DEVICE_PLUGIN), cpus=held)
    return Ledger(grants=grants, reserved=reserved)


# ---------------------------------------------------------------- a batch


def _batch(inventory: Inventory, path: str, defaults: Line, state: Sequence[Grant]) -> int:
    """Answer every line in order; what a line omits is taken from the command line."""
    lines = sys.stdin.buffer if path == "-" else _open(path)
    base = msgspec.structs.asdict(defaults)
    with lines:
        for number, text in enumerate(lines, start=1):
            if text.strip():
                sys.stdout.write(json.dumps(_answer(inventory, text, base, state, number)) + "\n")
    return DONE


def _open(path: str) -> Any:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"cannot read --batch {path}: {error.strerror}") from None


def _answer(
    inventory: Inventory, text: bytes, base: Mapping[str, Any], state: Sequence[Grant], number: int
) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(text)
        if not isinstance(given, dict):
            raise InputError("expected an object")
        line = msgspec.convert({**base, **given}, Line)
        request, ledger = request_of(inventory, line), _ledger(inventory, line, state)
        return _document(inventory, request, place(inventory, ledger, request))
    except Refused as refusal:
        return _refusal(refusal)
    except (InputError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return {"error": f"line {number}: {error}", "line": number}


# ---------------------------------------------------------------- answers


def _document(inventory: Inventory, request: Request, placement: Placement) -> dict[str, Any]:
    """Return the answer in its documented form."""
    more = describe(inventory, request, placement)
    pages: dict[str, dict[str, int]] = {}
    for one in placement.hugepages:
        pages.setdefault(format_size(one.page_bytes), {})[str(one.node)] = one.pages
    document: dict[str, Any] = {
        "cpus": str(placement.cpus),
        "packages": list(more.packages),
        "numa_nodes": list(more.numa_nodes),
        "l3": list(more.l3),
        "split_cores": more.split_cores,
        "hugepages": pages,
        "devices": list(placement.devices),
        "cost": list(placement.cost),
        "why": list(more.why),
    }
    if placement.memory:
        document["memory"] = {str(node): size for node, size in placement.memory}
    return document


def _refusal(refusal: Refused) -> dict[str, Any]:
    return {
        "refused": refusal.why,
        "want": refusal.want,
        "free": refusal.free,
        "unit": refusal.unit,
        "would_admit": refusal.would_admit,
    }


def _rows(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in document.items():
        if name == "why":
            yield from ((name, sentence) for sentence in value)
        elif isinstance(value, Mapping):
            yield from (
                (f"{name} {key}", ", ".join(f"{k}: {v}" for k, v in _items(part))) for key, part in value.items()
            )
        else:
            yield name, ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, Mapping) else [("bytes", value)]
