"""Node labels and the NodeResourceTopology, in an API server: kept up to date, removed, and on its bad days."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.model.device import ContainerEdits
from nodeagent.kube.apiserver.client import TOPOLOGIES as TOPOLOGY_KIND
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers import node_follower
from nodeagent.managers.publish import manager
from nodeagent.managers.publish.journal import FILE, PublishJournal
from nodeagent.managers.publish.manager import PublishManager
from nodeagent.managers.publish.publications import NodeLabels, ResourceTopology
from nodeagent.state.agent import Agent, AgentSettings
from nodeagent.state.store import Store
from tests.doubles.api_server import NODES, TOPOLOGIES, FakeApiServer
from tests.support.until import until
from tests.unit.state.test_agent import machine

NODE, DRIVER = "worker-1", "nodeagent.dev"
CPU = CpuResource(name="nodeagent.dev/cpu")
LABEL = "nodeagent.dev/cpu.count"
WAIT_S = 30.0
QUICK = {"pace_s": 0.01, "lasting_s": 0.05}


class Room:
    """One agent after another on the same state folder, with an API server."""

    def __init__(self, folder: Path, api: FakeApiServer, client: LazyApi, agent: Agent) -> None:
        self.folder, self.api, self.client, self.agent = folder, api, client, agent
        self.manager: PublishManager

    @contextlib.asynccontextmanager
    async def running(self, **publish: bool) -> AsyncIterator[None]:
        def shown() -> dict[str, Any]:
            return {CPU.name: self.agent.advertised(CPU)}

        labels = NodeLabels(self.client, self.agent, NODE, DRIVER, lambda: DRIVER)
        policy = {"topologyManagerPolicy": "single-numa-node"}
        topology = ResourceTopology(self.client, self.agent, NODE, DRIVER, shown, lambda: policy)
        self.manager = PublishManager(
            [labels, topology],
            self.agent.revisions.ledger,
            self.folder,
            self.client,
            NODE,
            configured=True,
            **QUICK,
        )
        await self.configure(**publish)
        leading = asyncio.create_task(self.manager.lead())
        try:
            yield
        finally:
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)

    async def configure(self, **publish: bool) -> None:
        await self.manager.apply(msgspec.convert({"publish": publish}, Config))

    async def hold(self, *ids: str) -> None:
        await self.agent.allocate(CPU, [ids], lambda inventory, grant: ContainerEdits(), "op")

    def node(self) -> dict[str, Any]:
        return self.api.find(NODES, NODE) or {"metadata": {}}

    def labels(self) -> dict[str, str]:
        return self.node()["metadata"].get("labels") or {}

    def zones(self) -> list[dict[str, Any]]:
        return (self.api.find(TOPOLOGIES, NODE) or {}).get("zones", [])

    def free(self) -> list[str]:
        """What is available of the CPUs, by zone."""
        return [one["available"] for zone in self.zones() for one in zone["resources"] if one["name"] == CPU.name]

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.api.until(holds)


@contextlib.asynccontextmanager
async def machine_with_api(tmp_path: Path) -> AsyncIterator[Room]:
    async def listing() -> tuple[()]:
        return ()

    agent = Agent(Store(tmp_path), machine(), AgentSettings(), listing)
    async with FakeApiServer() as api:
        api.add(NODES, {"metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}}})
        client = LazyApi(api.kubeconfig(tmp_path))
        try:
            yield Room(tmp_path, api, client, agent)
        finally:
            await client.close()
            await agent.close()


# ---------------------------------------------------------------- what was published


def test_what_several_threads_note_at_once_is_all_there(tmp_path: Path) -> None:
    """Labels and topology are first written at the same moment."""
    for _ in range(20):
        journal, keys = PublishJournal(tmp_path / FILE), [f"key-{number}" for number in range(8)]
        with ThreadPoolExecutor(len(keys)) as pool:
            list(pool.map(functools.partial(journal.note, published=True), keys))
        assert journal.read() == {*keys}
        with ThreadPoolExecutor(len(keys)) as pool:
            list(pool.map(functools.partial(journal.note, published=False), keys))
        assert journal.read() == frozenset()


# ---------------------------------------------------------------- labels


async def test_the_node_has_the_labels_while_they_are_switched_on_and_no_longer(tmp_path: Path) -> None:
    """Labels of others stay."""
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True):
        await room.until(lambda: LABEL in room.labels())
        assert room.labels()["kubernetes.io/hostname"] == NODE
        assert room.manager.notes() == []
        await room.configure()
        await room.until(lambda: room.labels() == {"kubernetes.io/hostname": NODE})
        await until(lambda: not (room.folder / FILE).exists())


async def test_labels_that_were_switched_off_while_no_agent_ran_are_removed(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room:
        async with room.running(nodeLabels=True):
            await room.until(lambda: LABEL in room.labels())
        async with room.running():
            await room.until(lambda: LABEL not in room.labels())


async def test_a_node_that_is_gone_is_not_re_created(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room:
        room.api.delete(NODES, NODE)
        async with room.running(nodeLabels=True):
            await until(lambda: bool(room.manager.notes()))
            (note,) = room.manager.notes()
            assert (
                note == f"publish.nodeLabels is not in force: cannot find nodes {NODE}: kubelet has not registered it"
            )
            assert room.api.find(NODES, NODE) is None


async def test_a_node_that_was_deleted_and_made_again_soon_has_labels_and_topology(tmp_path: Path) -> None:
    """Once each, for the new Node; the old one's topology is collected with it."""
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True, nodeResourceTopology=True):
        await room.until(lambda: LABEL in room.labels() and bool(room.zones()) and room.api.watching == 1)
        for _ in range(2):
            room.api.delete(NODES, NODE)
            room.api.delete(TOPOLOGIES, NODE)
            uid = room.api.add_node(NODE)["metadata"]["uid"]
            await room.until(lambda: LABEL in room.labels() and bool(room.zones()))
            assert room.api.find(TOPOLOGIES, NODE)["metadata"]["ownerReferences"][0]["uid"] == uid  # type: ignore[index]
        assert (room.api.count("apply", NODES), room.api.count("apply", TOPOLOGIES)) == (3, 3)


async def test_a_node_that_was_made_again_while_the_server_was_away_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_follower, "AWAY_S", 0.05)
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True):
        await room.until(lambda: LABEL in room.labels() and room.api.watching == 1)
        async with room.api.away():
            room.api.delete(NODES, NODE)
            room.api.add_node(NODE)
        await room.until(lambda: LABEL in room.labels())


async def test_a_node_that_kubelet_registers_late_is_labelled_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the pause that failed attempts have earned by then."""
    monkeypatch.setattr(manager, "AGAIN_S", 3600.0)
    monkeypatch.setattr(manager, "SLOWEST_S", 3600.0)
    monkeypatch.setattr(node_follower, "AGAIN_S", 0.05)
    async with machine_with_api(tmp_path) as room:
        room.api.delete(NODES, NODE)
        async with room.running(nodeLabels=True):
            await until(lambda: bool(room.manager.notes()))
            room.api.add_node(NODE)
            await room.until(lambda: LABEL in room.labels())
            await until(lambda: room.manager.notes() == [])


async def test_changes_of_the_same_node_write_nothing(tmp_path: Path) -> None:
    """Kubelet writes the Node's status again and again."""
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True):
        await room.until(lambda: LABEL in room.labels() and room.api.watching == 1)
        writes = room.api.writes
        for beat in range(5):
            room.api.change(NODES, NODE, status={"conditions": [{"lastHeartbeatTime": str(beat)}]})
        seen: list[str] = []
        monitored = room.manager._node._take
        room.manager._node._take = lambda node: (seen.append(node["status"]["conditions"][0]), monitored(node))  # type: ignore[assignment, func-returns-value]
        room.api.change(NODES, NODE, status={"conditions": ["the last"]})
        await until(lambda: "the last" in seen)
        await asyncio.sleep(5 * QUICK["pace_s"])
        assert room.api.writes == writes


async def test_the_node_is_watched_only_while_something_is_published(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True):
        await room.until(lambda: room.api.watching == 1)
        await room.configure()
        await until(lambda: room.api.watching == 0)


# ---------------------------------------------------------------- NodeResourceTopology


async def test_the_topology_says_what_is_left_after_each_grant(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room, room.running(nodeResourceTopology=True):
        await room.until(lambda: bool(room.zones()))
        found = room.api.find(TOPOLOGIES, NODE)
        assert found is not None
        assert found["attributes"] == [{"name": "topologyManagerPolicy", "value": "single-numa-node"}]
        assert found["metadata"]["ownerReferences"][0]["uid"] == room.node()["metadata"]["uid"]
        before = sum(map(int, room.free()))
        await room.hold(*["cpu4", "cpu5"])
        await room.until(lambda: sum(map(int, room.free())) == before - 2)
        await room.configure()
        await room.until(lambda: not room.zones())


async def test_nothing_is_written_while_nothing_changes(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True, nodeResourceTopology=True):
        await room.until(lambda: bool(room.zones()) and LABEL in room.labels())
        writes = room.api.writes
        for _ in range(20):
            room.agent.revisions.ledger.bump()
            await asyncio.sleep(0)
        await room.hold(*["cpu4"])
        await room.until(lambda: room.api.writes > writes)
        assert room.api.count("apply", NODES) == 1
        assert room.api.count("apply", TOPOLOGIES) == 2


async def test_nothing_is_asked_or_written_while_all_is_off(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room, room.running():
        room.agent.revisions.ledger.bump()
        await until(lambda: all(one._removed for one in room.manager._kept))
        assert room.api.requests == []
        assert room.manager.notes() == []


@pytest.mark.parametrize("status", [403, 500])
async def test_a_server_that_refuses_is_asked_again_and_said(tmp_path: Path, status: int) -> None:
    async with machine_with_api(tmp_path) as room:
        room.api.fail(status, verb="apply", resource=TOPOLOGIES)
        async with room.running(nodeResourceTopology=True):
            await until(lambda: bool(room.manager.notes()))
            (note,) = room.manager.notes()
            assert note.startswith(
                f"publish.nodeResourceTopology is not in force: cannot apply noderesourcetopologies {NODE}"
            )
            await room.configure(nodeLabels=True, nodeResourceTopology=True)  # a change of it is tried at once
            await room.until(lambda: bool(room.zones()))
            await until(lambda: room.manager.notes() == [])


async def test_a_server_without_the_kind_is_asked_with_patience_until_it_has_it(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room:
        room.api.absent.add(TOPOLOGIES)
        async with room.running(nodeLabels=True, nodeResourceTopology=True):
            await room.until(lambda: LABEL in room.labels() and room.api.count("apply", TOPOLOGIES) > 1)
            assert "404" in room.manager.notes()[0]
            room.api.absent.clear()
            await room.until(lambda: bool(room.zones()))


async def test_the_object_of_another_publisher_is_left_alone(tmp_path: Path) -> None:
    """Neither taken over nor removed."""
    async with machine_with_api(tmp_path) as room:
        theirs = {"metadata": {}, "zones": [{"name": "node-0", "type": "Node"}]}
        await room.client.apply(TOPOLOGY_KIND, NODE, theirs, manager="nfd", force=False)
        async with room.running(nodeResourceTopology=True):
            await until(lambda: bool(room.manager.notes()))
            assert 'conflict with "nfd"' in room.manager.notes()[0]
            await room.configure()
            await until(lambda: not (room.folder / FILE).exists())
        assert room.zones() == [{"name": "node-0", "type": "Node"}]


async def test_what_cannot_be_removed_is_said_and_tried_again(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room, room.running(nodeLabels=True):
        await room.until(lambda: LABEL in room.labels())
        room.api.fail(403, verb="apply", resource=NODES)
        await room.configure()
        await until(lambda: bool(room.manager.notes()))
        assert room.manager.notes()[0].startswith("publish.nodeLabels was switched off and is not removed: ")
        await room.until(lambda: LABEL not in room.labels())


async def test_without_an_api_server_it_is_said(tmp_path: Path) -> None:
    async with machine_with_api(tmp_path) as room:
        manager = PublishManager([], room.agent.revisions.ledger, tmp_path, room.client, NODE, configured=False)
        assert manager.notes() == []
        await manager.apply(msgspec.convert({"publish": {"nodeLabels": True}}, Config))
        await asyncio.wait_for(manager.lead(), WAIT_S)
        assert manager.notes() == ["nothing is published: there is no API server, dra.kubeconfig is empty"]
