"""How long a peer may take to end a request, of the time in which it is read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls `expire` once a peer has been read for `read_s`, or not been read for `unread_s`, each in all. That it is
    not read is this end's decision, and may keep what it has sent in time from being seen; without the second limit a
    peer that does not read answers could keep its requests for as long as it likes."""

    def __init__(self, expire: Callable[[], None], *, read_s: float, unread_s: float, is_read: bool) -> None:
        """Begin. is_read: whether the peer is read at this moment."""
        self._expire = expire
        self._left_s = {True: read_s, False: unread_s}
        self._is_read = is_read
        self._loop = asyncio.get_running_loop()
        self._timer = self._begun()

    def turn(self, *, is_read: bool) -> None:
        """Go on: the peer is read from now on, or no longer."""
        self._timer.cancel()
        self._left_s[self._is_read] = self._timer.when() - self._loop.time()
        self._is_read = is_read
        self._timer = self._begun()

    def cancel(self) -> None:
        """End without a call."""
        self._timer.cancel()

    def _begun(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._left_s[self._is_read], self._expire)
