"""The API server of a benchmark as a process of its own, over TLS as on a node: neither its work nor its memory falls
on the kubelet that calls the agent.

    python -m benchmarks.api_process FOLDER

Requests are lines of JSON on its standard input, answers lines on its standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tests.doubles.api_server import CLAIMS, FakeApiServer


class ApiProcess:
    """Claims of the server, as the scheduler leaves them."""

    def __init__(self, child: asyncio.subprocess.Process, kubeconfig: str) -> None:
        self._child = child
        self._kubeconfig = kubeconfig

    def kubeconfig(self, folder: Path) -> str:
        """Return the path of the agent's kubeconfig; it lies in the server's own folder."""
        return self._kubeconfig

    async def add_claims(self, claims: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Add claims by name, each with one allocated device. Return their UIDs."""
        found: list[str] = await self._ask("add", claims)
        return found

    async def delete_claims(self, names: Sequence[str]) -> None:
        await self._ask("delete", names)

    async def _ask(self, verb: str, what: Any) -> Any:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps([verb, what]).encode() + b"\n")
        return json.loads(await self._child.stdout.readline())


@contextlib.asynccontextmanager
async def api_process(folder: Path, node: str) -> AsyncIterator[ApiProcess]:
    """Yield a server that knows one Node. folder: for its certificate and the kubeconfig."""
    words, pipe = [sys.executable, "-m", "benchmarks.api_process", str(folder), node], asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, limit=1 << 20)
    assert child.stdin is not None and child.stdout is not None
    try:
        yield ApiProcess(child, json.loads(await child.stdout.readline()))
    finally:
        child.stdin.close()
        await child.wait()


async def _serve(folder: Path, node: str) -> None:
    async with FakeApiServer(tls=folder) as api:
        api.add_node(node)
        _say(api.kubeconfig(folder))
        while line := await asyncio.to_thread(sys.stdin.readline):
            verb, what = json.loads(line)
            if verb == "add":
                _say([api.add_claim(name, results=[result])["metadata"]["uid"] for name, result in what])
            else:
                for name in what:
                    api.delete(CLAIMS, name, "default")
                _say(None)


def _say(what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2]))
