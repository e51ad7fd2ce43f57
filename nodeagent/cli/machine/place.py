"""`nodeagent place`: where a request would go, without granting anything. One request, or one per line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.output import forms
from nodeagent.cli.shared.facts import facts_of, machine_of
from nodeagent.cli.shared.held import ledger_of, online_cpus, read_grants
from nodeagent.cli.shared.node_state import NodeState, read_health, state_of
from nodeagent.cli.shared.placed import placed_document, placed_rows, refusal_document
from nodeagent.cli.shared.request_options import RequestLine, add_request_options, request_of, written_request
from nodeagent.cli.shared.source import add_root, read_file
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, PeerError, Refused

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
    parser.add_argument("--health", metavar="FILE", help="what is ill, as `nodeagent health -o json` writes it")
    parser.add_argument("--reserved", metavar="LIST", help="CPUs that are never granted")
    parser.add_argument("--batch", metavar="FILE", help="one request object a line; - is standard input")
    forms.add_output(parser, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.inventory is not None and args.root is not None:
        raise InputError("cannot use --inventory and --root together: expected one of them")
    node = _node(args)
    reserved = str(node.reserved) if args.reserved is None else args.reserved
    line = Line(**written_request(args), held=args.held, reserved=reserved)
    if args.batch is not None:
        return _batch(node, args.batch, line)
    return _one(node, line, args)


class _Node(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are placed on."""

    inventory: Inventory
    grants: tuple[Grant, ...]
    health: Health | None = None
    """None if nothing is known of it: then no device is left out, also not for a device node that a tree lacks."""
    reserved: CpuSet = CpuSet()

    def placed(self, line: Line) -> dict[str, Any]:
        """Return where a request would go as its node would decide. Raise Refused, or InputError for a bad line."""
        request, ledger = request_of(self.inventory, line), self._ledger(line)
        if self.health is not None:
            state = NodeState(inventory=self.inventory, ledger=ledger, health=self.health)
            request = state.for_the_healthy(request)
        return placed_document(self.inventory, request, place(self.inventory, ledger, request))

    def _ledger(self, line: Line) -> Ledger:
        """Return a ledger with what is held and reserved."""
        held = online_cpus(self.inventory, line.held, "held")
        reserved = online_cpus(self.inventory, line.reserved, "reserved")
        by_line = (Grant(id="--held", holder=Holder(api=DEVICE_PLUGIN), cpus=held),) if held else ()
        return ledger_of((*self.grants, *by_line), reserved)


def _node(args: argparse.Namespace) -> _Node:
    """Return what the options name. With --state on a captured node the machine, the reserved CPUs and the health of
    devices are as its agent saw them."""
    grants = read_grants(args.state) if args.state is not None else ()
    health = read_health(args.health) if args.health is not None else None
    if args.inventory is not None:
        return _Node(inventory=read_file(args.inventory), grants=grants, health=health)
    captured = _captured(args) if args.state is not None else None
    if captured is None:
        return _Node(inventory=machine_of(args), grants=grants, health=health)
    return _Node(
        inventory=captured.inventory,
        grants=grants,
        health=captured.health if health is None else health,
        reserved=captured.ledger.reserved,
    )


def _captured(args: argparse.Namespace) -> NodeState | None:
    """Return the state of the node whose capture is replayed, or None if none is, or no agent ran there."""
    if args.root is not None or getattr(args, "facts", None) is None:
        return None
    with contextlib.suppress(PeerError):
        return state_of(facts_of(args))
    return None


# ---------------------------------------------------------------- one request


def _one(node: _Node, line: Line, args: argparse.Namespace) -> int:
    try:
        document = node.placed(line)
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


# ---------------------------------------------------------------- a batch


def _batch(node: _Node, path: str, defaults: Line) -> int:
    """Answer every line in order; what a line omits is taken from the command line."""
    lines = sys.stdin.buffer if path == "-" else _open(path)
    base = msgspec.structs.asdict(defaults)
    with lines:
        for number, text in enumerate(lines, start=1):
            if text.strip():
                sys.stdout.write(json.dumps(_answer(node, text, base, number)) + "\n")
    return DONE


def _open(path: str) -> Any:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"cannot read --batch {path}: {error.strerror}") from None


def _answer(node: _Node, text: bytes, base: Mapping[str, Any], number: int) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(text)
        if not isinstance(given, dict):
            raise InputError("expected an object")
        return node.placed(msgspec.convert({**base, **given}, Line))
    except Refused as refusal:
        return refusal_document(refusal)
    except (InputError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return {"error": f"line {number}: {error}", "line": number}
