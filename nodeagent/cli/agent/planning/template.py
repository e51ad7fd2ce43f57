"""`nodeagent template`: the node's shape as the ResourceSlices that it would publish if nothing were held."""

from __future__ import annotations

import argparse
from typing import Any

from nodeagent.cli.agent.planning.served import add_config, served
from nodeagent.cli.shared.facts import add_facts, facts_of
from nodeagent.cli.shared.node_state import NodeState, state_of
from nodeagent.cli.shared.tables import print_document
from nodeagent.core.advice.hypothetical import empty
from nodeagent.core.dra.pool import Features
from nodeagent.core.dra.prepare import Catalog
from nodeagent.errors import InputError
from nodeagent.kube.resourceslice.render import Owner, render

EXAMPLES = (
    ("nodeagent template > template.yaml", "the node's shape, for an autoscaler"),
    ("nodeagent replay node.tar.zst template", "that of a captured node"),
)
REPLAYABLE = True
Object = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent template`."""
    add_config(parser)
    add_facts(parser)
    parser.add_argument("-o", "--output", choices=["yaml", "json"], default="yaml", help="how to write it")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    facts = facts_of(args)
    state = state_of(facts)
    offered = served(facts, state, args.config)
    if not offered.dra.served:
        raise InputError("cannot make a template: the agent serves nothing through DRA")
    print_document(template(state, offered.dra.catalog, offered.features), args.output)
    return 0


def template(state: NodeState, catalog: Catalog, features: Features) -> Object:
    """Return a List of ResourceSlices without a node's name. Devices are all healthy, and nothing is held."""
    owner, ledger = Owner(driver=catalog.driver, node_name=catalog.node_name), empty(state.ledger)
    own = (one for name, one in catalog.kinds.items() if name not in catalog.shared)  # the others belong to no node
    pools = (one.pool(state.inventory, ledger, {}, features) for one in own)
    slices = [_without_node(one, catalog.driver) for pool in pools for one in render(pool, owner, 1)]
    return {"apiVersion": "v1", "kind": "List", "items": slices}


def _without_node(one: Object, driver: str) -> Object:
    """Return a slice without its node: the pool is named after its kind, the object after the driver and the pool."""
    spec = {key: value for key, value in one["spec"].items() if key != "nodeName"}
    kind = spec["pool"]["name"].rpartition("/")[2]
    tail = "-".join(one["metadata"]["name"].split("-")[_tail(one) :])
    spec["pool"] = {**spec["pool"], "name": kind}
    return {**one, "metadata": {"name": f"{kind}.{driver}-{tail}"}, "spec": spec}


def _tail(one: Object) -> int:
    """Return where a slice's number begins in its name: counters-0000, or 0000 for devices."""
    return -2 if "sharedCounters" in one["spec"] else -1
