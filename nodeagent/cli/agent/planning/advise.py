"""`nodeagent advise`: which pods to restart so that a request, or the largest possible one, lies close together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from nodeagent.cli.agent.explain.request import costs, requested
from nodeagent.cli.agent.explain.words import print_costs
from nodeagent.cli.agent.planning.progress import Progress
from nodeagent.cli.shared.facts import add_facts, facts_of
from nodeagent.cli.shared.node_state import NodeState, state_of
from nodeagent.cli.shared.placed import placed_document
from nodeagent.cli.shared.request_options import RequestLine, add_request_options, request_of, written_request
from nodeagent.cli.shared.tables import print_document, print_table
from nodeagent.core.advice.cost_words import as_well_as, cost_parts
from nodeagent.core.advice.fragmentation import fragmentation
from nodeagent.core.advice.largest import Largest, largest
from nodeagent.core.advice.moves import Advice, Move, MovedUnit, advise
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.describe import describe
from nodeagent.errors import InputError

EXAMPLES = (
    ("nodeagent advise --cpus 16 --devices gpu=4", "which pods to move so that a request lies close together"),
    ("nodeagent advise --largest", "the largest request that one NUMA node could hold, and what that takes"),
)
REPLAYABLE = True
DONE, REFUSED = 0, 3
Document = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent advise`."""
    add_facts(parser)
    add_request_options(parser)
    parser.add_argument(
        "--largest", action="store_true", help="as many CPUs as one NUMA node can give; the default without a request"
    )
    parser.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table", help="how to write it")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    state, progress = state_of(facts_of(args)), Progress("tried {} sets of pods")
    try:
        document = advice_document(state, _wanted(args, state), progress)
    finally:
        progress.end()
    if args.output == "table":
        _print(document)
    else:
        print_document(document, args.output)
    return DONE if document["after"] is not None else REFUSED


def _wanted(args: argparse.Namespace, state: NodeState) -> tuple[Request, bool]:
    """Return the request, and whether the number of its CPUs is to be found."""
    written = written_request(args)
    if args.largest and written["cpus"]:
        raise InputError("cannot use --largest with --cpus: expected one of them")
    asked = written["cpus"] or written["hugepages"] or written["devices"] or written["memory"]
    if args.largest or not asked:
        return request_of(state.inventory, RequestLine(**written)), True
    return requested(args, state.inventory), False


def advice_document(state: NodeState, wanted: tuple[Request, bool], tick: Progress) -> Document:
    """Return the advice in plain types."""
    request, find_largest = state.for_the_healthy(wanted[0]), wanted[1]
    tenants = state.tenants()
    if find_largest:
        found = largest(state.inventory, state.ledger, request, tenants, tick=tick)
        document = _advice(state, found.advice) | _largest(found)
    else:
        document = _advice(state, advise(state.inventory, state.ledger, request, tenants, tick=tick))
    kinds = [one for one in state.inventory.devices_by_kind if one == "gpu" or one in request.devices]
    return document | {"fragmentation": dict(fragmentation(state.inventory, state.ledger, kinds))}


def _largest(found: Largest) -> Document:
    return {"largest_now": found.now_cpus, "largest_exact": found.exact}


def _advice(state: NodeState, advice: Advice) -> Document:
    request = advice.request
    aligned = advice.now is not None and advice.on_empty is not None and as_well_as(advice.now, advice.on_empty)
    return {
        "cpus": request.cpus,
        "aligned_now": aligned,
        "now": _placed(state, request, advice.now),
        "moves": [_move(state, one, advice.after) for one in advice.moves],
        "after": _placed(state, request, advice.after),
        "on_empty": _placed(state, request, advice.on_empty),
        "cost": costs(cost_parts(request, advice.after, advice.on_empty)) if advice.after is not None else [],
        "least_disruptive": advice.exact,
        "why_not": advice.why_not,
    }


def _placed(state: NodeState, request: Request, placed: Placement | None) -> Document | None:
    return placed_document(state.inventory, request, placed) if placed is not None else None


def _move(state: NodeState, move: Move, after: Placement | None) -> Document:
    gained = move.tenant.cpus & after.cpus if after is not None else ""
    devices = [one for one in move.tenant.devices if after is not None and one in after.devices]
    return {
        "pods": list(move.tenant.pods),
        "grants": sorted(one.id for one in move.tenant.grants),
        "gives_cpus": str(gained),
        "gives_devices": devices,
        "units": [_unit(state, one) for one in move.units],
    }


def _unit(state: NodeState, unit: MovedUnit) -> Document:
    return {
        "name": unit.name,
        "from": _placed(state, unit.request, unit.before),
        "to": _placed(state, unit.request, unit.after),
        "closer": not as_well_as(unit.before, unit.after),
        "why": list(describe(state.inventory, unit.request, unit.after).why),
    }


# ---------------------------------------------------------------- as text


def _print(document: Mapping[str, Any]) -> None:
    if "largest_now" in document:
        exact = "" if document["largest_exact"] else " (not every number was tried)"
        after = document["cpus"] if document["after"] is not None else 0
        print(f"CPUs on one NUMA node: {document['largest_now']} now, {after} after moves{exact}")
    for kind, figure in document["fragmentation"].items():
        print(f"fragmentation of what is free, {kind}: {figure:.2f}")
    if document["after"] is None:
        print(f"no moves: {document['why_not'] or 'none are known that make room; not every set of pods was tried'}")
        return
    if not document["moves"]:
        print("nothing to move: it lies as close together as on the empty machine")
    else:
        _print_moves(document)
    for why in document["after"]["why"]:
        print(f"the request then gets: {why}")
    print()
    print_costs(document["cost"], ("AFTER", "EMPTY"))


def _print_moves(document: Mapping[str, Any]) -> None:
    pods = [pod for one in document["moves"] for pod in one["pods"]]
    count = "1 pod" if len(pods) == 1 else f"{len(pods)} pods"
    least = "no less disruptive moves do" if document["least_disruptive"] else "less disruptive moves may exist"
    print(f"now: {_now(document)}")
    print(f"move {count} ({least}): end {', '.join(pods)}; start what is requested; let them come back in this order")
    print()
    rows = [
        (
            unit["name"],
            _where(unit["from"]),
            _where(unit["to"]),
            "closer" if unit["closer"] else "as close",
            _gives(one),
        )
        for one in document["moves"]
        for unit in one["units"]
    ]
    print_table(("MOVE", "FROM", "TO", "THEN", "GIVES THE REQUEST"), rows)
    if any(unit["name"].startswith("claim ") for one in document["moves"] for unit in one["units"]):
        print("note: a claim moves only if it is deleted and allocated again, and the scheduler chooses its devices")
    print()


def _now(document: Mapping[str, Any]) -> str:
    if document["now"] is None:
        return "the request would be refused"
    return f"the request would get {document['now']['why'][0]}, farther apart than on the empty machine"


def _where(placed: Mapping[str, Any]) -> str:
    nodes = ",".join(map(str, placed["numa_nodes"]))
    held = [f"CPUs {placed['cpus']}"] if placed["cpus"] else []
    return f"node {nodes}: {' '.join([*held, *placed['devices']])}"


def _gives(move: Mapping[str, Any]) -> str:
    held = [f"CPUs {move['gives_cpus']}"] if move["gives_cpus"] else []
    return " ".join([*held, *move["gives_devices"]])
