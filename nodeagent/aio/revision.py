"""A number that rises with each change and can be waited for."""

from __future__ import annotations

import asyncio
import weakref


class Revision:
    """A number, from 1, that rises with each change and can be waited for."""

    def __init__(self, *sources: Revision) -> None:
        """sources: this number also rises with each of them."""
        self.value = 1
        self._news = asyncio.Event()
        self._followers: weakref.WeakSet[Revision] = weakref.WeakSet()
        for one in sources:
            one._followers.add(self)

    def bump(self) -> None:
        """Report a change."""
        self.value += 1
        news, self._news = self._news, asyncio.Event()
        news.set()
        for one in tuple(self._followers):
            one.bump()

    async def changed(self, seen: int) -> int:
        """Return the number as soon as it differs from `seen`; with 0, at once."""
        while self.value == seen:
            await self._news.wait()
        return self.value
