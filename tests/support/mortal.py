"""Agents that can be killed often. A nursery process imports the whole agent once; each life is a fork of it that runs
`nodeagent run` as the command line would: a process of its own with its own sockets, threads, locks and ledger file.

Run as a program, this is the nursery: a line of JSON, the words of a command and more variables for its environment,
gives one life and answers its pid.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.paths import CHECKOUT


class Life:
    """One running agent."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)
        self._dead = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._handle, self._dead.set)

    def kill_after(self, delay_s: float) -> None:
        """kill -9 a moment later, from a thread: the loop's own clock counts whole milliseconds."""

        def strike() -> None:
            time.sleep(delay_s)
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

        threading.Thread(target=strike, daemon=True).start()

    async def death(self) -> None:
        """Return once the process is gone, and with it every lock and socket that it had."""
        await self._dead.wait()
        asyncio.get_running_loop().remove_reader(self._handle)
        os.close(self._handle)


class Nursery:
    """Gives life after life."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def life(self, *words: str, **env: str) -> Life:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps((words, env)).encode() + b"\n")
        return Life(int(await self._process.stdout.readline()))


@asynccontextmanager
async def nursery(log: Path) -> AsyncIterator[Nursery]:
    """The nursery; what its agents log goes to a file."""
    with log.open("ab") as err:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.mortal", stdin=pipe, stdout=pipe, stderr=err, cwd=CHECKOUT
        )
    try:
        yield Nursery(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def ask(socket: Path, target: str, method: str = "GET") -> Any:
    """What the status socket answers; OSError if no agent does."""
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        writer.write(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if not body:
        raise ConnectionResetError("no whole answer")
    return json.loads(body)


def _live(cli: Any, words: Sequence[str], env: Mapping[str, str]) -> None:
    os.environ.update(env)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    os._exit(cli.main(words))


def _main() -> None:
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import nodeagent.cli.node.run
    import nodeagent.daemon.daemon

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        pid = os.fork()
        if not pid:
            _live(nodeagent.cli, *json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    _main()
