"""docs/cli.md shows what the commands print: each block that can be run is run, and compared with the page.

`NODEAGENT_WRITE_DOCS=1 python -m pytest tests/integration/test_docs_cli.py` writes the page again instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.cli import parser
from nodeagent.cli.help.parser import leaves
from nodeagent.cli.shared.ask import SOCKET
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.doc_blocks import Step, matches, rewritten, steps
from tests.support.paths import CHECKOUT
from tests.support.running import Running, running

PAGE = CHECKOUT / "docs" / "cli.md"
MACHINE = "2s8n128c-smt"
"""256 CPUs on 8 NUMA nodes: the machine of the agent's blocks."""
GPUS, GPU_NODES = 8, range(8)
RESOURCES = [{"name": "cpu", "kind": "cpu"}, {"name": "gpu", "kind": "gpu"}]
CPU, GPU = "nodeagent.dev/cpu", "nodeagent.dev/gpu"
PODS = {
    ("ml", "infer-0"): {"server": {CPU: 8, GPU: 1}},
    ("ml", "train-0"): {"worker": {CPU: 32, GPU: 2}},
    ("shop", "till"): {"main": {CPU: 4}},
}
"""What the agent of the page has granted, in this order."""
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="this looks at the checkout; an installed package has none")


@contextlib.asynccontextmanager
async def page_agent(folder: Path, root: Path) -> AsyncIterator[Running]:
    """The agent that the page's blocks ask."""
    tree = DeviceTree(machine(root, MACHINE))
    for number in range(GPUS):
        address = f"0000:{number * 32 + 1:02x}:00.0"
        tree.pci(address, pci_class="030200", vendor="1002", device="74a1", driver="amdgpu", numa_node=number)
        tree.drm(address, number)
        tree.node(f"/dev/dri/card{number}")
        tree.node(f"/dev/dri/renderD{128 + number}")
    tree.node("/dev/kfd")
    options = {"resources": RESOURCES, "reservedCpus": "0,128"}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree.root, **options) as agent:
        await kubelet.wait_allocatable(CPU, 254)
        await kubelet.wait_allocatable(GPU, GPUS)
        for number, ((namespace, name), containers) in enumerate(PODS.items(), start=1):
            await kubelet.admit_pod(namespace, name, containers)
            await agent.until(
                "/v1/grants", lambda found, pods=number: len({g["pod"] for g in found if g["pod"]}) == pods
            )
        await agent.ready()
        yield agent


class Printing:
    """Runs the commands of the page."""

    def __init__(self, agent: Running, folder: Path) -> None:
        self._socket = str(agent.socket)
        self._folder = folder

    def of(self, step: Step) -> str:
        """What a command prints, on both streams."""
        program, verb, *rest = shlex.split(step.command)
        assert program == "nodeagent", f"docs/cli.md:{step.line}: only `nodeagent VERB` can be run"
        if "--root" in rest:
            name = Path(rest[rest.index("--root") + 1]).name
            if not (tree := self._folder / "machines" / name).exists():
                machine(tree, name)
        asks = any(
            "--socket" in one._option_string_actions for one in leaves(parser({verb})) if one.prog.split()[1] == verb
        )
        words = [sys.executable, "-m", "nodeagent", verb, *rest, *(["--socket", self._socket] if asks else [])]
        environ = {**os.environ, "PYTHONPATH": str(CHECKOUT), "TZ": "UTC"}
        done = subprocess.run(words, cwd=self._folder, capture_output=True, text=True, check=False, env=environ)
        shown = (done.stdout + done.stderr).replace(self._socket, SOCKET)
        return shown.replace(str(self._folder / "root"), "").replace(str(CHECKOUT), "/usr/lib/nodeagent")


async def test_the_page_shows_what_the_commands_print(folder: Path, tmp_path: Path) -> None:
    page = PAGE.read_text()
    async with page_agent(folder, tmp_path / "root") as agent:
        printing = Printing(agent, tmp_path)
        if os.environ.get("NODEAGENT_WRITE_DOCS"):
            PAGE.write_text(await asyncio.to_thread(rewritten, page, printing.of))
            return
        for step in steps(page):
            found = await asyncio.to_thread(printing.of, step)
            what = f"docs/cli.md:{step.line}: {step.command}"
            assert matches(step.output, found), f"{what} prints\n{found}\nand the page shows\n{step.output}"


def test_the_page_has_blocks_that_are_run() -> None:
    found = list(steps(PAGE.read_text()))
    assert {one.of_agent for one in found} == {True, False}
