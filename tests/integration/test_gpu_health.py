"""GPUs fall ill and recover on a whole node: the real daemon, NVML's process, a library as strict as the driver."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeagent.state.audit import newest
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.api_server import EVENTS
from tests.support.dra_node import DraNode, dra_node, result
from tests.support.mig_driver import MigDriver, address
from tests.support.mig_node import MIG
from tests.support.until import until

QUICK = {"health": {"nvmlSeconds": 0.2, "pollSeconds": 0.2, "recoverSeconds": 0.3}}
WHOLE = {"name": "gpu", "kind": "gpu", "serve": "dra", "match": {"parent": ""}}
GPU, NAME = address(0), "0000-1b-00-0"
RESET = f"end all programs that use {GPU}, then `nvidia-smi --gpu-reset -i {GPU}`"


@contextlib.asynccontextmanager
async def gpu_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, mig: bool = False, more: Mapping[str, Any] = QUICK
) -> AsyncIterator[tuple[DraNode, MigDriver]]:
    driver = MigDriver.of(folder / "nvml", "h100-80", "h100-80", mig=mig)
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    driver.machine(tree)
    driver.install(tree.root)
    monkeypatch.setenv("FAKE_NVML_STATE", str(driver.path))
    monkeypatch.setenv("FAKE_NVML_XIDS", "1")
    resources = [{**MIG, "mig": {"mode": "dynamic", "gpus": []}}, WHOLE] if mig else [WHOLE]
    async with dra_node(folder, tree, resources, more=more) as node:
        await node.published("gpu")
        await until(lambda: _answered(node))
        yield node, driver


async def _answered(node: DraNode) -> bool:
    """Whether NVML has been asked, and the GPU's device node is known from it."""
    devices = (await node.agent.ask("/v1/inventory"))[1]["devices"]
    return any(one["id"] == GPU and one["paths"] for one in devices) and bool((await known(node))["causes"])


async def known(node: DraNode, device: str = GPU) -> dict[str, Any]:
    found = {one["device"]: one for one in (await node.agent.ask("/v1/health"))[1]}
    return found.get(device, {"state": "healthy", "reason": "", "advice": "", "causes": []})


async def reached(node: DraNode, state: str, device: str = GPU) -> dict[str, Any]:
    """What is known of a device once it is in a state."""

    async def is_there() -> bool:
        return bool((await known(node, device))["state"] == state)

    await until(is_there)
    return await known(node, device)


def tainted(node: DraNode) -> set[str]:
    """The names of devices with a taint of health."""
    every = node.devices("gpu")
    return {
        name for name, one in every.items() if any(t["key"] == "nodeagent.dev/unhealthy" for t in one.get("taints", ()))
    }


async def test_a_gpu_that_needs_a_reset_says_so_everywhere_and_is_well_after_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice with a taint, an Event with the advice, a note of the status, and its end once NVML shows the reset."""
    async with gpu_node(folder, monkeypatch) as (node, driver):
        await node.prepare(node.claim("c", result("gpu", NAME)))
        driver.sign(0, "rows_pending", 1)
        ill = await reached(node, "unhealthy")
        assert (ill["reason"], ill["advice"]) == ("memory rows are remapped at the next reset: reset the GPU", RESET)
        await node.api.until(lambda: tainted(node) == {NAME})
        await node.api.until(lambda: bool(node.api.objects(EVENTS)))
        (event,) = node.api.objects(EVENTS)
        assert event["note"] == f"device {GPU} is unhealthy: {ill['reason']}; held by claim default/c; {RESET}"
        notes = (await node.agent.ask("/v1/status"))[1]["notes"]
        assert f"{GPU} is unhealthy ({ill['reason']}): {RESET}" in notes
        driver.reset()
        assert (await reached(node, "healthy"))["advice"] == ""
        await node.api.until(lambda: tainted(node) == set())


async def test_a_gpu_that_is_too_hot_is_granted_as_before_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gpu_node(folder, monkeypatch) as (node, driver):
        driver.sign(0, "clocks", 0x40)
        await until(lambda: _warned(node))
        assert (await known(node))["state"] == "healthy"
        assert tainted(node) == set()
        (answer,) = await node.prepare(node.claim("c", result("gpu", NAME)))
        assert answer.error == ""
        await node.api.until(lambda: bool(node.api.objects(EVENTS)))
        (event,) = node.api.objects(EVENTS)
        assert (event["reason"], event["type"]) == ("DeviceDegraded", "Warning")
        assert "degraded: its clocks are halved or lower since it is too hot" in event["note"]
        metrics = str((await node.agent.ask("/metrics"))[1])
        assert f'nodeagent_device_degraded{{device="{GPU}",reason="its clocks' in metrics
        assert f'nodeagent_device_reading{{device="{GPU}",reading="reasons",source="clocks"}} 65.0' in metrics
        driver.sign(0, "clocks", 0)
        await until(lambda: _not_warned(node))


async def _warned(node: DraNode) -> bool:
    return any(cause["state"] == "degraded" for cause in (await known(node))["causes"])


async def _not_warned(node: DraNode) -> bool:
    return not await _warned(node)


async def test_an_error_of_one_instance_is_that_of_its_place_and_one_of_the_gpu_is_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of the memory, which end with the instance, and Xids that name it; rows that wait for a reset do not end
    because NVML is silent on them once there is an instance."""
    place, other = f"{GPU}/mig-3g.40gb-4", f"{GPU}/mig-3g.40gb-0"
    async with gpu_node(folder, monkeypatch, mig=True) as (node, driver):
        every = {name for name in node.devices("gpu") if name.startswith(NAME)}
        one = node.claim("c", result("gpu", f"{NAME}-mig-3g-40gb-4"))
        (answer,) = await node.prepare(one)
        assert answer.error == ""
        (made,) = driver.instances()
        driver.errors(0, made.id, 2)
        ill = await reached(node, "unhealthy", place)
        assert ill["reason"] == "2 uncorrected memory errors since the instance was made"
        assert (await known(node, other))["state"] == (await known(node))["state"] == "healthy"
        await node.api.until(lambda: tainted(node) == {f"{NAME}-mig-3g-40gb-4"})
        assert await node.unprepare(one) == [""]
        await reached(node, "healthy", place)
        driver.sign(0, "rows_pending", 1)
        await reached(node, "unhealthy")
        await node.api.until(lambda: tainted(node) == every)
        driver.make(0, "1g.10gb", 0, id=3)
        await until(lambda: _shows_instance(node))
        assert (await known(node))["reason"] == "memory rows are remapped at the next reset: reset the GPU"
        part = await reached(node, "unhealthy", f"{GPU}/mig-3-0")
        assert {one["source"]: one["reason"] for one in part["causes"]}["whole"] == (await known(node))["reason"]
        driver.xid(0, 94, (3, 0))
        await until(lambda: _has(node, "xid", f"{GPU}/mig-3-0"))
        assert "Xid 94" in (await known(node, f"{GPU}/mig-3-0"))["reason"]


async def _shows_instance(node: DraNode) -> bool:
    devices = (await node.agent.ask("/v1/inventory"))[1]["devices"]
    return any(one["id"] == f"{GPU}/mig-3-0" for one in devices)


async def test_what_an_xid_leaves_to_nvml_is_asked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Xid 154 alone is no evidence: it says that the driver now asks for another recovery."""
    slow = {"health": {**QUICK["health"], "nvmlSeconds": 3600}}
    async with gpu_node(folder, monkeypatch, more=slow) as (node, driver):
        driver.sign(0, "recovery", 1)
        driver.xid(0, 154)
        ill = await reached(node, "unhealthy")
        assert (ill["reason"], ill["advice"]) == ("the driver asks for a reset of the GPU", RESET)
        driver.reset()
        driver.xid(0, 154)
        await reached(node, "healthy")


async def test_a_context_switch_timeout_counts_only_if_the_driver_asks_for_a_reset(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program can bring it about: its GPU stays as it is, with no taint, unless the driver did not get over it."""
    slow = {"health": {**QUICK["health"], "nvmlSeconds": 3600}}
    async with gpu_node(folder, monkeypatch, more=slow) as (node, driver):
        driver.xid(0, 109)
        assert (await node.agent.said("xid", code=109))["effect"] == "application"
        assert (await known(node))["state"] == "healthy"
        assert f'nodeagent_xids_total{{code="109",device="{GPU}"' in str((await node.agent.ask("/metrics"))[1])
        driver.sign(0, "recovery", 1)
        driver.xid(0, 109)
        ill = await reached(node, "unhealthy")
        assert ill["reason"] == "the driver asks for a reset of the GPU"
        assert not any(cause["latched"] for cause in ill["causes"])
        await node.api.until(lambda: tainted(node) == {NAME})
        driver.reset()
        driver.xid(0, 154)
        await reached(node, "healthy")


async def test_an_admin_clears_what_is_remembered_which_is_in_the_history_and_comes_back_if_it_is_still_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gpu_node(folder, monkeypatch) as (node, driver):
        driver.xid(0, 119)
        latched = await reached(node, "unhealthy")
        assert latched["advice"] == f"{RESET}, then `nodeagent health clear {GPU}`"
        driver.sign(0, "sram", 1)
        await until(lambda: _has(node, "sram"))
        assert (await node.agent.ask(f"/v1/health/{GPU}", method="DELETE"))[0] == 200
        await until(lambda: _has(node, "sram"))
        left = await known(node)
        assert (left["state"], left["advice"]) == ("unhealthy", f"drain the node and replace {GPU}")
        assert not any(cause["latched"] for cause in left["causes"])
        driver.sign(0, "sram", 0)
        await reached(node, "healthy")
        assert (await node.agent.ask(f"/v1/health/{GPU}", method="DELETE"))[0] == 404
        entries = [one for one in newest(node.agent.state / "ledger.db", -1) if one.what == f"{GPU} cleared"]
        assert [one.why for one in entries] == ["cleared by an admin (uid 0)"]


async def _has(node: DraNode, source: str, device: str = GPU) -> bool:
    causes = (await known(node, device))["causes"]
    return any(cause["source"] == source and cause["state"] == "unhealthy" for cause in causes)
