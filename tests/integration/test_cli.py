"""The command line as a person or a script meets it: exit codes, one line of error, tables and JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.cli import VERBS
from nodeagent.version import VERSION
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.interruptible import INTERRUPTIBLE
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
        (["stauts"], "there is no verb 'stauts'; did you mean status?"),
        (["ledger", "exprot"], "did you mean export?"),
        (["status", "--watsh"], "did you mean --watch?"),
        (["status", "--colour=never"], "did you mean --color?"),
        (["--color", "pink", "status"], "expected one of auto, always, never"),
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


STREAMS = ("0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-")


@pytest.mark.parametrize("closed", STREAMS)
def test_streams_that_are_closed_are_no_files_that_it_opens(tmp_path: Path, closed: str) -> None:
    """As supervisors may start a program: else a ledger would be file 2, and what a library prints would be in it."""
    said = tmp_path / "said"
    program = (
        "import os, pathlib, sys; from nodeagent.cli import main; code = main(['version', '-o', 'json']); "
        "next = os.open('.', os.O_RDONLY); pathlib.Path(sys.argv[1]).write_text(f'{code} {next > 2}')"
    )
    script = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program, str(said)]
    assert subprocess.run(script, capture_output=True, check=False).returncode == 0
    assert said.read_text() == "0 True"


async def test_without_an_open_stdin_there_is_nobody_to_ask(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        (grant,) = (await agent.ask("/v1/grants"))[1]
        words = [sys.executable, "-m", "nodeagent", "release", grant["id"], "--socket", str(agent.socket)]
        script = ["sh", "-c", 'exec "$@" 0<&-', "sh", *words]
        done = await asyncio.to_thread(subprocess.run, script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "give --yes" in done.stderr


def test_a_socket_path_that_is_too_long_is_one_line(folder: Path) -> None:
    done = cli("status", "--socket", str(folder / ("s" * 200)))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n<x>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\n[]",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 2\xb2\xb2 OK\r\n\r\n",
        b"",
    ],
)
async def test_something_else_behind_the_socket_is_one_line(folder: Path, answer: bytes) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
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
        age = line.split()[6]
        assert line.split() == [grant["id"], "shop/till/main", CPU, grant["cpus"], "-", "-", age, "-"]
        assert re.fullmatch(r"\d+s", age)


async def test_a_list_is_narrowed_sorted_and_written_in_every_form(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, kubelet):
        await kubelet.admit_pod("shop", "second", {"main": {CPU: 1}})
        grants = await agent.until("/v1/grants", lambda found: len([one for one in found if one["pod"]]) == 2)
        till, second = (one["id"] for one in grants)
        devices = (await agent.ask("/v1/devices"))[1]
        ids = {one: [it["id"] for it in devices if it["grant"] == one] for one in (till, second)}

        async def said(verb: str, *words: str) -> str:
            done = await asyncio.to_thread(cli, verb, *words, "--socket", str(agent.socket))
            assert (done.returncode, done.stderr) == (0, ""), (words, done)
            return done.stdout

        assert await said("grants", "-o", "name") == f"{till}\n{second}\n"
        assert await said("grants", "-o", "json") == json.dumps(grants, indent=1) + "\n"
        assert await said("grants", "-o", "jsonpath={[*].pod}") == "till second"
        assert "pod: till\n" in await said("grants", "-o", "yaml")
        for sort_by in ("age", "holder", ".cpus", "{.granted_at}"):
            shown = (await said("grants", "-o", "name", "--sort-by", sort_by)).split()
            assert set(shown) == {till, second}, sort_by
        assert (await said("grants", "-o", "name", "--sort-by", "age")).split() == [second, till]
        for words, expected in (
            (("--pod", "till"), [till]),
            (("--pod", "shop/sec*"), [second]),
            (("-n", "shop"), [till, second]),
            (("-n", "other"), []),
            (("--claim", "any"), []),
            (("--device", ids[second][0]), [second]),
            (("--numa", "0"), [till, second]),
            (("--numa", "1-3"), []),
            (("--resource", "cpu"), [till, second]),
            (("--resource", CPU, "--pod", "second"), [second]),
            (("--resource", "gpu"), []),
        ):
            assert (await said("grants", "-o", "name", *words)).split() == expected, words
            held = (await said("devices", "-o", "name", "--pod", "*", *words)).split()
            assert set(held) <= {one for grant in expected for one in ids[grant]}, words
        assert (await said("devices", "--color", "always")).startswith("\x1b[1mRESOURCE")
        assert (await said("grants", "-o", "json", "--color", "always")).startswith("[")
        assert (await said("devices", "-o", "name", "--pod", "till")).split() == ids[till]
        row = (await said("devices")).splitlines()[1].split()
        assert row[:6] == [CPU, "0", "4", "1", "3", "0"]
        assert row[7:] == ["shop/till/main", "(2),", "shop/second/main"]
        assert len((await said("devices", "-o", "wide")).splitlines()) == 1 + 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-o", "jsonpath={.a"], "at character 1"),
        (["-o", "jsonpath"], "jsonpath=TEMPLATE"),
        (["--sort-by", "colour"], "expected one of grant, holder"),
        (["--sort-by", ".a["], "at character 5"),
        (["--numa", "0-"], "--numa"),
    ],
)
async def test_a_wrong_form_order_or_filter_is_one_line(folder: Path, words: list[str], expected: str) -> None:
    """Found before the agent is asked, or, as what it answers decides, with one that answers."""
    async with await asyncio.start_unix_server(_nothing_held, folder / "s"):
        done = await asyncio.to_thread(cli, "grants", *words, "--socket", str(folder / "s"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert expected in done.stderr


async def _nothing_held(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[]\n")
    writer.close()


async def test_a_bad_configuration_shows_in_the_status(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        agent.write_config("resorces: []")
        await agent.until("/v1/status", lambda status: status["config_error"])
        done = await asyncio.to_thread(cli, "status", "--socket", str(agent.socket))
        assert "configuration: " in done.stdout and "did you mean resources?" in done.stdout


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


async def test_watch_ends_when_its_reader_goes_away(folder: Path, tmp_path: Path) -> None:
    """`nodeagent grants --watch | head -1`: at once, although nothing changes."""
    async with standing(folder, tmp_path) as (agent, _):
        command = [sys.executable, "-m", "nodeagent", "grants", "--watch", "--socket", str(agent.socket)]
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # noqa: ASYNC220
        assert watching.stdout is not None and watching.stderr is not None
        await asyncio.to_thread(watching.stdout.readline)
        watching.stdout.close()
        assert (await asyncio.to_thread(watching.wait, 30), watching.stderr.read()) == (0, b"")
        watching.stderr.close()


async def test_watch_redraws_a_terminal_and_says_that_the_agent_is_away(folder: Path, tmp_path: Path) -> None:
    """A table of a narrow terminal replaces the one before."""
    async with standing(folder, tmp_path) as (agent, kubelet):
        ours, its = pty.openpty()
        environ = {**os.environ, "COLUMNS": "20", "NO_COLOR": "1", "TERM": "xterm"}
        command = [sys.executable, "-m", "nodeagent", "grants", "--watch", "--socket", str(agent.socket)]
        watching = subprocess.Popen(command, stdout=its, stderr=its, env=environ)  # noqa: ASYNC220
        os.close(its)
        seen = await asyncio.to_thread(_read_until, ours, b"AGE")
        assert seen.startswith(b"\x1b[H\x1b[2JGRANT") and b"HOLDER   shop/till/main" in seen
        await kubelet.admit_pod("shop", "second", {"main": {CPU: 1}})
        assert b"\x1b[H\x1b[2JGRANT" in await asyncio.to_thread(_read_until, ours, b"second")
        await agent.stop()
        assert b"cannot ask the agent" in await asyncio.to_thread(_read_until, ours, b"cannot ask the agent")
        watching.terminate()
        await asyncio.to_thread(watching.wait, 30)
        os.close(ours)


def _read_until(descriptor: int, expected: bytes) -> bytes:
    """What a terminal gets up to some text; the test's process ends a wait that is in vain."""
    seen = b""
    while expected not in seen:
        ready, _, _ = select.select([descriptor], [], [], 30)
        assert ready, seen
        seen += os.read(descriptor, 4096)
    return seen


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`nodeagent config schema | head -1`"""
    command = [sys.executable, "-m", "nodeagent", "inventory", "-o", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 0
    process.stderr.close()
