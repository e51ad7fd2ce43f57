"""Pools of NVMe targets that nodes share: one agent of the cluster publishes them, each taints what it cannot reach.
Against a real server's double."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nodeagent.aio.supervise import cancel_all
from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import ALL_FEATURES
from nodeagent.core.fabrics.pool import taint_value
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.host.devices import all_kinds
from nodeagent.kube.apiserver.client import SLICES as RESOURCE_SLICES
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers.fabrics import pools as pools_module
from nodeagent.managers.fabrics.lease import ClusterLease
from nodeagent.managers.fabrics.pools import SharedPoolsManager, lease_namespace
from nodeagent.resources.catalog import dra_of
from tests.doubles.api_server import LEASES, NODES, SLICES, FakeApiServer, Fault
from tests.support.claim_node import Room, claim_room, config_of
from tests.support.dra_node import DRIVER, SERIAL
from tests.support.until import until

QUICK = {"duration_s": 2, "renew_s": 0.1, "look_s": 0.1}
ZONE = {"topology.kubernetes.io/zone": "a"}


def resource(*names: str, selector: dict[str, str] | None = None, traddr: str = "192.0.2.1") -> dict[str, Any]:
    targets = [
        {"name": one, "nqn": f"nqn.2024-01.com.example:{one}", "traddr": traddr, "nodeSelector": selector or {}}
        for one in names
    ]
    return {"name": f"san-{names[0]}", "kind": "nvmeof", "serve": "dra", "targets": targets}


@dataclass
class Member:
    """One node of the cluster: its claims, and what publishes."""

    name: str
    room: Room
    manager: SharedPoolsManager
    api: LazyApi
    tasks: list[asyncio.Task[None]]

    @property
    def leads(self) -> bool:
        return bool(self.manager.document()["leads"])

    async def serve(self, *resources: dict[str, Any]) -> None:
        self.room.serve(*resources)
        self.room.rescan()
        await self.manager.apply(self.room.config)

    async def stop(self) -> None:
        await cancel_all(self.tasks)
        self.tasks.clear()

    def see(self, device: str, *, lost: bool) -> None:
        state, reason = (UNHEALTHY, "the path is lost") if lost else (HEALTHY, "")
        self.room.agent.observe([Evidence(device=device, source="path", state=state, reason=reason)])


@contextlib.asynccontextmanager
async def member(folder: Path, api: FakeApiServer, name: str, *resources: dict[str, Any]) -> AsyncIterator[Member]:
    """A node whose agent runs."""
    folder = folder / name
    folder.mkdir()
    async with claim_room(folder, *resources) as room:
        client = LazyApi(str(api.kubeconfig(folder)))

        def shared(features: Any) -> Any:
            catalog = room.dra.catalog
            return tuple(
                catalog.kinds[one].pool(room.agent.inventory, room.agent.ledger, room.agent.health, features)
                for one in sorted(catalog.shared)
            )

        manager = SharedPoolsManager(room.agent, client, lambda: room.config, name, shared, configured=True, **QUICK)
        one = Member(name, room, manager, client, [asyncio.create_task(manager.lead())])
        try:
            yield one
        finally:
            await one.stop()
            await client.close()


def specs(api: FakeApiServer) -> dict[str, dict[str, Any]]:
    """The published slices by pool."""
    return {one["spec"]["pool"]["name"]: one["spec"] for one in api.objects(SLICES)}


def taints(api: FakeApiServer) -> dict[str, list[tuple[str, str, str]]]:
    """The taints of each device."""
    every = (device for one in api.objects(SLICES) for device in one["spec"]["devices"])
    return {
        device["name"]: [(it["key"], it.get("value", ""), it["effect"]) for it in device.get("taints") or ()]
        for device in every
    }


def addresses(api: FakeApiServer) -> set[str]:
    """At which addresses the published targets are."""
    every = (device for one in specs(api).values() for device in one["devices"])
    return {device["attributes"]["traddr"]["string"] for device in every}


# ---------------------------------------------------------------- what is published


async def test_a_pool_is_published_for_all_nodes_or_those_with_labels(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast", "slow"), resource("near", selector=ZONE)),
    ):
        await api.until(lambda: len(specs(api)) == 3)
        assert specs(api).keys() == {"nvmeof-fast", "nvmeof-slow", "nvmeof-near"}
        every, near = specs(api)["nvmeof-fast"], specs(api)["nvmeof-near"]
        assert every["allNodes"] is True and "nodeName" not in every and every["driver"] == DRIVER
        for name, one in specs(api).items():
            assert [device["name"] for device in one["devices"]] == [name]
        (term,) = near["nodeSelector"]["nodeSelectorTerms"]
        assert term == {"matchExpressions": [{"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"]}]}
        assert near["devices"][0]["attributes"]["resource"] == {"string": "san-near"}
        said = every["devices"][0]["attributes"]
        assert {key: next(iter(value.values())) for key, value in said.items()} == {
            "kind": "nvmeof",
            "resource": "san-fast",
            "target": "fast",
            "selector": "san-fast",
            "transport": "tcp",
            "traddr": "192.0.2.1",
            "trsvcid": 4420,
            "nqn": "nqn.2024-01.com.example:fast",
        }
        assert not any(one["metadata"].get("ownerReferences") for one in api.objects(SLICES))


async def test_the_pool_is_the_same_whichever_node_publishes_it_and_whatever_it_holds(folder: Path) -> None:
    resources = [resource("fast"), SERIAL]
    found = []
    for name, ports in (("a", 1), ("b", 3)):
        (folder / name).mkdir()
        async with claim_room(folder / name, *resources, ports=ports) as room:
            if name == "b":
                room.agent.observe([Evidence(device="nvmeof-fast", source="path", state=UNHEALTHY, reason="x")])
            dra = dra_of(config_of(*resources), all_kinds.builtin_kinds(), name)
            pool = dra.catalog.kinds["nvmeof-fast"]
            found.append(pool.pool(room.agent.inventory, room.agent.ledger, room.agent.health, ALL_FEATURES))
    assert found[0] == found[1] and not found[0].devices[0].taints


async def test_one_of_several_agents_publishes_and_another_goes_on_when_it_is_gone(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast")) as a,
        member(folder, api, "node-b", resource("fast")) as b,
    ):
        await api.until(lambda: "nvmeof-fast" in specs(api))
        first, second = (a, b) if a.leads else (b, a)
        assert first.leads and not second.leads
        before = api.objects(SLICES)
        await first.stop()
        await until(lambda: second.leads, limit_s=20)
        (lease,) = api.objects(LEASES)
        assert lease["spec"]["holderIdentity"] == second.name and lease["spec"]["leaseTransitions"] == 1
        api.delete(SLICES, before[0]["metadata"]["name"])
        await api.until(lambda: "nvmeof-fast" in specs(api))
        assert specs(api)["nvmeof-fast"]["devices"] == before[0]["spec"]["devices"]


async def test_a_changed_configuration_begins_pools_and_ends_those_that_are_gone(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast"), resource("near", selector=ZONE)) as one,
    ):
        await api.until(lambda: len(specs(api)) == 2)
        await one.serve(resource("fast", "slow"))
        await api.until(lambda: specs(api).keys() == {"nvmeof-fast", "nvmeof-slow"})
        await one.serve(SERIAL)
        await api.until(lambda: not specs(api))


@pytest.mark.parametrize("away_s", [0.3, 3.0], ids=["for a moment", "for longer than the Lease lasts"])
async def test_pools_are_withdrawn_once_the_server_is_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, away_s: float
) -> None:
    monkeypatch.setattr(pools_module, "AGAIN_S", 0.1)
    async with FakeApiServer() as api, member(folder, api, "node-a", resource("fast", "slow")) as one:
        await api.until(lambda: len(specs(api)) == 2)
        async with api.away():
            await one.serve(SERIAL)
            await until(lambda: any("not withdrawn" in note for note in one.manager.notes()))
            await asyncio.sleep(away_s)
        assert len(specs(api)) == 2
        await api.until(lambda: not specs(api))
        await one.serve(resource("fast"))
        await api.until(lambda: specs(api).keys() == {"nvmeof-fast"})


async def test_pools_that_could_not_be_withdrawn_are_published_again_with_their_targets(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools_module, "AGAIN_S", 0.1)
    async with FakeApiServer() as api, member(folder, api, "node-a", resource("fast", "slow")) as one:
        await api.until(lambda: len(specs(api)) == 2)
        api.fail(500, times=4, verb="delete", resource=SLICES)
        await one.serve(SERIAL)
        await until(lambda: any("not withdrawn" in note for note in one.manager.notes()))
        await one.serve(resource("fast", traddr="192.0.2.9"))
        await api.until(lambda: specs(api).keys() == {"nvmeof-fast"} and addresses(api) == {"192.0.2.9"})
        await until(lambda: one.manager.notes() == [])


async def test_an_agent_that_does_not_lead_withdraws_nothing(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast")) as a,
        member(folder, api, "node-b", resource("fast")) as b,
    ):
        await api.until(lambda: "nvmeof-fast" in specs(api))
        first, second = (a, b) if a.leads else (b, a)
        await second.serve(SERIAL)
        await first.stop()
        for _ in range(25):  # longer than the Lease lasts
            await asyncio.sleep(0.1)
        assert "nvmeof-fast" in specs(api) and not second.leads


async def test_without_the_right_to_leases_it_says_so(folder: Path) -> None:
    async with FakeApiServer() as api:
        api.answers += [Fault(status=403, message="leases is forbidden", resource=LEASES) for _ in range(3)]
        async with member(folder, api, "node-a", resource("fast")) as one:
            await until(lambda: any("leases is forbidden" in note for note in one.manager.notes()))
            await api.until(lambda: "nvmeof-fast" in specs(api))
            await until(lambda: one.manager.notes() == [])


# ---------------------------------------------------------------- taints


async def held(one: Member, device: str, name: str = "c") -> Any:
    """A claim of a node that holds a device."""
    ref = one.room.claim(name, {"request": "r", "driver": DRIVER, "pool": device, "device": device})
    await one.room.prepare(ref)  # no disk is handed over here, but the grant stays
    assert [grant.holder.api for grant in one.room.agent.ledger.grants.values()] == [CLAIM]
    return ref


async def test_a_lost_path_of_any_node_is_a_taint_that_the_publisher_keeps_and_that_heals(folder: Path) -> None:
    async with FakeApiServer() as api:
        for name in ("node-a", "node-b"):
            api.add_node(name)
        resources = resource("fast", "slow")
        async with member(folder, api, "node-a", resources) as a, member(folder, api, "node-b", resources) as b:
            await api.until(lambda: "nvmeof-fast" in specs(api))
            first, second = (a, b) if a.leads else (b, a)
            await held(second, "nvmeof-fast")
            second.see("nvmeof-fast", lost=True)
            taint = ("nodeagent.dev/path-lost", second.name, "NoSchedule")
            await api.until(lambda: taints(api)["nvmeof-fast"] == [taint])
            added = specs(api)["nvmeof-fast"]["devices"][0]["taints"][0]["timeAdded"]
            await first.serve(resource("fast", "slow", traddr="192.0.2.9"))  # written for another reason
            await api.until(lambda: addresses(api) == {"192.0.2.9"})
            assert taints(api) == {"nvmeof-fast": [taint], "nvmeof-slow": []}
            assert specs(api)["nvmeof-fast"]["devices"][0]["taints"][0]["timeAdded"] == added
            second.see("nvmeof-fast", lost=False)
            await api.until(lambda: not any(taints(api).values()))


async def test_a_path_is_no_taint_once_its_claim_is_released(folder: Path) -> None:
    async with FakeApiServer() as api:
        api.add_node("node-a")
        async with member(folder, api, "node-a", resource("fast")) as one:
            await api.until(lambda: "nvmeof-fast" in specs(api))
            ref = await held(one, "nvmeof-fast")
            one.see("nvmeof-fast", lost=True)
            await api.until(lambda: any(taints(api).values()))
            await one.room.unprepare(ref)
            await api.until(lambda: not any(taints(api).values()))


async def test_an_agent_that_was_killed_removes_its_own_taints_at_its_start_and_no_others(folder: Path) -> None:
    async with FakeApiServer() as api:
        for name in ("node-a", "node-b"):
            api.add_node(name)
        async with member(folder, api, "node-a", resource("fast", "slow")) as one:
            await api.until(lambda: "nvmeof-fast" in specs(api))
            await one.stop()
        for stored, node in zip(api.objects(SLICES), ("node-a", "node-b"), strict=True):
            taint = {"key": "nodeagent.dev/path-lost", "value": node, "effect": "NoSchedule"}
            stored["spec"]["devices"][0]["taints"] = [taint]
            api.change(SLICES, stored["metadata"]["name"], spec=stored["spec"])
        (folder / "again").mkdir()
        async with member(folder / "again", api, "node-a", resource("fast", "slow")):
            await api.until(lambda: not taints(api)["nvmeof-fast"])
            assert taints(api)["nvmeof-slow"] == [("nodeagent.dev/path-lost", "node-b", "NoSchedule")]


async def test_the_taints_of_a_node_that_is_gone_are_removed_by_the_agent_that_publishes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeApiServer() as api:
        monkeypatch.setattr(pools_module, "GONE_S", 0.05)
        api.add_node("node-a")
        async with member(folder, api, "node-a", resource("fast")):
            await api.until(lambda: "nvmeof-fast" in specs(api))
            (stored,) = api.objects(SLICES)
            stored["spec"]["devices"][0]["taints"] = [
                {"key": "nodeagent.dev/path-lost", "value": "node-z", "effect": "NoExecute"},
                {"key": "example.com/mine", "value": "x", "effect": "NoSchedule"},
            ]
            api.change(SLICES, stored["metadata"]["name"], spec=stored["spec"])
            await api.until(
                lambda: not any(key == "nodeagent.dev/path-lost" for key, _, _ in taints(api)["nvmeof-fast"])
            )


async def test_the_taint_of_a_node_with_a_long_name_stays_as_long_as_the_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A taint's value is cut at 63 characters."""
    monkeypatch.setattr(pools_module, "GONE_S", 0.05)
    here, gone = (f"{letter * 60}-1.example.com" for letter in "ab")
    values = [taint_value(here), taint_value(gone)]
    async with FakeApiServer() as api:
        for name in ("node-a", here, gone):
            api.add_node(name)
        async with member(folder, api, "node-a", resource("fast")):
            await api.until(lambda: "nvmeof-fast" in specs(api))
            (stored,) = api.objects(SLICES)
            stored["spec"]["devices"][0]["taints"] = [
                {"key": "nodeagent.dev/path-lost", "value": value, "effect": "NoSchedule"} for value in values
            ]
            api.change(SLICES, stored["metadata"]["name"], spec=stored["spec"])
            looked = api.count("list", NODES)
            await api.until(lambda: api.count("list", NODES) > looked + 2)
            assert [value for _, value, _ in taints(api)["nvmeof-fast"]] == values
            api.delete(NODES, gone)
            await api.until(lambda: [value for _, value, _ in taints(api)["nvmeof-fast"]] == values[:1])


# ---------------------------------------------------------------- what a target is to the scheduler

SELECTORS: list[dict[str, str]] = [ZONE, {"topology.kubernetes.io/zone": "b"}, {**ZONE, "disk": "fast"}, {}]
"""Added, changed, extended, removed."""


def nodes_of(spec: dict[str, Any]) -> dict[str, str]:
    """The labels of the nodes that share a slice."""
    if spec.get("allNodes"):
        return {}
    (term,) = spec["nodeSelector"]["nodeSelectorTerms"]
    return {one["key"]: one["values"][0] for one in term["matchExpressions"]}


async def places(one: Member, seen: list[dict[str, set[str]]], since: str) -> None:
    """Note after each change on the server which pools have each device, until cancelled."""
    stored: dict[str, Any] = {}
    async for event in one.api.watch(RESOURCE_SLICES, fields={}, revision=since):
        name = event.object["metadata"]["name"]
        if event.type == "DELETED":
            stored.pop(name, None)
        elif event.type != "BOOKMARK":
            stored[name] = event.object["spec"]
        found: dict[str, set[str]] = {}
        for spec in stored.values():
            for device in spec["devices"]:
                found.setdefault(device["name"], set()).add(spec["pool"]["name"])
        seen.append(found)


async def test_a_held_target_stays_the_same_device_while_its_selector_is_edited(folder: Path) -> None:
    """The scheduler counts what claims have by driver, pool and device: another pool would be a free disk."""
    async with FakeApiServer() as api, member(folder, api, "node-a") as one:
        seen: list[dict[str, set[str]]] = []
        watching = asyncio.create_task(places(one, seen, api.revision))
        await until(lambda: api.watching > 0)
        await one.serve(resource("fast", "slow"))
        await api.until(lambda: len(specs(api)) == 2)
        await held(one, "nvmeof-fast")
        (grant,) = one.room.agent.ledger.grants.values()
        assert grant.result is not None
        identity = grant.result.pool, grant.result.device
        uid = {it["spec"]["pool"]["name"]: it["metadata"]["uid"] for it in api.objects(SLICES)}
        for selector in SELECTORS:
            await one.serve(resource("fast", "slow", selector=selector))
            await api.until(lambda wanted=selector: all(nodes_of(it) == wanted for it in specs(api).values()))  # type: ignore[misc]
            published = {(pool, it["name"]) for pool, spec in specs(api).items() for it in spec["devices"]}
            assert published - {identity} == {("nvmeof-slow", "nvmeof-slow")}, "the held one is not offered again"
            one.room.dra.catalog.find(one.room.agent.inventory, grant.result)
        assert {it["spec"]["pool"]["name"]: it["metadata"]["uid"] for it in api.objects(SLICES)} == uid
        await until(lambda: len(seen) >= 2 + 2 * len(SELECTORS))
        await cancel_all([watching])
        assert all(pools == {device} for found in seen for device, pools in found.items())


async def test_targets_of_one_resource_may_move_to_another(folder: Path) -> None:
    async with FakeApiServer() as api, member(folder, api, "node-a", resource("fast", "slow")) as one:
        await api.until(lambda: len(specs(api)) == 2)
        before = {(pool, it["name"]) for pool, spec in specs(api).items() for it in spec["devices"]}
        await one.serve(resource("slow", selector=ZONE), resource("fast"))
        await api.until(lambda: nodes_of(specs(api)["nvmeof-slow"]) == ZONE)
        assert {(pool, it["name"]) for pool, spec in specs(api).items() for it in spec["devices"]} == before


# ---------------------------------------------------------------- the Lease


def test_the_namespace_of_the_lease_is_the_configured_one_the_pods_or_kube_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    file = tmp_path / "namespace"
    assert lease_namespace("mine", file) == "mine"
    assert lease_namespace("", file) == "kube-system"
    file.write_text("agents")
    assert lease_namespace("", file) == "agents"
    monkeypatch.setenv("POD_NAMESPACE", "pods")
    assert lease_namespace("", file) == "pods"
    assert Config().dra.lease_namespace == ""


async def test_never_more_than_one_agent_holds_the_lease_whatever_the_server_does(folder: Path) -> None:
    """Five agents, a server that refuses, hangs up and is slow: those that hold it never overlap."""
    async with FakeApiServer() as api:
        from nodeagent.kube.apiserver.client import LEASES as RESOURCE

        client = LazyApi(str(api.kubeconfig(folder)))
        holding: set[str] = set()
        turns: list[str] = []

        async def work(name: str) -> None:
            assert not holding, (name, holding)
            holding.add(name)
            turns.append(name)
            try:
                await asyncio.sleep(3600)
            finally:
                holding.discard(name)

        leases = {
            name: ClusterLease(client, RESOURCE, "shared", "default", name, duration_s=1, renew_s=0.05, look_s=0.05)
            for name in "abcde"
        }
        tasks = {
            name: asyncio.create_task(one.while_held(lambda name=name: work(name)))  # type: ignore[misc]
            for name, one in leases.items()
        }
        try:
            for _ in range(3):
                await until(lambda: bool(holding))
                api.answers += [Fault(status=500, resource=LEASES) for _ in range(4)]
                api.answers += [Fault(kind="close", resource=LEASES, verb="replace", done=True)]
                (holder,) = holding
                await cancel_all([tasks.pop(holder)])
                await until(lambda: bool(holding), limit_s=20)
        finally:
            await cancel_all(tasks.values())
            await client.close()
        assert len({*turns}) >= 4
