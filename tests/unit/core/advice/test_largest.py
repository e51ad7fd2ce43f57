"""The most CPUs on one node after moves, against all numbers and all sets of pods."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.advice.fragmentation import fragmentation
from nodeagent.core.advice.largest import largest
from nodeagent.core.advice.tenants import tenants_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.request import SINGLE, Request
from nodeagent.core.placement.place import find
from tests.builders.inventories import even_rows, inventory_of
from tests.support.crowds import crowd, random_server
from tests.unit.core.advice.test_moves import by_hand, pod

MOST_PODS = 4


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_no_larger_number_of_cpus_can_be_had_on_one_node(seed: int) -> None:
    """Up to 16 CPUs and 4 pods: the largest number for which trying everything finds moves, or that fits as it is."""
    pick = random.Random(seed)
    inventory = random_server(pick, most_gpus=2, most_cores=16)
    ledger = crowd(pick, inventory, MOST_PODS)
    found = largest(inventory, ledger, Request(), tenants_of(ledger))
    every = [Request(cpus=cpus, numa=SINGLE) for cpus in range(1, len(inventory.cpus) + 1)]
    fit = [one.cpus for one in every if find(inventory, ledger, one) is not None]
    possible = [one.cpus for one in every if by_hand(inventory, ledger, one) is not None]
    assert found.now_cpus == max(fit, default=0)
    assert found.exact
    most = found.advice.request.cpus if found.advice.after is not None else 0
    assert most == max(possible, default=0)


def test_the_figure_says_how_scattered_the_free_rest_lies() -> None:
    """0 where as much is free on one node as can be, also where nothing is free; larger the thinner it is spread."""
    gpus = [Device(kind="gpu", id=f"gpu{i}", numa_node=i % 2) for i in range(4)]
    inventory = inventory_of(even_rows(1, 2, 1, 4, 1), devices=gpus)

    def figures(cpus: str, *devices: str, reserved: str = "") -> dict[str, float]:
        ledger = Ledger(grants={"a": pod("a", cpus, *devices)}, reserved=CpuSet.parse(reserved))
        return dict(fragmentation(inventory, ledger, ["gpu", "fpga"]))

    assert figures("") == {"cpu": 0, "gpu": 0, "fpga": 0}
    assert figures("0-3", "gpu0", "gpu2") == {"cpu": 0, "gpu": 0, "fpga": 0}
    assert figures("0-7", "gpu0", "gpu1", "gpu2", "gpu3") == {"cpu": 0, "gpu": 0, "fpga": 0}
    assert figures("0-1,4-5", "gpu0", "gpu1") == {"cpu": 0.5, "gpu": 0.5, "fpga": 0}
    assert figures("0,4")["cpu"] == 0.25
    assert figures("1-2,5", reserved="0,4")["cpu"] == 1 - 2 / 3
    assert dict(fragmentation(replace(inventory, numa_nodes=()), Ledger())) == {"cpu": 0}
