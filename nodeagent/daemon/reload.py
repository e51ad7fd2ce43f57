"""Detects that the configuration has to be read again: its file has changed, or SIGHUP arrived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.supervise import race

CONFIG_POLL_S = 5.0
"""Fallback for the watch of the configuration's folder."""


async def rewrites(path: Path, asked: asyncio.Event) -> AsyncGenerator[str, None]:
    """Yield why a file has to be read again: it changed, or a reload was requested. Only the poll finds a file
    that is rewritten in place."""
    seen = _content(path)
    with FolderWatch(path.parent, poll_s=CONFIG_POLL_S) as folder:
        while True:
            await race(folder.wait(), asked.wait())
            now, told = _content(path), asked.is_set()
            asked.clear()
            if told or (now != seen and now is not None):
                yield "SIGHUP" if told else "file changed"
            seen = now


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
