"""The whole agent as a process of its own, for tests and benchmarks: started, asked, signalled, and what it logs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.paths import CHECKOUT
from tests.support.until import until

CPU, CHAR = "nodeagent.dev/cpu", "nodeagent.dev/serial"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Running:
    """`nodeagent run` in a folder: its configuration, ledger, status socket and log are there."""

    def __init__(
        self,
        folder: Path,
        *,
        root: Path | str = "/",
        kubelet: Path | None = None,
        program: Path | None = None,
        module: str = "nodeagent",
        **config: Any,
    ) -> None:
        """program: where the program is installed that is started, if that is not the checkout. module: what is run."""
        self.folder = folder
        self.config_file = folder / "config.yaml"
        self.socket = folder / "run" / "status.sock"
        self.state = folder / "state"
        self.log: list[dict[str, Any]] = []
        self.stderr = ""
        self.program, self.module = program, module
        self._words = ["run", "--config", str(self.config_file), "--root", str(root)]
        self._words += ["--kubelet-dir", str(kubelet or folder / "kubelet")]
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self.configure(**config)

    def configure(self, **config: Any) -> None:
        """Replace the configuration file, as an editor does."""
        whole = {"stateDir": str(self.state), "runtimeDir": str(self.socket.parent), "reservedCpus": "", **config}
        self.write_config(json.dumps(whole))

    def write_config(self, text: str) -> None:
        draft = self.config_file.with_suffix(".new")
        draft.write_text(text)
        draft.rename(self.config_file)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode if self._process is not None else None

    async def start(self, *, env: Mapping[str, str] | None = None) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            *self._words,
            cwd=self.program or (CHECKOUT if (CHECKOUT / "nodeagent").exists() else None),
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self._reading = asyncio.create_task(self._read())

    async def end(self) -> int:
        """Wait for its end; the exit code."""
        assert self._process is not None and self._reading is not None
        await self._reading
        return await self._process.wait()

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.signal(how)
        return await self.end()

    def signal(self, how: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(how)

    # What it says

    async def said(self, event: str, after: int = 0, **fields: Any) -> dict[str, Any]:
        """The first line of the log, from number `after` on, with this event and these fields; waits for it."""
        while True:
            news = self._news
            for line in self.log[after:]:
                if line.get("event") == event and all(line.get(key) == value for key, value in fields.items()):
                    return line
            assert self._reading is not None and not self._reading.done(), f"ended without saying {event}"
            await news.wait()

    def tracebacks(self) -> bool:
        return "Traceback" in self.stderr

    async def _read(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        async for line in self._process.stderr:
            self.stderr += line.decode()
            with contextlib.suppress(ValueError):
                self.log.append(json.loads(line))
            self._tell()
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    # What it answers

    async def ask(self, page: str, method: str = "GET") -> tuple[int, Any]:
        """One request on the status socket: status and body, decoded where it is JSON."""
        reader, writer = await asyncio.open_unix_connection(self.socket)
        writer.write(f"{method} {page} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        try:
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        text = body.decode()
        return int(head.split()[1]), json.loads(text) if b"application/json" in head else text

    async def until(self, page: str, holds: Callable[[Any], bool]) -> Any:
        """The page, once it is there and as wanted."""

        async def look() -> list[Any]:
            with contextlib.suppress(OSError, IndexError):
                _, found = await self.ask(page)
                return [found] if holds(found) else []
            return []

        (found,) = await until(look, otherwise=lambda: f"{page}: {inspect.getsource(holds).strip()}")
        return found

    async def ready(self) -> Any:
        return await self.until("/v1/status", lambda status: status["ready"])


def block(folder: Path) -> None:
    """Put a file where a folder has to be, however often an agent makes the folder again meanwhile."""
    while not folder.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.write_text("in the way")


def put_back(aside: Path, folder: Path) -> None:
    """Put a folder in the place of that file, or of what an agent made there meanwhile: in one step, as an agent that
    finds nothing there at that moment makes the folder again."""
    exchange(aside, folder)
    aside.unlink() if aside.is_file() else shutil.rmtree(aside)


def exchange(one: Path, other: Path) -> None:
    """Have two files or folders change their names, at no time of which one is missing (renameat2(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), f"cannot exchange {one} and {other}")


@contextlib.asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[Running]:
    """A started agent; afterwards it is ended, and must not have shown a traceback."""
    agent = Running(folder, **options)
    await agent.start()
    try:
        yield agent
    finally:
        if agent.returncode is None:
            await agent.stop(signal.SIGKILL)
        sys.stderr.write(agent.stderr)
    assert not agent.tracebacks(), agent.stderr
