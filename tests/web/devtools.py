"""Chromium, driven through its DevTools protocol over a pair of pipes (--remote-debugging-pipe): messages are JSON and
end with a NUL. No port is opened, and no library is needed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.until import until

ANSWER_S = 60
LARGEST_MESSAGE = 64 << 20
OPTIONS = (
    "--headless",
    "--no-sandbox",  # it shows nothing but our own page, and containers lack what the sandbox is made of
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
BUSY = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
"""Key codes of keys that are not characters."""


class Browser:
    """A running browser."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.WriteTransport) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.events: list[dict[str, Any]] = []
        self._number = 0

    async def call(self, method: str, session: str = "", **parameters: Any) -> Any:
        """The result of one command."""
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        self._writer.write(json.dumps(message).encode() + b"\0")
        return await asyncio.wait_for(answer, ANSWER_S)

    async def read(self) -> None:
        """Take what it says, until it ends."""
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            answer = self._waiting.pop(message.get("id"), None)
            if answer is None:
                self.events.append(message)
            elif "error" in message:
                answer.set_exception(AssertionError(message["error"]))
            else:
                answer.set_result(message["result"])

    async def page(self) -> Page:
        """A new, empty page."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            await page.call(f"{domain}.enable")
        return page


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **parameters: Any) -> Any:
        return await self._browser.call(method, self._session, **parameters)

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)

    async def run(self, script: str) -> Any:
        """The value of an expression."""
        done = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, script: str) -> Any:
        """The value of an expression, once it is true."""

        async def look() -> Any:
            with contextlib.suppress(AssertionError):  # as while another page is loaded
                return await self.run(script)
            return None

        return await until(look, otherwise=script)

    async def press(self, key: str) -> None:
        """Press and release a key."""
        code = {"windowsVirtualKeyCode": KEYS[key]} if key in KEYS else {"text": key}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, **code, **more)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def prefer(self, scheme: str) -> None:
        """Make it prefer dark or light."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def busy_ms(self) -> float:
        """How long the page's thread has computed until now: its own time, however busy the machine is. Call once
        before what is measured."""
        await self.call("Performance.enable", timeDomain="threadTicks")
        metrics = (await self.call("Performance.getMetrics"))["metrics"]
        return sum(float(one["value"]) for one in metrics if one["name"] in BUSY) * 1000

    def complaints(self) -> list[str]:
        """What the browser has logged of the page: errors of scripts, and what a policy forbade."""
        mine = [one for one in self._browser.events if one.get("sessionId") == self._session]
        logged = [one["params"]["entry"] for one in mine if one["method"] == "Log.entryAdded"]
        thrown = [one["params"]["exceptionDetails"] for one in mine if one["method"] == "Runtime.exceptionThrown"]
        return [one["text"] for one in logged if one["level"] == "error"] + [str(one) for one in thrown]


@contextlib.asynccontextmanager
async def browsing(command: Sequence[str], environment: Mapping[str, str]) -> AsyncIterator[Browser]:
    """A browser with an empty profile; afterwards it is ended."""
    theirs_in, ours_out = _pipe()
    ours_in, theirs_out = _pipe()
    profile = tempfile.mkdtemp(prefix="na-browser-")
    words = [*command, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    said = Path(profile) / "stderr"
    with said.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _START, str(theirs_in), str(theirs_out), *words),
            pass_fds=(theirs_in, theirs_out),
            env={**os.environ, **environment, "HOME": profile},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
        )
    os.close(theirs_in)
    os.close(theirs_out)
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=LARGEST_MESSAGE)
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb"))
    writing, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(ours_out, "wb"))
    browser = Browser(reader, writing)
    listening = asyncio.create_task(browser.read())
    try:
        yield browser
    except BaseException:
        print(f"the browser ({process.returncode or 'running'}) said:", said.read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.wait([listening])
        listening.exception()
        reading.close()
        writing.close()
        shutil.rmtree(profile, ignore_errors=True)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have numbers that leave room for 3 and 4."""
    ends = os.pipe()
    high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in ends]
    for one in ends:
        os.close(one)
    return high[0], high[1]
