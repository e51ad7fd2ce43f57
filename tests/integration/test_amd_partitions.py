"""The real daemon partitions a GPU of AMD: it writes what is configured, and shows it. What the driver makes of that is
in tests/unit/managers/test_amd_partitions.py: here are files alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.config.schema import Config
from nodeagent.daemon.leftovers.devices import amd_partitions
from nodeagent.daemon.leftovers.leftover import Host
from nodeagent.daemon.paths import paths_of
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.amd_kernel import AmdKernel
from tests.support.dra_node import DraNode, dra_node, result
from tests.support.until import until

GPU, NAME = "0000:05:00.0", "0000-05-00-0"
WHOLE = {"name": "gpu", "kind": "gpu", "serve": "dra", "match": {"parent": ""}}


async def partitions(node: DraNode) -> list[dict[str, Any]]:
    return (await node.agent.ask("/v1/status"))[1]["amd"].get("partitions", [])


async def test_a_gpu_is_partitioned_once_it_is_released_and_the_status_says_what_it_waits_for(folder: Path) -> None:
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    kernel = AmdKernel(tree)
    kernel.gpu(GPU)
    file = tree.root / f"sys/bus/pci/devices/{GPU}/current_compute_partition"
    async with dra_node(folder, tree, [WHOLE]) as node:
        await node.published("gpu")
        claim = node.claim("c", result("gpu", NAME))
        (answer,) = await node.prepare(claim)
        assert answer.error == "" and await partitions(node) == []
        partition = {"gpus": ["0000:05:*"], "compute": "CPX"}
        node.agent.configure(**{**node.options, "amd": {"partitions": [partition]}})
        assert (await node.agent.ask("/v1/reload", "POST"))[0] == 200
        held = {"now": "SPX", "configured": "CPX", "waits": "it or a part of it is held"}

        async def waits() -> bool:
            return any(one["compute"] == held for one in await partitions(node))

        await until(waits)
        assert file.read_text() == "SPX\n"
        notes = (await node.agent.ask("/v1/status"))[1]["notes"]
        assert f"amd.partitions: GPU {GPU}: compute partition CPX wanted, SPX there: {held['waits']}" in notes
        words = [sys.executable, "-m", "nodeagent", "status", "--socket", str(node.agent.socket)]
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=True)
        lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
        assert "GPU PARTITION NOW CONFIGURED WAITS FOR" in lines
        assert f"{GPU} compute SPX CPX {held['waits']}" in lines
        assert await node.unprepare(claim) == [""]

        async def partitioned() -> bool:
            return file.read_text() == "CPX"

        await until(partitioned)
        assert (node.agent.state / "amd-partitions.json").exists()
    assert _left(folder, tree) == [
        f"the compute partition of {GPU} stays; SPX in {file.parent}/{file.name} sets it back",
    ]


def _left(folder: Path, tree: DeviceTree) -> Sequence[str]:
    """What an uninstallation says of the GPUs."""
    config = msgspec.convert({"stateDir": str(folder / "state")}, Config)
    where = paths_of(config, config_file=None, root=str(tree.root), kubelet_dir=None)
    return amd_partitions(Host(config=config, where=where)).notes
