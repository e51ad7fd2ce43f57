"""A manager that is imported and built when something first needs it: a node that does not use it carries none of it.

It is needed once the configuration asks for it, or an agent has left something behind that it has to undo. Which of the
two is asked when a configuration is applied, when this agent takes the lead, and after each change of the ledger, since
another agent on the node may serve claims too. From then on it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.managers.manager import Manager

M = TypeVar("M", bound=Manager)


class OnDemand(Manager, Generic[M]):
    """Stands for one manager. That one overrides neither `serve` nor `withdraw`, and reads the configuration when it
    acts."""

    def __init__(self, name: str, build: Callable[[], M], needed: Callable[[], bool], ledger: Revision) -> None:
        """`build` imports the manager's modules. `needed` looks at a few files at most. `ledger` rises with each change
        of the ledger."""
        self.name = name
        self.needed = needed
        self._build = build
        self._news = Revision(ledger)
        """Increases with the ledger's, and when the manager is built."""
        self._built: M | None = None

    @property
    def loaded(self) -> M | None:
        """The manager, or None if nothing has needed it yet."""
        return self._built

    def load(self) -> M:
        """Return the manager."""
        if self._built is None:
            self._built = self._build()
            self._news.bump()
        return self._built

    def if_needed(self) -> M | None:
        """Return the manager, or None if nothing needs it at this moment either."""
        return self.load() if self._built is not None or self.needed() else None

    async def apply(self, config: Config) -> None:
        if (one := self.if_needed()) is not None:
            await one.apply(config)

    async def lead(self) -> None:
        seen = self._news.value
        while self.if_needed() is None:
            seen = await self._news.changed(seen)
        await self.load().lead()

    def not_ready(self) -> list[str]:
        return [] if self._built is None else self._built.not_ready()

    def notes(self) -> list[str]:
        return [] if self._built is None else self._built.notes()

    def document(self) -> dict[str, Any]:
        return {} if self._built is None else self._built.document()

    async def close(self) -> None:
        if self._built is not None:
            await self._built.close()
