"""Completion in real shells, against a real agent and without one."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.cli import COMPLETE, VERBS
from nodeagent.cli.completion.scripts import SCRIPTS
from tests.integration.test_cli import cli, standing
from tests.support.running import CPU
from tests.support.shells import completed, completed_by_fish, completed_by_zsh

SHELLS: dict[str, Callable[[str, Path, Path], set[str]]] = {
    "bash": completed,
    "zsh": completed_by_zsh,
    "fish": completed_by_fish,
}


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], set[str]]:
    """What one of the shells offers for a line."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    script = tmp_path / f"completion.{request.param}"
    script.write_text(cli("completion", request.param).stdout)
    return lambda line: SHELLS[request.param](line, script, tmp_path)


def test_verbs_options_and_choices_are_completed(complete: Callable[[str], set[str]]) -> None:
    assert complete("nodeagent gra") == {"grants"}
    assert complete("nodeagent ") == set(VERBS)
    assert complete("nodeagent ledger e") == {"export"}
    assert complete("nodeagent grants --na") == {"--namespace"}
    assert complete("nodeagent grants -o w") == {"wide"}
    assert complete("nodeagent wait --for r") == {"ready", "registered"}
    assert complete("nodeagent grants --sort-by ag") == {"age"}
    assert complete("nodeagent completion z") == {"zsh"}
    assert complete("nodeagent grants --pod x --po") == set()


def test_without_an_agent_nothing_is_offered_and_nothing_said(
    complete: Callable[[str], set[str]], folder: Path
) -> None:
    assert complete(f"nodeagent grants --socket {folder}/none --pod ") == set()


async def test_pods_grants_devices_and_resources_are_those_of_the_agent(
    complete: Callable[[str], set[str]], folder: Path, tmp_path: Path
) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        (grant,) = (await agent.ask("/v1/grants"))[1]

        async def offered(verb: str, rest: str) -> set[str]:
            return await asyncio.to_thread(complete, f"nodeagent {verb} --socket {agent.socket} {rest}")

        assert await offered("grants", "--pod sh") == {"shop/till"}
        assert await offered("grants", "-n ") == {"shop"}
        assert await offered("grants", "--claim ") == set()
        assert await offered("devices", "--resource n") == {CPU}
        assert await offered("devices", "--device cpu") == {"cpu0", "cpu1", "cpu2", "cpu3"}
        assert await offered("release", "g") == {grant["id"]}


async def test_an_agent_that_does_not_answer_costs_half_a_second(folder: Path) -> None:
    """It is asked once, and the word stays as it is."""
    asked: list[bytes] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(100))
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(silent, folder / "s"):
        words = (COMPLETE, "grants", "--socket", str(folder / "s"), "--pod", "")
        done = await asyncio.to_thread(cli, *words)
    assert (done.returncode, done.stdout, done.stderr, len(asked)) == (0, "", "", 1)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("grants", "--pod=", ""), None),
        (("wait", "--for=re"), {"--for=ready", "--for=registered"}),
        (("run", "--config", ""), "files"),
        (("ledger", "import", ""), "files"),
        (("health", ""), {"clear"}),
        (("nonsense", "x", ""), set(VERBS)),
        ((), set(VERBS)),
    ],
)
def test_the_completer_answers_for_any_words(words: tuple[str, ...], offered: set[str] | str | None) -> None:
    done = cli(COMPLETE, *words)
    assert done.stderr == ""
    if offered == "files":
        assert (done.returncode, done.stdout) == (1, "")
    elif offered is not None:
        assert (done.returncode, {line.partition("\t")[0] for line in done.stdout.splitlines()}) == (0, offered)


def test_the_script_is_that_of_the_shell() -> None:
    for shell, script in SCRIPTS.items():
        assert cli("completion", shell).stdout == script
    assert cli("completion", "tcsh").returncode == 2
