"""The verbs that change a running agent or wait for it: release, reload, wait, version."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from nodeagent.cli.node.wait import seconds
from nodeagent.errors import InputError
from nodeagent.version import VERSION
from tests.builders.machines import machine
from tests.integration.test_cli import _read_until, cli, standing
from tests.support.running import CPU, Running, running


async def said(agent: Running, *words: str, code: int = 0) -> str:
    """What a verb prints on its way to an exit code: its output, or its one line of error."""
    done = await asyncio.to_thread(cli, *words, "--socket", str(agent.socket))
    assert done.returncode == code, done
    assert done.stderr.count("\n") == (code != 0), done
    return done.stderr if code else done.stdout


async def test_a_grant_is_released_by_hand(folder: Path, tmp_path: Path) -> None:
    """Without a terminal only with --yes; what is released is what was named."""
    async with standing(folder, tmp_path) as (agent, kubelet):
        (grant,) = (await agent.ask("/v1/grants"))[1]
        identity, cpus = grant["id"], grant["cpus"]
        assert "give --yes" in await said(agent, "release", identity, code=2)
        nearly = identity[:-1] + "x"
        assert f"did you mean {identity}?" in await said(agent, "release", nearly, "--yes", code=1)
        assert (await agent.ask("/v1/grants"))[1] == [grant]
        await kubelet.stop()
        assert (
            await said(agent, "release", identity, "--yes") == f"released {identity} of shop/till/main: CPUs {cpus}\n"
        )
        assert [one["id"] for one in (await agent.ask("/v1/grants"))[1] if one["id"] == identity] == []
        await kubelet.start(wipe=False)


@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"\n", 1), (b"y\n", 0)])
async def test_a_terminal_is_asked_before_a_release(folder: Path, tmp_path: Path, answer: bytes, code: int) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        (grant,) = (await agent.ask("/v1/grants"))[1]
        ours, its = pty.openpty()
        command = [sys.executable, "-m", "nodeagent", "release", grant["id"], "--socket", str(agent.socket)]
        releasing = subprocess.Popen(command, stdin=its, stdout=its, stderr=its)  # noqa: ASYNC220
        os.close(its)
        asked = await asyncio.to_thread(_read_until, ours, b"[y/N]")
        assert f"{grant['id']} of shop/till/main: CPUs {grant['cpus']}".encode() in asked
        os.write(ours, answer)
        expected = b"nothing is released" if code else b"released g-"
        await asyncio.to_thread(_read_until, ours, expected)
        assert await asyncio.to_thread(releasing.wait, 30) == code
        os.close(ours)
        there = any(one["id"] == grant["id"] for one in (await agent.ask("/v1/grants"))[1])
        assert there == bool(code)


async def test_a_reload_shows_what_changed(folder: Path, tmp_path: Path) -> None:
    """A configuration that the agent refuses is exit code 2 with the reason, and the agent keeps what it has."""
    async with standing(folder, tmp_path) as (agent, _):
        assert await said(agent, "reload") == "nothing changed\n"
        agent.configure(resources=[{"name": "cpu", "kind": "cpu"}], log={"level": "debug"})
        changed = json.loads(await said(agent, "reload", "-o", "json"))["changed"]
        followed = [line for line in agent.log if line.get("event") == "configuration-reloaded"]
        assert any(one.startswith(("log", "release")) for one in changed) or followed
        agent.write_config("resorces: []")
        assert "did you mean resources?" in await said(agent, "reload", code=2)


async def test_waiting_ends_when_the_agent_is_ready(folder: Path, tmp_path: Path) -> None:
    """It may start later than the wait."""
    waiting = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodeagent", "wait", "--timeout=50s", "--socket", str(folder / "run" / "status.sock")),
        stdout=asyncio.subprocess.PIPE,
    )
    async with standing(folder, tmp_path) as (agent, _):
        out, _ = await waiting.communicate()
        assert (waiting.returncode, out) == (0, b"ready\n")
        for condition in ("ready", "whole", "registered"):
            assert await said(agent, "wait", f"--for={condition}", "--timeout=0") == f"{condition}\n"


async def test_a_wait_that_is_in_vain_says_why(folder: Path, tmp_path: Path) -> None:
    root = machine(tmp_path / "root", "1s1n4c")
    async with running(folder, root=root, resources=[{"name": "cpu", "kind": "cpu"}]) as agent:
        await agent.until("/v1/status", lambda status: status["resources"])
        assert f"for ready: {CPU}: waiting for " in await said(agent, "wait", "--timeout=0.3s", code=1)
        assert f"for registered: {CPU}: " in await said(agent, "wait", "--for=registered", "--timeout=0", code=1)
        assert await said(agent, "wait", "--for=whole", "--timeout=0") == "whole\n"
    done = await asyncio.to_thread(cli, "wait", "--timeout=0", "--socket", str(folder / "none"))
    assert (done.returncode, "cannot ask the agent" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("90", 90), ("90s", 90), ("1.5s", 1.5), ("5m", 300), ("1h30m", 5400), ("1h1s", 3601)],
)
def test_a_timeout_is_read_as_kubectl_does(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "5m5h", "9" * 50, "1,5s"])
def test_a_wrong_timeout_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a time such as"):
        seconds(text)


async def test_the_version_is_that_of_the_program_and_of_the_agent(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        found = json.loads(await said(agent, "version", "-o", "json"))
        assert found["client"]["version"] == found["agent"]["version"] == VERSION
        assert (found["client"]["core_compiled"], found["agent"]["ready"]) == (True, True)
        assert f"agent {VERSION}, up " in await said(agent, "version")
    alone = cli("version", "--socket", str(folder / "none"))
    assert (alone.returncode, alone.stdout.splitlines()[1]) == (0, f"agent: none answers at {folder / 'none'}")
