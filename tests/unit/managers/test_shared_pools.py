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
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, Evidence
from nodeagent.host.devices import all_kinds
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers.fabrics import pools as pools_module
from nodeagent.managers.fabrics.lease import ClusterLease
from nodeagent.managers.fabrics.pools import SharedPoolsManager, lease_namespace
from nodeagent.resources.catalog import dra_of
from tests.doubles.api_server import LEASES, SLICES, FakeApiServer, Fault
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


# ---------------------------------------------------------------- what is published


async def test_a_pool_is_published_for_all_nodes_or_those_with_labels(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast", "slow"), resource("near", selector=ZONE)),
    ):
        await api.until(lambda: len(specs(api)) == 2)
        (own,) = [name for name in specs(api) if name != "nvmeof"]
        every, near = specs(api)["nvmeof"], specs(api)[own]
        assert own.startswith("nvmeof-") and "/" not in own
        assert every["allNodes"] is True and "nodeName" not in every and every["driver"] == DRIVER
        assert [one["name"] for one in every["devices"]] == ["nvmeof-fast", "nvmeof-slow"]
        (term,) = near["nodeSelector"]["nodeSelectorTerms"]
        assert term == {"matchExpressions": [{"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"]}]}
        assert near["devices"][0]["attributes"]["resource"] == {"string": "san-near"}
        said = every["devices"][0]["attributes"]
        assert {key: next(iter(value.values())) for key, value in said.items()} == {
            "kind": "nvmeof",
            "resource": "san-fast",
            "target": "fast",
            "selector": "san-fast",
            "pool": "nvmeof",
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
            pool = dra.catalog.kinds["nvmeof"]
            found.append(pool.pool(room.agent.inventory, room.agent.ledger, room.agent.health, ALL_FEATURES))
    assert found[0] == found[1] and not found[0].devices[0].taints


async def test_one_of_several_agents_publishes_and_another_goes_on_when_it_is_gone(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast")) as a,
        member(folder, api, "node-b", resource("fast")) as b,
    ):
        await api.until(lambda: "nvmeof" in specs(api))
        first, second = (a, b) if a.leads else (b, a)
        assert first.leads and not second.leads
        before = api.objects(SLICES)
        await first.stop()
        await until(lambda: second.leads, limit_s=20)
        (lease,) = api.objects(LEASES)
        assert lease["spec"]["holderIdentity"] == second.name and lease["spec"]["leaseTransitions"] == 1
        api.delete(SLICES, before[0]["metadata"]["name"])
        await api.until(lambda: "nvmeof" in specs(api))
        assert specs(api)["nvmeof"]["devices"] == before[0]["spec"]["devices"]


async def test_a_changed_configuration_raises_no_generation_for_one_slice_and_ends_pools_that_are_gone(
    folder: Path,
) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast"), resource("near", selector=ZONE)) as one,
    ):
        await api.until(lambda: len(specs(api)) == 2)
        await one.serve(resource("fast", "slow"))
        await api.until(lambda: len(specs(api)) == 1 and len(specs(api)["nvmeof"]["devices"]) == 2)
        assert specs(api)["nvmeof"]["pool"] == {"name": "nvmeof", "generation": 1, "resourceSliceCount": 1}
        await one.serve(SERIAL)
        await api.until(lambda: not specs(api))


async def test_an_agent_that_does_not_lead_withdraws_nothing(folder: Path) -> None:
    async with (
        FakeApiServer() as api,
        member(folder, api, "node-a", resource("fast")) as a,
        member(folder, api, "node-b", resource("fast")) as b,
    ):
        await api.until(lambda: "nvmeof" in specs(api))
        first, second = (a, b) if a.leads else (b, a)
        await second.serve(SERIAL)
        await first.stop()
        for _ in range(25):  # longer than the Lease lasts
            await asyncio.sleep(0.1)
        assert "nvmeof" in specs(api) and not second.leads


async def test_without_the_right_to_leases_it_says_so(folder: Path) -> None:
    async with FakeApiServer() as api:
        api.answers += [Fault(status=403, message="leases is forbidden", resource=LEASES) for _ in range(3)]
        async with member(folder, api, "node-a", resource("fast")) as one:
            await until(lambda: any("leases is forbidden" in note for note in one.manager.notes()))
            await api.until(lambda: "nvmeof" in specs(api))
            await until(lambda: one.manager.notes() == [])


# ---------------------------------------------------------------- taints


async def held(one: Member, device: str, name: str = "c") -> Any:
    """A claim of a node that holds a device."""
    ref = one.room.claim(name, {"request": "r", "driver": DRIVER, "pool": "nvmeof", "device": device})
    await one.room.prepare(ref)  # no disk is handed over here, but the grant stays
    assert [grant.holder.api for grant in one.room.agent.ledger.grants.values()] == [CLAIM]
    return ref


async def test_a_lost_path_of_any_node_is_a_taint_that_the_publisher_keeps_and_that_heals(folder: Path) -> None:
    async with FakeApiServer() as api:
        for name in ("node-a", "node-b"):
            api.add_node(name)
        resources = resource("fast", "slow")
        async with member(folder, api, "node-a", resources) as a, member(folder, api, "node-b", resources) as b:
            await api.until(lambda: "nvmeof" in specs(api))
            first, second = (a, b) if a.leads else (b, a)
            await held(second, "nvmeof-fast")
            second.see("nvmeof-fast", lost=True)
            taint = ("nodeagent.dev/path-lost", second.name, "NoSchedule")
            await api.until(lambda: taints(api)["nvmeof-fast"] == [taint])
            added = api.objects(SLICES)[0]["spec"]["devices"][0]["taints"][0]["timeAdded"]
            await first.serve(resource("fast", "slow", "more"))  # the publisher writes the slice for another reason
            await api.until(lambda: "nvmeof-more" in taints(api))
            assert taints(api) == {"nvmeof-fast": [taint], "nvmeof-slow": [], "nvmeof-more": []}
            assert api.objects(SLICES)[0]["spec"]["devices"][0]["taints"][0]["timeAdded"] == added
            second.see("nvmeof-fast", lost=False)
            await api.until(lambda: not any(taints(api).values()))


async def test_a_path_is_no_taint_once_its_claim_is_released(folder: Path) -> None:
    async with FakeApiServer() as api:
        api.add_node("node-a")
        async with member(folder, api, "node-a", resource("fast")) as one:
            await api.until(lambda: "nvmeof" in specs(api))
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
            await api.until(lambda: "nvmeof" in specs(api))
            await one.stop()
        (stored,) = api.objects(SLICES)
        for device, node in zip(stored["spec"]["devices"], ("node-a", "node-b"), strict=True):
            device["taints"] = [{"key": "nodeagent.dev/path-lost", "value": node, "effect": "NoSchedule"}]
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
            await api.until(lambda: "nvmeof" in specs(api))
            (stored,) = api.objects(SLICES)
            stored["spec"]["devices"][0]["taints"] = [
                {"key": "nodeagent.dev/path-lost", "value": "node-z", "effect": "NoExecute"},
                {"key": "example.com/mine", "value": "x", "effect": "NoSchedule"},
            ]
            api.change(SLICES, stored["metadata"]["name"], spec=stored["spec"])
            await api.until(
                lambda: not any(key == "nodeagent.dev/path-lost" for key, _, _ in taints(api)["nvmeof-fast"])
            )


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
