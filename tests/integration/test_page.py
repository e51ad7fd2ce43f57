"""The page of a running agent, and the command that draws the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from tests.integration.test_status import standing


async def test_the_page_and_its_picture_are_there_and_map_draws_the_same(folder: Path, tmp_path: Path) -> None:
    async with standing(folder, tmp_path) as (agent, _):
        assert (await agent.ask("/"))[1].startswith("<!DOCTYPE html>")
        assert "text/html" not in str(await agent.ask("/page.js"))
        _, picture = await agent.ask("/v1/map")
        assert [one["name"] for one in picture["holders"]] == ["shop/till"]
        words = [sys.executable, "-m", "nodeagent", "map", "--socket", str(agent.socket), "-o", "json"]
        drawn = await asyncio.to_thread(subprocess.check_output, words)
        assert json.loads(drawn) == picture
        assert (await agent.ask("/page.js", "DELETE"))[0] == 405


async def test_what_a_request_could_be_placed_on_is_drawn_of_a_running_agent(folder: Path, tmp_path: Path) -> None:
    """Alongside what is held, and nothing is granted by it."""
    async with standing(folder, tmp_path) as (agent, _):
        words = [sys.executable, "-m", "nodeagent", "map", "--socket", str(agent.socket), "--place", "--cpus", "2"]
        drawn = await asyncio.to_thread(subprocess.check_output, words, text=True)
        assert "* would be placed here: CPUs 2-3" in drawn and "A shop/till: CPUs 0-1" in drawn
        done = await asyncio.to_thread(subprocess.run, [*words[:-1], "3"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.startswith("refused: "), done.stderr) == (3, True, "")
        assert len((await agent.ask("/v1/grants"))[1]) == 2


async def test_a_web_page_cannot_change_anything_even_through_a_forwarded_socket(folder: Path, tmp_path: Path) -> None:
    """The browser names the page's origin; the commands of the agent send no such header."""
    async with standing(folder, tmp_path) as (agent, _):
        for header in ("Origin: http://localhost:8080", "Origin: null", "Sec-Fetch-Site: cross-site"):
            reader, writer = await asyncio.open_unix_connection(agent.socket)
            writer.write(f"POST /v1/reload HTTP/1.1\r\nHost: x\r\n{header}\r\nConnection: close\r\n\r\n".encode())
            answer = (await reader.read()).decode()
            writer.close()
            assert answer.startswith("HTTP/1.1 403 ") and "a web page asks for it" in answer
        assert (await agent.ask("/v1/reload", "POST"))[0] == 200
