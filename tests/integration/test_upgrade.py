"""From version 0.1 to this one and back, with pods and claims that hold something: each version shows the same grants.

The wheels of both are built and installed side by side, and run in turn on the same folders. Version 0.1 is taken from
the history of the repository. NODEAGENT_UPGRADE=1 runs this; it takes some minutes, most of them to build.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.dra_kubelet import ClaimId
from tests.support.dra_node import CHAR, CPU, CPUS, DRIVER, SERIAL, DraNode, consumed, dra_node
from tests.support.paths import CHECKOUT

RELEASED = "98625d2"
"""The first build of 0.1 that serves claims, with the first layout of the ledger."""
RELEASE = {"release": {"unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1}}
"""As far as that build has such keys."""


def _history() -> str:
    """Why version 0.1 cannot be had, or ""."""
    command = ["git", "cat-file", "-e", f"{RELEASED}^{{commit}}"]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "git is not installed"
    return f"the repository has no commit {RELEASED}, as in a shallow clone" if done.returncode else ""


pytestmark = [
    pytest.mark.skipif(os.environ.get("NODEAGENT_UPGRADE") != "1", reason="NODEAGENT_UPGRADE=1 runs two versions"),
    pytest.mark.skipif(bool(_history()), reason=_history()),
]


def install(source: Path, target: Path) -> Path:
    """Build the wheel of some sources and install it, without libraries, into a folder of its own."""
    wheels = target.with_name(f"{target.name}-wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    for words in (
        ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)],
        ["install", "--no-deps", "--no-index", "--find-links", str(wheels), "--target", str(target), "nodeagent"],
    ):
        done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 0.1, installed."""
    folder = tmp_path_factory.mktemp("released")
    packed = subprocess.run(["git", "archive", RELEASED], cwd=CHECKOUT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as tar:
        tar.extractall(folder / "source", filter="data")
    return install(folder / "source", folder / "installed")


@pytest.fixture(scope="session")
def present(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This version, installed."""
    folder = tmp_path_factory.mktemp("present")
    ignored = shutil.ignore_patterns(".git", ".venv", ".cache", "*.so", "*.egg-info", "build", "dist", "tests")
    return install(shutil.copytree(CHECKOUT, folder / "source", ignore=ignored), folder / "installed")


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """8 CPUs on 2 NUMA nodes, with two serial ports."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    for number in range(2):
        made.node(f"/dev/ttyS{number}")
    return made


async def change(node: DraNode, version: Path, how: signal.Signals) -> None:
    """The agent ends, and another version starts in its place and is registered with kubelet."""
    dra, plugin = node.dra.registrations[DRIVER], node.kubelet.registrations[CPU]
    await node.agent.stop(how)
    node.agent.program = version
    await node.agent.start()
    await node.dra.wait_registered(DRIVER, dra + 1)
    await node.kubelet.wait_registered(CPU, plugin + 1)


async def holdings(node: DraNode) -> dict[str, tuple[Any, ...]]:
    """What the agent shows that is held, by the id of the grant."""
    return {one["id"]: (one["cpus"], one["devices"], one["claim"]) for one in await node.grants()}


async def test_claims_and_pods_keep_what_they_hold_over_upgrades_and_rollbacks(
    folder: Path, tree: DeviceTree, released: Path, present: Path
) -> None:
    """Ended in order or killed. What one version grants to a new claim, the other shows, and releases."""
    async with dra_node(folder, tree, [CPUS, SERIAL], more=RELEASE, program=released) as node:
        await node.published("cpu", "char")
        await node.kubelet.wait_allocatable(CPU, 8)
        claim = node.claim("c", consumed("cpu", "numa1", cpus="2"))
        assert [one.error for one in await node.prepare(claim)] == [""]
        await node.kubelet.admit_pod("default", "a", {"main": {CPU: 2, CHAR: 1}})
        held = await holdings(node)
        assert len(held) == 3
        before: list[ClaimId] = []
        for number, version in enumerate((present, released, present)):
            await change(node, version, signal.SIGKILL if number % 2 else signal.SIGTERM)
            of_before = {key: one for key, one in (await holdings(node)).items() if key not in held}
            assert held.items() <= (await holdings(node)).items()
            assert len(of_before) == len(before)
            assert [one.error for one in await node.prepare(claim)] == [""]
            assert await node.unprepare(*before) == [""] * len(before)
            before = [node.claim(f"more-{number}", consumed("cpu", "numa0", cpus="1"))]
            assert [one.error for one in await node.prepare(*before)] == [""]
            assert (await holdings(node)).items() > held.items()
        assert not [*(folder / "state").glob("*damaged*")]
        export = [sys.executable, "-m", "nodeagent", "ledger", "export", "--state-dir", str(folder / "state")]
        done = await asyncio.create_subprocess_exec(*export, cwd=present, stdout=asyncio.subprocess.PIPE)
        assert len(json.loads((await done.communicate())[0])["grants"]) == 4
