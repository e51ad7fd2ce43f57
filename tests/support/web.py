"""`nodeagent web` in front of a status socket, as an admin runs it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.interruptible import INTERRUPTIBLE


class Web:
    """A running `nodeagent web`."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        """With its token."""
        self.port = urlsplit(address).port or 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def ask(self, target: str, *headers: str, method: str = "GET") -> tuple[int, str, str]:
        """Status, head and body of an answer. headers: in addition to Host, which they may replace."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        if not any(one.startswith("Host:") for one in headers):
            headers = (f"Host: {self.host}", *headers)
        lines = "".join(f"{one}\r\n" for one in (*headers, "Connection: close"))
        writer.write(f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        try:
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        text = head.decode("latin-1")
        chunked = "transfer-encoding: chunked" in text.lower()
        return int(head.split()[1]), text, (_joined(body) if chunked else body).decode()

    async def enter(self) -> str:
        """Use the token. The header with the cookie that it gives."""
        _, head, _ = await self.ask(self.address.removeprefix(f"http://{self.host}"))
        (cookie,) = (line for line in head.splitlines() if line.lower().startswith("set-cookie:"))
        return f"Cookie: {cookie.partition(':')[2].partition(';')[0].strip()}"


def _joined(chunks: bytes) -> bytes:
    """The content of a chunked body (RFC 9112, 7.1)."""
    size, _, rest = chunks.partition(b"\r\n")
    length = int(size, 16)
    return rest[:length] + _joined(rest[length + 2 :]) if length else b""


@contextlib.asynccontextmanager
async def web_of(socket: Path, *words: str) -> AsyncIterator[Web]:
    """It, ended by Ctrl-C, which is the normal end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", INTERRUPTIBLE, "web", "--no-open", "--socket", str(socket), *words),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield Web(process, (await process.stdout.readline()).decode().strip())
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
