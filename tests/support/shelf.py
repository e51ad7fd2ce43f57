"""Shelf: a small device-plugin resource for tests of the wire adapters, with handles to make it misbehave."""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent.aio.revision import Revision
from nodeagent.core.deviceplugin.allocate import check_asked
from nodeagent.core.model.device import Advertised, ContainerEdits

CPU, GPU = "nodeagent.dev/cpu", "nodeagent.dev/gpu"


class Shelf:
    """`count` devices on two NUMA nodes in turn; gives what is asked, or raises what `fault` says."""

    def __init__(
        self, name: str = CPU, count: int = 4, *, pre_start_required: bool = False, ids: Sequence[str] = ()
    ) -> None:
        """ids: in place of numbers."""
        self.name = name
        self.pre_start_required = pre_start_required
        self.unhealthy: set[str] = set()
        self.preference: list[str] | Exception | None = None
        self.fault: Exception | None = None
        self.edits: list[ContainerEdits] | None = None
        self.prefers: list[tuple[list[str], list[str], int]] = []
        self.allocations: list[list[list[str]]] = []
        self.ops: list[str] = []
        self.started: list[list[str]] = []
        self.news: list[bool] = []
        self.revision = Revision()
        self._count = count
        self._ids = tuple(ids)

    def show(self, count: int) -> None:
        """Change the number of devices."""
        self._count = count
        self.revision.bump()

    def advertised(self) -> tuple[Advertised, ...]:
        ids = self._ids or [f"{number:03}" for number in range(self._count)]
        return tuple(
            Advertised(id=one, healthy=one not in self.unhealthy, numa_nodes=(number % 2,))
            for number, one in enumerate(ids)
        )

    def listed(self, *, news: bool) -> None:
        self.news.append(news)

    async def changed(self, seen: int) -> int:
        return await self.revision.changed(seen)

    def prefer(self, available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
        self.prefers.append(([*available], [*must_include], size))
        if isinstance(self.preference, Exception):
            raise self.preference
        if self.preference is not None:
            return self.preference
        return [*must_include, *sorted({*available} - {*must_include})][:size]

    async def allocate(self, containers: Sequence[Sequence[str]], op: str) -> list[ContainerEdits]:
        if self.fault is not None:
            raise self.fault
        check_asked(self.name, containers)
        self.allocations.append([[*ids] for ids in containers])
        self.ops.append(op)
        if self.edits is not None:
            return self.edits
        return [ContainerEdits(env={"IDS": ",".join(sorted(ids))}) for ids in containers]

    async def pre_start(self, ids: Sequence[str]) -> None:
        if self.fault is not None:
            raise self.fault
        self.started.append([*ids])
