"""Waiting for entries of a folder to appear or disappear, even if the folder does not exist yet."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Self

import structlog
from asyncinotify import Inotify, Mask

_ENTRIES = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO
_FOLDER_GONE = Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.UNMOUNT | Mask.IGNORED
log = structlog.get_logger()


class FolderWatch:
    """Notifies when entries of a folder appear or disappear, or the folder itself does.

    Uses inotify on the folder, or on its nearest existing parent. If inotify is unavailable, only the
    poll remains, and this is logged.
    """

    def __init__(self, folder: Path, *, poll_s: float) -> None:
        self._folder = folder
        self._poll_s = poll_s
        self._inotify: Inotify | None = None
        self._armed: tuple[Path, int] | None = None

    def __enter__(self) -> Self:
        self._arm()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    async def wait(self) -> None:
        """Return when something may have changed since the last return, at the latest after poll_s seconds."""
        if self._arm():
            return
        if self._inotify is None:
            await asyncio.sleep(self._poll_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._poll_s):
                event = await self._inotify.get()
                self._forget_if_gone(event.mask)
                self._drain(self._inotify)

    def _arm(self) -> bool:
        """Watch the folder, or its nearest existing parent. Return whether that differs
        from what was watched before."""
        target = _nearest(self._folder)
        if target == self._armed:
            return False
        self._close()
        self._armed = target
        try:
            self._inotify = Inotify(sync_timeout=0)
            self._inotify.add_watch(target[0], _ENTRIES | Mask.DELETE_SELF | Mask.MOVE_SELF)
        except OSError as error:
            self._close_inotify()
            log.warning("folder-not-watched", folder=str(target[0]), error=error.strerror, poll_s=self._poll_s)
        return True

    def _drain(self, inotify: Inotify) -> None:
        while (event := inotify.sync_get()) is not None:
            self._forget_if_gone(event.mask)

    def _forget_if_gone(self, mask: Mask) -> None:
        if mask & _FOLDER_GONE:
            self._armed = None

    def _close(self) -> None:
        self._close_inotify()
        self._armed = None

    def _close_inotify(self) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None


def _nearest(folder: Path) -> tuple[Path, int]:
    """Return the folder, or its nearest existing parent, with its inode."""
    for one in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return one, (one / ".").stat().st_ino
    raise AssertionError("the root folder always exists")
