"""What one container or claim holds, what its choice costs, and whether a better one would be free today."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nodeagent.cli.agent.explain.words import HELD_COLUMNS, cells, held
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.advice.cost_words import as_well_as, cost_parts
from nodeagent.core.advice.standing import standing_of, unmovable
from nodeagent.core.advice.tenants import Unit
from nodeagent.core.model.grant import Grant
from nodeagent.core.opaque.settings import from_json
from nodeagent.core.placement.describe import describe

Document = dict[str, Any]


def unit_document(state: NodeState, unit: Unit) -> Document:
    """Return a unit in plain types: its grants, the reasons for their places, and each part of the cost."""
    document: Document = {
        "name": unit.name,
        "grants": [_grant(one) for one in unit.grants],
        "why": [],
        "cost": [],
        "unknown": unmovable(state.inventory, unit),
    }
    return document if document["unknown"] else document | _choice(state, unit)


def _choice(state: NodeState, unit: Unit) -> Document:
    standing = standing_of(state.inventory, state.ledger, unit)
    held_at, now = standing.held, standing.now
    if held_at is None:
        return {"unknown": "the rules under which it was placed do not give this choice today"}
    return {
        "why": list(describe(state.inventory, standing.request, held_at).why),
        "cost": [
            {
                "part": one.name,
                "value": one.value,
                "now": getattr(now.cost, one.name) if now is not None else None,
                "on_empty": one.on_empty,
                "words": one.words,
            }
            for one in cost_parts(standing.request, held_at, standing.on_empty)
        ],
        "best_now": now is None or as_well_as(held_at, now),
        "best_on_empty": standing.on_empty is None or as_well_as(held_at, standing.on_empty),
    }


def _grant(grant: Grant) -> Document:
    said = from_json(grant.settings)
    result = grant.result
    return {
        "id": grant.id,
        "resource": grant.holder.resource or grant.holder.api,
        "ids": list(grant.ids),
        "granted_at": grant.granted_at,
        "allocated": f"{result}" if result is not None else "",
        "options": sorted(said.options),
        "numa": said.numa,
        **held([grant]),
    }


# ---------------------------------------------------------------- as text


def print_unit(document: Mapping[str, Any]) -> None:
    """Print what a unit holds and why there."""
    print(f"\n{document['name']}")
    rows = ((one["id"], one["resource"], *cells(one), moment(one["granted_at"])) for one in document["grants"])
    print_table(("GRANT", "RESOURCE", *HELD_COLUMNS, "GRANTED"), rows)
    for grant in document["grants"]:
        _print_request(grant)
    if document["unknown"]:
        print(f"no reasons: {document['unknown']}")
        return
    for why in document["why"]:
        print(f"why: {why}")
    print()
    rows = ((p["part"], p["value"], _known(p["now"]), _known(p["on_empty"]), p["words"]) for p in document["cost"])
    print_table(("COST", "HERE", "NOW", "EMPTY", "IN WORDS"), rows)
    print(f"\n{_verdict(document)}")


def _print_request(grant: Mapping[str, Any]) -> None:
    if grant["allocated"]:
        print(f"the scheduler allocated {grant['allocated']}")
    if grant["options"] or grant["numa"]:
        print(f"the claim asks for {', '.join([*grant['options'], *filter(None, [grant['numa']])])}")


def _verdict(document: Mapping[str, Any]) -> str:
    if document["best_on_empty"]:
        return "it lies as close together as on the empty machine"
    if document["best_now"]:
        return "it lies as close together as what is free today allows; on the empty machine it would be closer"
    return "it would lie closer together if its pod were restarted now"


def _known(value: int | None) -> str:
    return "-" if value is None else str(value)


def moment(at_s: float) -> str:
    """Return a time since the epoch in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s)) if at_s else "-"
