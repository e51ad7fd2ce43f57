"""`nodeagent explain --cpus …`: whether a request would fit now, where and at what cost, or who stands in the way."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from nodeagent.cli.agent.explain.words import HELD_COLUMNS, cells, holdings, print_costs
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.cli.shared.placed import placed_document, refusal_document
from nodeagent.cli.shared.request_options import RequestLine, request_of, written_request
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.advice.cost_words import CostPart, as_well_as, cost_parts
from nodeagent.core.advice.hypothetical import empty
from nodeagent.core.advice.release import smallest_release
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.place import find, place
from nodeagent.errors import InputError, Refused

DONE, REFUSED = 0, 3


def requested(args: argparse.Namespace, inventory: Inventory) -> Request:
    """Return the request of the command line. Raise InputError if it asks for nothing."""
    request = request_of(inventory, RequestLine(**written_request(args)))
    if not (request.cpus or request.memory_bytes or request.devices or any(request.hugepages.values())):
        raise InputError("cannot explain nothing: expected --cpus, --devices, --hugepages or --memory, or a subject")
    return request


def explain_request(state: NodeState, request: Request) -> dict[str, Any]:
    """Return the answer in plain types."""
    healthy = state.for_the_healthy(request)
    on_empty = find(state.inventory, empty(state.ledger), healthy)
    document: dict[str, Any] = {
        "fits": True,
        "not_counted": _not_counted(state, request),
        "on_empty": _where(state.inventory, healthy, on_empty),
    }
    try:
        placed = place(state.inventory, state.ledger, healthy)
    except Refused as refusal:
        return document | {"fits": False, **refusal_document(refusal), **_in_the_way(state, healthy, on_empty)}
    return document | {
        "placement": placed_document(state.inventory, healthy, placed),
        "cost": costs(cost_parts(healthy, placed, on_empty)),
        "aligned": on_empty is None or as_well_as(placed, on_empty),
    }


def costs(parts: Iterable[CostPart]) -> list[dict[str, Any]]:
    """Return the parts of a cost in plain types."""
    return [{"part": p.name, "value": p.value, "on_empty": p.on_empty, "words": p.words} for p in parts]


def _not_counted(state: NodeState, request: Request) -> list[str]:
    known, why = state.inventory.device_by_id, state.ill()
    why |= {one.id: "in use by the node" for one in state.inventory.devices if one.used_by_host}
    return [f"{one} is {why[one]}" for one in sorted(why) if known[one].kind in request.devices]


def _where(inventory: Inventory, request: Request, placed: Placement | None) -> dict[str, Any] | None:
    return placed_document(inventory, request, placed) if placed is not None else None


def _in_the_way(state: NodeState, request: Request, on_empty: Placement | None) -> dict[str, Any]:
    """Return the smallest set of pods whose end would admit the request."""
    found = smallest_release(state.inventory, state.ledger, request, state.tenants()) if on_empty is not None else None
    if found is None:
        return {"in_the_way": [], "smallest": True, "after": None}
    return {
        "in_the_way": [holdings(one) for one in found.tenants],
        "smallest": found.exact,
        "after": _where(state.inventory, request, found.placement),
    }


# ---------------------------------------------------------------- as text


def print_request(document: Mapping[str, Any]) -> int:
    """Print the answer; return the exit code."""
    for line in document["not_counted"]:
        print(f"not counted: {line}")
    if document["fits"]:
        for why in document["placement"]["why"]:
            print(f"fits: {why}")
        print()
        print_costs(document["cost"])
        if not document["aligned"]:
            print("\non the empty machine it would lie closer together: `nodeagent advise` says which pods to move")
        return DONE
    would_admit = document["would_admit"]
    print(f"refused: {document['refused']}{f'; {would_admit}' if would_admit else ''}")
    _print_in_the_way(document)
    return REFUSED


def _print_in_the_way(document: Mapping[str, Any]) -> None:
    pods = [pod for one in document["in_the_way"] for pod in one["pods"]]
    if not pods:
        nothing = "nothing that pods give back would admit it"
        print(f"on the empty machine: {'it would fit, but ' + nothing if document['on_empty'] else 'refused as well'}")
        return
    count = f"{len(pods)} pod" if len(pods) == 1 else f"{len(pods)} pods"
    least = "no smaller set does" if document["smallest"] else "too many pods to try every set: a smaller one may do"
    print(f"smallest change: the end of {count}, {', '.join(pods)}, would admit it ({least})")
    for why in document["after"]["why"]:
        print(f"it would then get: {why}")
    for why in document["on_empty"]["why"]:
        print(f"on the empty machine: {why}")
    print()
    rows = ((", ".join(one["pods"]), *cells(one)) for one in document["in_the_way"])
    print_table(("IN THE WAY", *HELD_COLUMNS), rows)
