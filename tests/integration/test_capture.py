"""A running agent, captured and replayed: every command that shows something gives the answers of the agent."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from nodeagent.state.audit import CONFIGURATION, AuditEntry, newest
from nodeagent.state.store import FILE
from tests.integration.test_status import RESOURCES, standing
from tests.support.running import Running
from tests.support.until import until

SHOWN = ("status", "grants", "devices", "health", "metrics", "history")


MOVING = re.compile(r"up [\d.]+ s|\"uptime_s\": [\d.]+|\"(?:listed|looked)_at\": [\d.]+| +\d+s\b")
"""What the time alone changes: ages, and when the agent last looked."""


async def nodeagent(*words: str) -> tuple[int | None, str]:
    """Exit code and output, without what the time alone changes."""
    pipe = asyncio.subprocess.PIPE
    done = await asyncio.create_subprocess_exec(sys.executable, "-m", "nodeagent", *words, stdout=pipe, stderr=pipe)
    out, err = await done.communicate()
    text = MOVING.sub("up", (out + err).decode())
    return done.returncode, text


def where(agent: Running, verb: str) -> list[str]:
    return ["--state-dir", str(agent.state)] if verb == "history" else ["--socket", str(agent.socket)]


async def test_a_replay_gives_the_answers_of_the_agent(folder: Path, tmp_path: Path) -> None:
    """As tables and as JSON, also after the agent has gone on; of the metrics, what is about the node."""
    file = str(folder / "c.tar.zst")
    async with standing(folder, tmp_path) as (agent, kubelet):
        words = ["--config", str(agent.config_file), "--socket", str(agent.socket), "--root", str(tmp_path / "root")]
        await agent.until("/v1/status", lambda status: status["pinning"]["intruders"]["looked_at"])
        code, said = await nodeagent("capture", *words, "--kubelet-dir", str(folder / "kubelet"), "-o", file)
        assert code == 0 and "pages" not in said and "ledger" not in said, said
        live = {verb: await nodeagent(verb, *where(agent, verb)) for verb in SHOWN}
        tables = {verb: await nodeagent(verb, *where(agent, verb), "-o", "json") for verb in SHOWN if verb != "metrics"}
        await kubelet.delete_pod("shop", "till")
        await agent.until("/v1/grants", lambda grants: not grants)
    for verb in SHOWN:
        replayed = await nodeagent("replay", file, verb)
        if verb == "metrics":
            assert replayed[0] == 0 and figures(replayed[1]) == figures(live[verb][1])
        else:
            assert replayed == live[verb], verb
            assert await nodeagent("replay", file, verb, "-o", "json") == tables[verb], verb
    assert [one["pod"] for one in json.loads((await nodeagent("replay", file, "grants", "-o", "json"))[1])] == [
        "till"
    ] * 2


def figures(page: str) -> list[str]:
    """What the metrics say of the node rather than of the process."""
    return [line for line in page.splitlines() if re.match(r"nodeagent_(numa_cpus|devices|grants)\b", line)]


@pytest.mark.parametrize("anonymize", [[], ["--anonymize"]])
async def test_a_capture_changes_nothing_of_the_node(folder: Path, tmp_path: Path, anonymize: list[str]) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        before = stamps(tmp_path / "root", folder / "kubelet")
        words = ["--config", str(agent.config_file), "--socket", str(agent.socket), "--root", str(tmp_path / "root")]
        await nodeagent(
            "capture", *words, "--kubelet-dir", str(folder / "kubelet"), "-o", str(folder / "c"), *anonymize
        )
        assert stamps(tmp_path / "root", folder / "kubelet") == before
        assert (await agent.ask("/readyz"))[0] == 200


def stamps(*folders: Path) -> dict[str, float]:
    return {str(one): one.lstat().st_mtime for folder in folders for one in folder.rglob("*")}


async def test_a_changed_and_a_refused_configuration_are_in_the_history(folder: Path, tmp_path: Path) -> None:
    """A moment later: nothing waits for it."""
    async with standing(folder, tmp_path) as (agent, _):
        agent.configure(auditDays=7, resources=RESOURCES)
        await agent.said("configuration-reloaded")
        agent.write_config("auditDays: never")
        await agent.said("configuration-refused")

        async def recorded() -> bool:
            return len(configured(agent)) == 2

        await until(recorded)
        applied, refused = configured(agent)
    assert "auditDays: 30 -> 7" in applied.what
    assert refused.what == "refused" and "auditDays" in refused.why


def configured(agent: Running) -> list[AuditEntry]:
    return [one for one in newest(agent.state / FILE, -1) if one.action == CONFIGURATION]
