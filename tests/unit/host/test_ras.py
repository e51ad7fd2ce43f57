"""Errors that AMD's GPUs count: which of them count against a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from tests.builders.devices import DeviceTree
from tests.support.health_node import HealthNode, health_node

GPU = "0000:41:00.0"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    tree = DeviceTree(tmp_path)
    tree.pci(GPU, pci_class="038000", vendor="1002", driver="amdgpu")
    tree.drm(GPU, 0)
    for name in ("card0", "renderD128"):
        tree.node(f"/dev/dri/{name}")
    return tree


def count(tree: DeviceTree, blocks: Mapping[str, str]) -> None:
    for block, text in blocks.items():
        tree.write(f"sys/bus/pci/devices/{GPU}/ras/{block}_err_count", text)
    tree.write(f"sys/bus/pci/devices/{GPU}/ras/features", "feature mask: 0x3fff")


def ill(node: HealthNode, device: str = GPU) -> tuple[str, str]:
    found = illness(node.agent.inventory.device_by_id[device], node.agent.health)
    return (found.state, found.reason) if found is not None else (HEALTHY, "")


async def test_an_uncorrected_error_makes_the_gpu_and_its_partitions_unhealthy(tree: DeviceTree) -> None:
    """The reason names the blocks; corrected and deferred errors are only counted."""
    for partition in (0, 1):
        tree.kfd(1 + partition, GPU, partition=partition << 28, render=128 + partition)
    count(tree, {"umc": "ue: 0\nce: 7", "gfx": "ue: 0\nce: 0\nde: 1"})
    async with health_node(tree) as node:
        await node.look()
        assert ill(node) == (HEALTHY, "")
        assert node.health.readings()[GPU, "ras"] == {
            "gfx_corrected": 0,
            "gfx_deferred": 1,
            "gfx_uncorrected": 0,
            "umc_corrected": 7,
            "umc_uncorrected": 0,
        }
        count(tree, {"umc": "ue: 2\nce: 7", "gfx": "ue: 1\nce: 0"})
        await node.look()
        shown = {ill(node, one.id) for one in node.agent.inventory.devices_by_kind["gpu"]}
        assert len(node.agent.inventory.devices_by_kind["gpu"]) == 3
        assert shown == {(UNHEALTHY, "3 uncorrected errors in gfx, umc since the driver was loaded")}
        count(tree, {"umc": "ue: 0\nce: 0", "gfx": "ue: 0\nce: 0"})
        await node.look(1)
        assert ill(node)[0] == UNHEALTHY
        await node.look(30)
        assert ill(node) == (HEALTHY, "")


async def test_counts_that_cannot_be_asked_for_now_leave_what_is_known(tree: DeviceTree) -> None:
    """The GPU is being reset, or sleeps and is not woken up."""
    count(tree, {"umc": "ue: 2\nce: 0"})
    async with health_node(tree) as node:
        await node.look()
        known = ill(node)
        count(tree, {"umc": "Query currently inaccessible"})
        await node.look(100)
        await node.look(100)
        assert ill(node) == known == (UNHEALTHY, "2 uncorrected errors in umc since the driver was loaded")
        count(tree, {"umc": "ue: 0\nce: 0"})
        tree.write(f"sys/bus/pci/devices/{GPU}/power/runtime_status", "suspended")
        await node.look(100)
        await node.look(100)
        assert ill(node) == known


async def test_a_gpu_without_counts_or_under_another_driver_says_nothing(tree: DeviceTree) -> None:
    async with health_node(tree) as node:
        await node.look()
        assert "ras" not in node.sources(GPU)


async def test_a_gpu_does_not_recover_while_the_block_that_was_ill_does_not_answer(tree: DeviceTree) -> None:
    """The others being well says nothing of it; another that is ill counts."""
    count(tree, {"umc": "ue: 2\nce: 0", "gfx": "ue: 0\nce: 0"})
    async with health_node(tree) as node:
        await node.look()
        known = ill(node)
        count(tree, {"umc": "Query currently inaccessible"})
        await node.look(100)
        await node.look(100)
        assert ill(node) == known == (UNHEALTHY, "2 uncorrected errors in umc since the driver was loaded")
        count(tree, {"gfx": "ue: 1\nce: 0"})
        await node.look(1)
        assert ill(node) == (UNHEALTHY, "1 uncorrected errors in gfx since the driver was loaded")
