"""The command line as a person or a script meets it: exit codes, one line of error, tables and JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.cli import VERBS
from nodeagent.version import VERSION
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import CPU, Running, running

ASKING = ("status", "devices", "grants")


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodeagent", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@contextlib.asynccontextmanager
async def standing(folder: Path, tmp_path: Path) -> AsyncIterator[tuple[Running, FakeKubelet]]:
    tree = machine(tmp_path / "root", "1s1n4c")
    options = {
        "resources": [{"name": "cpu", "kind": "cpu"}],
        "release": {"pollSeconds": 0.2, "unconfirmedSeconds": 0.3, "confirmedSeconds": 0.1, "unobservedSeconds": 0.1},
    }
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=tree, **options) as agent:
        await kubelet.wait_allocatable(CPU, 4)
        await kubelet.admit_pod("shop", "till", {"main": {CPU: 2}})
        await agent.until("/v1/grants", lambda grants: grants and grants[0]["pod"])
        await agent.ready()
        yield agent, kubelet


def test_the_version_says_that_the_compiled_core_runs() -> None:
    done = cli("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"nodeagent {VERSION} (core: compiled")


def test_without_a_verb_it_shows_the_verbs() -> None:
    done = cli()
    assert done.returncode == 2
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(verb: str) -> None:
    done = cli(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert VERBS[verb].text in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stauts"], "stauts"),
        (["--colour"], "--colour"),
        (["status", "--colour"], "--colour"),
        (["status", "-o", "xml"], "xml"),
        (["config"], "check|schema"),
        (["run", "--config"], "--config"),
        (["config", "check", "/nonexistent"], "No such file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], expected: str) -> None:
    done = cli(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert expected in done.stderr


@pytest.mark.parametrize("verb", ASKING)
def test_no_agent_is_one_line_and_exit_code_1(folder: Path, verb: str) -> None:
    done = cli(verb, "--socket", str(folder / "none.sock"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "none.sock" in done.stderr and "No such file" in done.stderr


def test_a_socket_path_that_is_too_long_is_one_line(folder: Path) -> None:
    done = cli("status", "--socket", str(folder / ("s" * 200)))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


async def test_something_else_behind_the_socket_is_one_line(folder: Path) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n<x>")
        writer.close()

    async with await asyncio.start_unix_server(nonsense, folder / "s"):
        done = await asyncio.to_thread(cli, "status", "--socket", str(folder / "s"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


async def test_tables_and_json_say_the_same(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        for verb in ASKING:
            table = await asyncio.to_thread(cli, verb, "--socket", str(agent.socket))
            document = await asyncio.to_thread(cli, verb, "-o", "json", "--socket", str(agent.socket))
            assert (table.returncode, document.returncode) == (0, 0)
            assert CPU in table.stdout
            assert json.loads(document.stdout)
        (grant,) = (await agent.ask("/v1/grants"))[1]
        line = next(line for line in cli("grants", "--socket", str(agent.socket)).stdout.splitlines() if "till" in line)
        assert line.split() == [grant["id"], "shop", "till", "main", "-", CPU, grant["cpus"], "-", "-", "-", "-"]


async def test_a_bad_configuration_shows_in_the_status(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        agent.write_config("resorces: []")
        await agent.until("/v1/status", lambda status: status["config_error"])
        done = await asyncio.to_thread(cli, "status", "--socket", str(agent.socket))
        assert "configuration: " in done.stdout and "did you mean resources?" in done.stdout


INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import runpy; runpy.run_module('nodeagent', run_name='__main__', alter_sys=True)"
)
"""The program, also where the tests were started in the background by a shell: it has its children ignore SIGINT."""


async def test_watch_shows_it_again_when_it_changes(folder: Path, tmp_path: Path) -> None:
    """One document for each change, whole, until it is interrupted."""
    async with standing(folder, tmp_path) as (agent, kubelet):
        words = ("-m", "nodeagent", "grants", "--watch", "--socket", str(agent.socket))
        watching = await asyncio.create_subprocess_exec(
            sys.executable, "-c", INTERRUPTIBLE, *words[2:], stdout=asyncio.subprocess.PIPE
        )
        assert watching.stdout is not None
        assert b"GRANT" in await watching.stdout.readline()
        assert b"till" in await watching.stdout.readline()
        await kubelet.delete_pod("shop", "till")
        assert b"GRANT" in await watching.stdout.readline()
        watching.send_signal(2)
        assert await watching.wait() == 130


async def test_watch_is_silent_while_nothing_happens(folder: Path, tmp_path: Path) -> None:
    """The agent grows older all the time: that alone is no news."""
    async with standing(folder, tmp_path) as (agent, _):
        words = ("-m", "nodeagent", "status", "--watch", "-o", "json", "--socket", str(agent.socket))
        watching = await asyncio.create_subprocess_exec(
            sys.executable, "-c", INTERRUPTIBLE, *words[2:], stdout=asyncio.subprocess.PIPE
        )
        assert watching.stdout is not None
        await agent.ready()
        before = (await agent.until("/v1/status", lambda one: one["ready"]))["uptime_s"]
        await agent.until("/v1/status", lambda one: one["uptime_s"] > before + 3)
        watching.send_signal(2)
        shown = (await watching.stdout.read()).decode()
        assert await watching.wait() == 130
        assert shown.count('"uptime_s"') <= 2, shown


async def test_watch_outlives_a_restart_of_the_agent(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, kubelet):
        words = ("-m", "nodeagent", "grants", "--watch", "--socket", str(agent.socket))
        pipe = asyncio.subprocess.PIPE
        watching = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=pipe, stderr=pipe)
        assert watching.stdout is not None and watching.stderr is not None
        assert b"GRANT" in await watching.stdout.readline()
        assert b"till" in await watching.stdout.readline()
        await agent.stop()
        assert b"cannot ask the agent" in await watching.stderr.readline()
        await agent.start()
        await kubelet.wait_allocatable(CPU, 4)
        await kubelet.admit_pod("shop", "second", {"main": {CPU: 1}})
        await watching.stdout.readuntil(b"second")
        watching.terminate()
        await watching.wait()


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`nodeagent config schema | head -1`"""
    command = [sys.executable, "-m", "nodeagent", "inventory", "-o", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 0
    process.stderr.close()
