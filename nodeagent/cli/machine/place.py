"""`nodeagent place`: where a request would go, without granting anything. One request, or one per line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.output import forms
from nodeagent.cli.shared.facts import machine_of
from nodeagent.cli.shared.held import online_cpus, read_grants
from nodeagent.cli.shared.placed import placed_document, placed_rows, refusal_document
from nodeagent.cli.shared.request_options import RequestLine, add_request_options, request_of, written_request
from nodeagent.cli.shared.source import add_root, read_file
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused

EXAMPLES = (
    ("nodeagent place --cpus 8 --devices gpu=2 --numa single", "where 8 CPUs and 2 GPUs of one NUMA node would be"),
    ("nodeagent place --cpus 4 --state grants.json", "what else would fit; from `nodeagent grants -o json`"),
    ("nodeagent place --cpus 4 --hugepages 1Gi=2 --root /tmp/captured", "on a captured machine"),
    ("nodeagent place --inventory node.json --batch requests.jsonl", "many requests, one JSON object a line"),
)
EXIT_CODES = {3: "refused: the request does not fit"}
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
    forms.add_output(parser, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.inventory is not None and args.root is not None:
        raise InputError("cannot use --inventory and --root together: expected one of them")
    inventory = read_file(args.inventory) if args.inventory is not None else machine_of(args)
    line = Line(**written_request(args), held=args.held, reserved=args.reserved)
    state = read_grants(args.state) if args.state is not None else ()
    if args.batch is not None:
        return _batch(inventory, args.batch, line, state)
    return _one(inventory, line, state, args)


# ---------------------------------------------------------------- one request


def _one(inventory: Inventory, line: Line, state: Sequence[Grant], args: argparse.Namespace) -> int:
    request, ledger = request_of(inventory, line), _ledger(inventory, line, state)
    try:
        document = placed_document(inventory, request, place(inventory, ledger, request))
    except Refused as refusal:
        why = f"refused: {refusal}"
        _write(args, refusal_document(refusal), lambda _: print(why))
        return REFUSED
    _write(args, document, lambda shown: print_table(("WHAT", "WHERE"), placed_rows(shown), whole=args.no_trunc))
    return DONE


def _write(args: argparse.Namespace, document: Mapping[str, Any], show: Callable[[Any], None]) -> None:
    """Write an answer; as JSON in one line, like those of a batch."""
    if args.output.kind == forms.JSON:
        print(json.dumps(document))
    else:
        forms.write(args, document, show)


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
        return placed_document(inventory, request, place(inventory, ledger, request))
    except Refused as refusal:
        return refusal_document(refusal)
    except (InputError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return {"error": f"line {number}: {error}", "line": number}
