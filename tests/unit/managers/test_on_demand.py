"""Managers that are loaded once something needs them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from tests.support.until import until


class Counted(Manager):
    """Says what it was asked."""

    def __init__(self, asked: list[str]) -> None:
        asked.append("built")
        self.asked = asked

    async def apply(self, config: Config) -> None:
        self.asked.append("apply")

    async def lead(self) -> None:
        self.asked.append("lead")
        await asyncio.Event().wait()

    def notes(self) -> list[str]:
        return ["a note"]

    def not_ready(self) -> list[str]:
        return ["a reason"]

    def document(self) -> dict[str, object]:
        return {"a": 1}

    async def close(self) -> None:
        self.asked.append("close")


def made(needed: Callable[[], bool]) -> tuple[OnDemand[Counted], list[str], Revision]:
    asked, ledger = list[str](), Revision()
    return OnDemand("counted", lambda: Counted(asked), needed, ledger), asked, ledger


@contextlib.asynccontextmanager
async def leading(one: Manager) -> AsyncIterator[None]:
    task = asyncio.create_task(one.lead())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_nothing_needs_is_never_built() -> None:
    one, asked, ledger = made(lambda: False)
    await one.apply(Config())
    async with leading(one):
        ledger.bump()
        await asyncio.sleep(0.01)
    assert (one.notes(), one.not_ready(), one.document(), one.loaded) == ([], [], {}, None)
    await one.close()
    assert asked == []


async def test_a_configuration_that_needs_it_is_applied_to_it() -> None:
    one, asked, _ = made(lambda: True)
    await one.apply(Config())
    await one.apply(Config())
    assert asked == ["built", "apply", "apply"]
    assert (one.notes(), one.not_ready(), one.document()) == (["a note"], ["a reason"], {"a": 1})
    await one.close()
    assert asked[-1] == "close"


async def test_it_leads_once_a_change_of_the_ledger_shows_that_it_is_needed() -> None:
    """Another agent on the node may have prepared a claim."""
    needed = False
    one, asked, ledger = made(lambda: needed)
    async with leading(one):
        ledger.bump()
        await asyncio.sleep(0.01)
        assert asked == []
        needed = True
        ledger.bump()
        await until(lambda: asked == ["built", "lead"])


async def test_it_leads_once_a_call_has_loaded_it_and_it_stays() -> None:
    one, asked, _ = made(lambda: False)
    async with leading(one):
        assert one.load() is one.load()
        await until(lambda: asked == ["built", "lead"])
    assert one.if_needed() is one.loaded
    async with leading(one):
        await until(lambda: asked == ["built", "lead", "lead"])
