"""The questions about a node answered on every recorded machine: odd node ids, CPUs without a node, none, hundreds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.cli.agent.explain.cpu import explain_cpu
from nodeagent.cli.agent.explain.pod import explain_pod
from nodeagent.cli.agent.explain.request import explain_request
from nodeagent.cli.agent.planning.advise import advice_document
from nodeagent.cli.agent.planning.progress import Progress
from nodeagent.cli.agent.planning.template import template
from nodeagent.cli.shared.node_state import state_of
from nodeagent.cli.shared.source import read_root
from nodeagent.core.advice.pod_forecast import ContainerDemand, PodNode, forecast_pods
from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.dra.cpu_pool import CpuPool
from nodeagent.core.dra.memory_pools import MemoryPool
from nodeagent.core.dra.pool import ALL_FEATURES
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Request
from nodeagent.core.placement.place import find
from nodeagent.kube.resourceslice.validate import check
from tests.builders import tables
from tests.support.pages import facts_of

CPU = "nodeagent.dev/cpu"


def busy(inventory: Inventory) -> Ledger:
    """A few pods of different sizes, of which some have gone again."""
    ledger, pick = Ledger(), random.Random(1)
    for number in range(6):
        request = Request(cpus=pick.randint(1, max(1, len(inventory.cpus_usable) // 6)))
        if (placed := find(inventory, ledger, request)) is not None:
            holder = Holder(api=DEVICE_PLUGIN, resource=CPU, namespace="ns", pod=f"p{number}", container="main")
            ids = tuple(f"cpu{cpu}" for cpu in placed.cpus)
            one = Grant(id=f"g{number}", holder=holder, ids=ids, cpus=placed.cpus, confirmed=True)
            ledger = ledger_of.grant(ledger, one)
    return ledger_of.release(ledger, ["g1", "g3"])


@pytest.mark.parametrize("name", tables.names(answered=False))
def test_every_question_has_an_answer(name: str, recorded_tree: Callable[[str], Path], tmp_path: Path) -> None:
    """What fits, who is in the way, what to move, how many more, and a template that the API server would take."""
    inventory = read_root(str(recorded_tree(name)))
    ledger = busy(inventory)
    facts = facts_of(inventory, ledger, tmp_path)
    state = state_of(facts)
    free = len(inventory.cpus_usable - ledger.cpus_held)
    assert state.ledger == ledger
    one, every = (explain_request(state, Request(cpus=cpus)) for cpus in (1, len(inventory.cpus_usable)))
    assert one["fits"] == (free > 0)
    assert not every["fits"] and len(every["in_the_way"]) == len({g.holder.pod for g in ledger.grants.values()})
    assert all(explain_cpu(state, str(cpu))["online"] for cpu in inventory.cpus_online)
    for grant in ledger.grants.values():
        (unit,) = explain_pod(facts, state, f"ns/{grant.holder.pod}")["holds"]
        assert unit["cost"] and not unit["unknown"]
    advice = advice_document(state, (Request(), True), Progress("{}"))
    assert (advice["after"] is None) == bool(advice["why_not"]) and 0 <= advice["fragmentation"]["cpu"] < 1
    node = PodNode(inventory=state.inventory, health={}, resources={CPU: CpuResource(name=CPU)}, now_s=facts.now_s)
    assert forecast_pods(node, ledger, [ContainerDemand(name="c", amounts={CPU: 2})]).count == free // 2
    kinds = {one.kind: one for one in (CpuPool(), MemoryPool())}
    slices = template(state, Catalog(driver="nodeagent.dev", node_name="n", kinds=kinds), ALL_FEATURES)["items"]
    named = [{**one, "spec": {**one["spec"], "nodeName": "n"}} for one in slices]
    assert slices and not check(named)
