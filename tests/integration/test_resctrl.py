"""The real agent on a machine without resctrl: who asks for ways is refused with the reason, and no other claim is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.support.dra_node import CPUS, DRIVER, consumed, dra_node

RESCTRL = {"pinning": {"mode": "cgroup", "resctrl": {"exclusiveWays": 2}}}
WHY = "the kernel or the hardware has no resctrl: there is no /sys/fs/resctrl"


def asking(**config: Any) -> dict[str, Any]:
    parameters = {"apiVersion": "nodeagent.dev/v1alpha1", "kind": "CpuConfig", **config}
    return {"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": parameters}}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs on 2 NUMA nodes."""
    return DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))


async def test_a_claim_for_ways_is_refused_where_there_are_none(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS], more=RESCTRL) as node:
        plain = node.claim("plain", consumed("cpu", "numa0", cpus="1"))
        ways = node.claim("ways", consumed("cpu", "numa0", cpus="1"), config=[asking(cacheWays=1)])
        granted, refused = await node.prepare(plain, ways)
        assert not granted.error and WHY in refused.error
        document: Any = (await node.agent.ask("/v1/status"))[1]
        assert any(WHY in note for note in document["notes"])
        assert document["pinning"]["caches"]["groups"] == []


async def test_a_claim_for_ways_is_refused_where_they_are_not_configured(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        ways = node.claim("ways", consumed("cpu", "numa0", cpus="1"), config=[asking(cacheWays=1)])
        (refused,) = await node.prepare(ways)
        assert "pinning.resctrl is not set" in refused.error
