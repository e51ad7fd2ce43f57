"""`nodeagent doctor` and `nodeagent top` alongside a real agent: while it runs, killed, and back again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from nodeagent.host.sysfs.sysfs import BOOT_ID
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import CPU, Running, running

RESOURCES = [{"name": "cpu", "kind": "cpu"}]
LINE_S = 60.0


def of_this_boot(tree: Path) -> Path:
    """Give a machine the boot id of the host, of which the doctor asks."""
    (tree / BOOT_ID).parent.mkdir(parents=True)
    (tree / BOOT_ID).write_text(Path("/", BOOT_ID).read_text())
    return tree


async def started(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeagent", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def findings(agent: Running, folder: Path) -> dict[str, Any]:
    """What the doctor says in JSON, by check. The agent's folders are those of its configuration."""
    words = ("--config", str(agent.config_file), "--kubelet-dir", str(folder / "kubelet"))
    process = await started("doctor", "-o", "json", *words)
    out, errors = await process.communicate()
    assert not errors and process.returncode in (0, 1, 2)
    return {one["name"]: one for one in json.loads(out)["checks"]}


async def test_the_doctor_answers_while_the_agent_runs_and_after_it_was_killed(folder: Path, tmp_path: Path) -> None:
    tree = of_this_boot(machine(tmp_path / "root", "1s1n4c"))
    async with (
        FakeKubelet(folder / "kubelet") as kubelet,
        running(folder, root=tree, resources=RESOURCES) as agent,
    ):
        await kubelet.wait_allocatable(CPU, 4)
        await agent.ready()
        found = await findings(agent, folder)
        for name in (
            "agent.answers",
            "agent.ready",
            "agent.version",
            "agent.configuration",
            "agent.socket",
            "agent.boot",
        ):
            assert found[name]["state"] == "ok", found[name]
        assert found["state.ledger"]["seen"] == "grants: 0, all of them whole and readable"
        assert found["kubelet.plugins"]["state"] in ("ok", "skipped")
        await agent.stop(signal.SIGKILL)
        found = await findings(agent, folder)
        assert found["agent.answers"]["state"] == "warning"
        assert found["agent.ready"]["state"] == "skipped"
        assert found["state.ledger"]["state"] == found["agent.configuration"]["state"] == "ok"


async def test_top_goes_on_when_a_killed_agent_is_back(folder: Path, tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    tree = machine(tmp_path / "root", f"1s1n{max(cpus) + 1}c")
    options = {"release": {"unconfirmedSeconds": 600}, "resources": RESOURCES}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree, **options) as agent:
        await kubelet.wait_allocatable(CPU, max(cpus) + 1)
        await kubelet.admit_pod("shop", "till", {"main": {CPU: 1}})
        await agent.until("/v1/grants", lambda grants: grants and grants[0]["pod"])
        top = await started("top", "--batch", "--delay", "0.1", "--socket", str(agent.socket))
        try:
            await line(top, "shop/till/main")
            await agent.stop(signal.SIGKILL)
            await line(top, "waiting for it")
            await agent.start()
            await agent.ready()
            await line(top, "shop/till/main")
        finally:
            top.terminate()
            _, errors = await top.communicate()
        assert b"Traceback" not in errors


async def line(process: asyncio.subprocess.Process, text: str) -> None:
    """Wait for a line of what it prints."""
    assert process.stdout is not None
    async with asyncio.timeout(LINE_S):
        while text.encode() not in (found := await process.stdout.readline()):
            assert found, "it has ended"
