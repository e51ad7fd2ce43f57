"""`nodeagent forecast`: how many more copies of a pod or claim fit now, and on an empty node of this shape."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nodeagent.cli.agent.planning.progress import Progress
from nodeagent.cli.agent.planning.served import Served, add_config, served
from nodeagent.cli.shared.facts import Facts, add_facts, facts_of
from nodeagent.cli.shared.manifests import read_objects
from nodeagent.cli.shared.node_state import NodeState, state_of
from nodeagent.cli.shared.tables import print_document
from nodeagent.core.advice.claim_forecast import ClaimNode, forecast_claims
from nodeagent.core.advice.hypothetical import empty
from nodeagent.core.advice.pod_forecast import MOST_COPIES, Forecast, PodNode, forecast_pods
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.health import Health
from nodeagent.errors import InputError
from nodeagent.kube.claim_spec import KINDS as CLAIM_KINDS
from nodeagent.kube.claim_spec import read_claim
from nodeagent.kube.pod_demand import KINDS as POD_KINDS
from nodeagent.kube.pod_demand import demands, of_the_node, pod_spec

EXAMPLES = (
    ("nodeagent forecast --pod deployment.yaml", "how many more of its pods fit on this node, and on an empty one"),
    ("nodeagent forecast --claim claim.yaml --count 4", "whether four more of a claim fit"),
)
EXIT_CODES = {3: "refused: --count of them do not fit"}
REPLAYABLE = True
DONE, REFUSED = 0, 3
Document = dict[str, Any]
Ask = Callable[[Ledger, Health], Forecast]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent forecast`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pod", metavar="FILE", help="a Pod, or a workload with a pod template; - is standard input")
    what.add_argument("--claim", metavar="FILE", help="a ResourceClaim or ResourceClaimTemplate; - is standard input")
    parser.add_argument("--classes", metavar="FILE", help="what `kubectl get deviceclasses -o yaml` prints")
    parser.add_argument("--count", metavar="N", type=_count, help="whether so many fit: exit code 3 if they do not")
    add_config(parser)
    add_facts(parser)
    parser.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table", help="how to write it")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 4 or not 1 <= int(text) <= MOST_COPIES:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MOST_COPIES}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    facts = facts_of(args)
    state = state_of(facts)
    offered, most, progress = served(facts, state, args.config), args.count or MOST_COPIES, Progress("{} fit so far")
    if args.pod is not None:
        ask, not_counted = _of_pod(args.pod, facts, state, offered, most, progress)
    else:
        ask, not_counted = _of_claim(args, facts, state, offered, most, progress)
    try:
        document = _document(state, ask, args.count) | {"not_counted": [*not_counted, *_of_kubelet(state)]}
    finally:
        progress.end()
    if args.output == "table":
        _print(document, "pod" if args.pod is not None else "claim")
    else:
        print_document(document, args.output)
    return REFUSED if args.count and document["now"] < args.count else DONE


def _document(state: NodeState, ask: Ask, asked: int | None) -> Document:
    """Return both forecasts in plain types."""
    now, fresh = ask(state.ledger, state.health), ask(empty(state.ledger), {})
    return {
        "now": now.count,
        "why": now.why,
        "on_empty": fresh.count,
        "why_on_empty": fresh.why,
        "asked": asked,
        "grants": [
            {"grant": id, "cpus": str(one.cpus), "devices": [*one.devices, *one.shares]}
            for id, one in now.ledger.grants.items()
            if id.startswith("forecast-")
        ],
    }


def _of_pod(
    path: str, facts: Facts, state: NodeState, offered: Served, most: int, tick: Progress
) -> tuple[Ask, list[str]]:
    objects = [one for one in read_objects(path, "--pod") if one["kind"] in POD_KINDS]
    if len(objects) != 1:
        raise InputError(f"cannot read --pod {path}: it has {len(objects)} pods or workloads, expected one")
    spec = pod_spec(objects[0])
    containers = demands(spec)
    resources = {one.name: one.resource for one in offered.offers}

    def ask(ledger: Ledger, health: Health) -> Forecast:
        node = PodNode(inventory=state.inventory, health=health, resources=resources, now_s=facts.now_s)
        return forecast_pods(node, ledger, containers, most, tick)

    return ask, list(_beyond(spec))


def _beyond(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a pod needs besides the agent's resources."""
    if own := of_the_node(spec):
        yield f"what the pod requests of the node itself: {', '.join(own)}"
    if spec.get("resourceClaims"):
        yield "the pod's claims: --claim forecasts them"
    if placing := [key for key in ("nodeSelector", "affinity", "topologySpreadConstraints") if spec.get(key)]:
        yield f"where the pod may run: {', '.join(placing)}"


def _of_claim(
    args: argparse.Namespace, facts: Facts, state: NodeState, offered: Served, most: int, tick: Progress
) -> tuple[Ask, list[str]]:
    if not offered.dra.served:
        raise InputError("cannot forecast a claim: the agent serves nothing through DRA")
    objects = read_objects(args.claim, "--claim")
    objects += read_objects(args.classes, "--classes") if args.classes else []
    spec = read_claim([one for one in objects if one["kind"] in CLAIM_KINDS])

    def ask(ledger: Ledger, health: Health) -> Forecast:
        node = ClaimNode(
            inventory=state.inventory,
            health=health,
            catalog=offered.dra.catalog,
            features=offered.features,
            now_s=facts.now_s,
        )
        return forecast_claims(node, ledger, spec, most, tick)

    return ask, ["claims that are allocated here and not prepared yet, which the scheduler alone knows"]


def _of_kubelet(state: NodeState) -> Iterator[str]:
    policy = (state.status["kubelet"].get("settings") or {}).get("topologyManagerPolicy", "none")
    if policy not in ("none", "best-effort"):
        yield f"kubelet's topology manager, which may refuse more: its policy is {policy}"


# ---------------------------------------------------------------- as text


def _print(document: Mapping[str, Any], what: str) -> None:
    print(f"on this node now: {_how_many(document['now'], document['asked'], what)}")
    if document["why"]:
        print(f"why not one more: {document['why']}")
    print(f"on an empty node of this shape: {_how_many(document['on_empty'], document['asked'], what)}")
    if document["why_on_empty"]:
        print(f"why not one more there: {document['why_on_empty']}")
    for line in document["not_counted"]:
        print(f"not counted: {line}")


def _how_many(count: int, asked: int | None, what: str) -> str:
    named = f"{count} more {what}" if count == 1 else f"{count} more {what}s"
    if asked is None:
        return named if count < MOST_COPIES else f"{named} or more"
    return f"all {asked} fit" if count >= asked else f"{count} of {asked} fit"
