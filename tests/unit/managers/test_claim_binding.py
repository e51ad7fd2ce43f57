"""What happens to claims that were granted before their pods were bound, and whose pods never were."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nodeagent.errors import StateError
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers.dra.claim_binding import ClaimBinder
from nodeagent.managers.dra.claim_files import claims_held
from nodeagent.managers.dra.garbage_collector import ClaimGarbageCollector, StatusWriter
from tests.doubles.api_server import CLAIMS, FakeApiServer
from tests.support.claim_node import Room, claim_room
from tests.support.dra_node import DRIVER, NODE, consumed

WAIT_S = 20.0
CONDITIONS = {"bindingConditions": ["Ready"], "bindingFailureConditions": ["nodeagent.dev/Refused"]}


@dataclass
class Binding:
    """A binder at work, and the collector that it hints to."""

    room: Room
    server: FakeApiServer
    binder: ClaimBinder
    collector: ClaimGarbageCollector
    hinted: asyncio.Event = field(default_factory=asyncio.Event)
    now_s: float = 0.0

    def allocated(self) -> list[dict[str, Any]]:
        return [{**consumed("cpu", "numa0", cpus="1"), **CONDITIONS}]

    async def until_ready(self, name: str) -> None:
        def ready() -> bool:
            found = self.server.find(CLAIMS, name, "default") or {}
            return any(one["conditions"][0]["status"] == "True" for one in found.get("status", {}).get("devices", ()))

        await self.server.until(ready)


@contextlib.asynccontextmanager
async def binding(folder: Path) -> AsyncIterator[Binding]:
    async with claim_room(folder) as room, FakeApiServer() as server, asyncio.timeout(WAIT_S):
        api = LazyApi(str(server.kubeconfig(folder)))
        room.claims._fetch = api.claim  # the room's own server is a dict

        async def unused() -> frozenset[tuple[str, str]]:
            return frozenset()

        collector = ClaimGarbageCollector(room.agent, api.claim, unused, DRIVER, clock=lambda: made.now_s)
        answer = StatusWriter(api.tell, DRIVER, lambda: room.agent.inventory).answer

        def gone() -> None:
            collector.hint()
            made.hinted.set()

        binder = ClaimBinder(api, room.agent, room.claims, answer, DRIVER, NODE, changed=lambda: None, gone=gone)
        made = Binding(room, server, binder, collector)
        tasks = [asyncio.create_task(one) for one in (binder.follow(), collector.follow())]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await api.close()


@pytest.mark.parametrize("how", ["deleted", "deallocated", "allocated on another node"])
async def test_a_claim_whose_pod_is_never_bound_is_released(how: str, folder: Path) -> None:
    """Kubelet never learns of it, so it cannot unprepare it. Another claim keeps what it has."""
    async with binding(folder) as at:
        for name in ("c", "other"):
            at.server.add_claim(name, results=at.allocated())
            await at.until_ready(name)
        if how == "deleted":
            at.server.delete(CLAIMS, "c", "default")
        elif how == "deallocated":
            at.server.change(CLAIMS, "c", "default", status={})
        else:
            moved = [{**at.allocated()[0], "pool": "node-b/cpu"}]
            at.server.change(CLAIMS, "c", "default", status={"allocation": {"devices": {"results": moved}}})
        await at.hinted.wait()
        for _ in range(2):
            at.now_s += 60.0
            await at.collector.look()
        held = {grants[0].holder.claim for grants in claims_held(at.room.agent.ledger).values()}
        assert held == {"other"}


async def test_a_claim_that_is_decided_is_not_prepared_again(folder: Path) -> None:
    """Neither after its own status has come back nor when the claims are listed again."""
    async with binding(folder) as at:
        at.server.add_claim("c", results=at.allocated())
        await at.until_ready("c")
        applied = at.server.count("apply", CLAIMS)
        lists = at.server.count("list", CLAIMS)
        await at.server.until(lambda: at.server.watching == 1)
        at.server.expire_watches()
        await at.server.until(lambda: at.server.count("list", CLAIMS) > lists)
        at.server.add_claim("second", results=at.allocated())
        await at.until_ready("second")
        assert at.server.count("apply", CLAIMS) == applied + 1


async def test_a_ledger_that_cannot_be_written_refuses_the_claim_and_the_next_one_is_decided(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler tries another node; claims are followed all the same."""
    async with binding(folder) as at:
        prepare, full = at.room.claims.prepare, [True]

        async def on_a_full_disk(claims: Any, op: str) -> Any:
            if full.pop() if full else False:
                raise StateError("cannot save /state: No space left on device")
            return await prepare(claims, op)

        monkeypatch.setattr(at.room.claims, "prepare", on_a_full_disk)
        at.server.add_claim("c", results=at.allocated())
        await at.server.until(lambda: "devices" in (at.server.find(CLAIMS, "c", "default") or {}).get("status", {}))
        (found,) = (at.server.find(CLAIMS, "c", "default") or {})["status"]["devices"]
        refused = {one["type"]: (one["status"], one["message"]) for one in found["conditions"]}["nodeagent.dev/Refused"]
        assert refused == ("True", "cannot prepare claim default/c: cannot save /state: No space left on device")
        at.server.add_claim("next", results=at.allocated())
        await at.until_ready("next")
        assert at.server.count("list", CLAIMS) == 1 and at.binder.able


async def test_a_claim_that_is_deleted_meanwhile_delays_no_other(folder: Path) -> None:
    """Its status cannot be written any longer."""
    async with binding(folder) as at:
        await at.server.until(lambda: at.server.watching == 1)
        at.server.fail(404, verb="apply", resource=CLAIMS)
        at.server.add_claim("gone", results=at.allocated())
        at.server.add_claim("next", results=at.allocated())
        await at.until_ready("next")
        assert at.server.count("list", CLAIMS) == 1 and at.binder.able
