"""Claims that are granted while their pods wait to be bound: a whole agent, an API server, both sides of kubelet."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import CLAIMS, CONDITIONS, Fault
from tests.doubles.dra_kubelet import ClaimId
from tests.support.dra_node import CPU, CPUS, NODE, SERIAL, DraNode, consumed, dra_node

BINDING = {"bindingConditions": True}
WAITED_FOR = {"bindingConditions": ["Ready"], "bindingFailureConditions": ["nodeagent.dev/Refused"]}


@pytest.fixture
def tree(folder: Path) -> DeviceTree:
    made = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    made.node("/dev/ttyS0")
    return made


def cpus(count: int, device: str = "numa0", *, pool: str = f"{NODE}/cpu") -> dict[str, Any]:
    """What the scheduler allocates of a device that has binding conditions."""
    return {**consumed("cpu", device, cpus=str(count)), **WAITED_FOR, "pool": pool}


def conditions(node: DraNode, claim: ClaimId) -> dict[str, tuple[str, str]]:
    """Status and message of each condition that a claim's devices have."""
    found = node.api.find(CLAIMS, claim.name, claim.namespace) or {}
    devices = found.get("status", {}).get("devices", [])
    return {one["type"]: (one["status"], one["message"]) for device in devices for one in device["conditions"]}


async def conditional(node: DraNode, *, holds: bool = True) -> None:
    """Return once pods wait for claims of CPUs, or no longer."""
    await node.api.until(
        lambda: (
            bool(devices := node.devices("cpu").values())
            and all(("bindingConditions" in one) == holds for one in devices)
        )
    )


async def decided(node: DraNode, claim: ClaimId) -> dict[str, tuple[str, str]]:
    """The conditions of a claim, once the scheduler can go on."""
    await node.api.until(
        lambda: any(status == "True" for status, _ in conditions(node, claim).values()),
    )
    return conditions(node, claim)


async def test_kinds_that_the_device_plugin_serves_too_are_published_with_conditions(
    folder: Path, tree: DeviceTree
) -> None:
    """Others are not: their pods would wait for nothing."""
    async with dra_node(folder, tree, [CPUS, {**SERIAL, "serve": "dra"}], BINDING) as node:
        await conditional(node)
        assert all(WAITED_FOR.items() <= one.items() for one in node.devices("cpu").values())
        assert not any("bindingConditions" in one for one in node.devices("char").values())
        assert not node.api.rejected
        # The server has the slice before the agent has read the server's answer.
        await node.agent.until("/v1/status", lambda status: "conditions" in status["dra"]["slices"]["kept"])


async def test_without_the_option_claims_of_the_cluster_are_not_read(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        assert not any("bindingConditions" in one for one in node.devices("cpu").values())
        assert not node.api.count("list", CLAIMS) and not node.api.count("watch", CLAIMS)


async def test_a_claim_holds_its_cpus_before_its_pod_is_bound(folder: Path, tree: DeviceTree) -> None:
    """The device plugin can no longer grant them; what kubelet prepares is what the scheduler waited for."""
    async with dra_node(folder, tree, [CPUS], BINDING) as node:
        await conditional(node)
        await node.kubelet.wait_allocatable(CPU, 8)
        claim = node.claim("c", cpus(4))
        found = await decided(node, claim)
        assert found["Ready"][0] == "True" and "nodeagent.dev/Refused" not in found
        (grant,) = await node.grants()
        await node.kubelet.wait_allocatable(CPU, 4)
        (answer,) = await node.prepare(claim)
        assert answer.error == "" and node.env(claim)["NODEAGENT_CPUS"] == grant["cpus"]
        assert [one["id"] for one in await node.grants()] == [grant["id"]]


async def test_a_claim_whose_cpus_the_device_plugin_was_faster_to_grant_is_scheduled_again(
    folder: Path, tree: DeviceTree
) -> None:
    """The pod is not bound to wait on this node; the reason stands in the claim, and nothing is held for it."""
    async with dra_node(folder, tree, [CPUS], BINDING) as node:
        await conditional(node)
        await node.kubelet.wait_allocatable(CPU, 8)
        pod = await node.kubelet.admit_pod("default", "faster", {"main": {CPU: 4}})
        (group,) = {f"numa{int(one.removeprefix('cpu')) % 4 // 2}" for one in pod.held(CPU)}
        found = await decided(node, claim := node.claim("slower", cpus(2, group)))
        assert found["Ready"][0] == "False" and found["nodeagent.dev/Refused"][0] == "True"
        why = f"cannot prepare claim default/slower: request r, device node-a/cpu/{group}: cannot place 2 CPUs: 0 of 8"
        assert found["nodeagent.dev/Refused"][1].startswith(why)
        assert [one["pod"] for one in await node.grants() if one["api"] != "device-plugin"] == []
        again = {"allocation": {"devices": {"results": [cpus(2, "numa1" if group == "numa0" else "numa0")]}}}
        stored = node.api.find(CLAIMS, "slower", "default")
        assert stored is not None
        node.api.change(
            CLAIMS, "slower", "default", status={**again, "reservedFor": stored["status"]["reservedFor"], "devices": []}
        )
        await node.api.until(lambda: conditions(node, claim).get("Ready", ("",))[0] == "True")
        assert "nodeagent.dev/Refused" not in conditions(node, claim)


async def test_claims_that_wait_for_others_are_left_to_them(folder: Path, tree: DeviceTree) -> None:
    """For another node, another driver, or no condition at all; garbage in one claim harms no other."""
    async with dra_node(folder, tree, [CPUS], BINDING) as node:
        await conditional(node)
        elsewhere = node.claim("elsewhere", cpus(2, pool="node-b/cpu"))
        others = node.claim("others", {**cpus(2), "driver": "gpu.example.com"})
        plain = node.claim("plain", consumed("cpu", "numa0", cpus="1"))
        node.api.add(CLAIMS, {"metadata": {"name": "odd", "namespace": "default"}, "status": {"devices": 7}})
        mine = node.claim("mine", cpus(1))
        assert (await decided(node, mine))["Ready"][0] == "True"
        assert [conditions(node, one) for one in (elsewhere, others, plain)] == [{}, {}, {}]
        assert [one["claim"] for one in await node.grants()] == ["mine"]


async def test_claims_made_while_the_server_or_the_agent_was_away_are_decided_afterwards(
    folder: Path, tree: DeviceTree
) -> None:
    async with dra_node(folder, tree, [CPUS], BINDING) as node:
        await conditional(node)
        async with node.api.away():
            first = node.claim("first", cpus(1))
        assert (await decided(node, first))["Ready"][0] == "True"
        await node.agent.stop()
        second = node.claim("second", cpus(1))
        await node.agent.start()
        assert (await decided(node, second))["Ready"][0] == "True"


async def test_a_status_that_the_server_does_not_take_is_written_again(folder: Path, tree: DeviceTree) -> None:
    async with dra_node(folder, tree, [CPUS], BINDING) as node:
        await conditional(node)
        node.api.answers.append(Fault(kind="close", verb="apply", resource=CLAIMS))
        node.api.fail(500, times=2, verb="apply", resource=CLAIMS)
        assert (await decided(node, node.claim("c", cpus(1))))["Ready"][0] == "True"


async def test_no_pod_waits_where_claims_must_not_be_read(folder: Path, tree: DeviceTree) -> None:
    """As with kubelet's own credentials: the slices have no conditions, and the status says why."""
    async with dra_node(folder, tree, [CPUS], BINDING) as node:
        await conditional(node)
        node.api.fail(403, times=100, verb="list", resource=CLAIMS)
        node.api.expire_watches()
        await conditional(node, holds=False)
        status = (await node.agent.ask("/v1/status"))[1]
        (note,) = [one for one in status["notes"] if "bindingConditions" in one]
        assert note.startswith("dra.bindingConditions has no effect at present: cannot list resourceclaims")
        assert status["ready"]


async def test_a_server_without_the_feature_gets_the_same_pool_without_conditions(
    folder: Path, tree: DeviceTree
) -> None:
    async with dra_node(folder, tree, [CPUS]) as node:
        await node.published("cpu")
        node.api.dropped_fields |= {CONDITIONS}
        node.agent.configure(**{**node.options, "dra": {**node.options["dra"], **BINDING}})
        await node.agent.until("/v1/status", lambda status: "conditions" in status["dra"]["slices"]["lost"])
        claim = node.claim(str(uuid.uuid4()), consumed("cpu", "numa1", cpus="1"))
        assert (await node.prepare(claim))[0].error == ""
