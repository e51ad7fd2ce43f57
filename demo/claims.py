"""The second part of the demonstration: claims over DRA alongside the device plugin, one ledger under both.

The API server and kubelet's DRA side are those of the tests: real servers on real sockets that keep to their contracts.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from tests.doubles.api_server import FakeApiServer
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet, Outcome
from tests.doubles.kubelet import AdmissionError, FakeKubelet

DRIVER, NODE, DOMAIN = "nodeagent.dev", "demo-node", "nodeagent.dev"
DEVICE = "zero"
"""The exclusive device that both sides want: /dev/zero, which every machine has."""
DEADLINE_S = 20.0
Show = Callable[[str, Path], Awaitable[None]]


def resources() -> list[dict[str, Any]]:
    """What is served through both APIs."""
    return [
        {"name": "cpu", "kind": "cpu", "serve": "both"},
        {"name": DEVICE, "kind": "char", "paths": ["/dev/zero"], "serve": "both"},
    ]


def configuration(folder: Path, api: FakeApiServer) -> dict[str, Any]:
    access = {"kubeconfig": str(api.kubeconfig(folder)), "nodeName": NODE, "cdiDir": str(folder / "cdi")}
    return {**access, "spreadSeconds": 0}


async def scene(folder: Path, kubelet: FakeKubelet, dra: FakeDraKubelet, api: FakeApiServer, show: Show) -> bool:
    """A claim prepared, its device refused to a pod, and the other way round; then all is free again."""
    async with asyncio.timeout(DEADLINE_S):
        await api.until(lambda: len(_devices(api)) == 2)
        await dra.wait_registered(DRIVER)
    print("\n---- Dynamic Resource Allocation, over the same ledger\n\nResourceSlices that the agent published:")
    for kind, devices in _devices(api).items():
        for device in devices:
            said = ", ".join(f"{name} {one['value']}" for name, one in device.get("capacity", {}).items())
            print(f"  {NODE}/{kind}: {device['name']}{f' ({said})' if said else ''}")

    claim = _claim(api, "first", cpus=1)
    (answer,) = (await dra.prepare(DRIVER, [claim])).values()
    print(f"\nclaim default/first prepared: {', '.join(one.cdi_ids[0] for one in answer.devices)}")
    for line in _environment(folder, claim):
        print(f"  {line}")
    await show("grants", folder)
    refused = await _pod_refused(kubelet)
    await dra.unprepare(DRIVER, [claim])

    async with asyncio.timeout(DEADLINE_S):
        await kubelet.wait_allocatable(f"{DOMAIN}/{DEVICE}", 1)
    await kubelet.admit_pod("default", "legacy", {"main": {f"{DOMAIN}/{DEVICE}": 1}})
    print("\nclaim default/first unprepared; pod legacy then gets the device through the device plugin")
    second = _claim(api, "second", cpus=0)
    answer = (await dra.prepare(DRIVER, [second]))[second.uid]
    print(f"claim default/second: {answer.error}")

    await kubelet.delete_pod("default", "legacy")
    again = await _prepared(dra, second)
    print("\npod legacy deleted; claim default/second is prepared as soon as that is known, and unprepared")
    await dra.unprepare(DRIVER, [second])
    await show("grants", folder)
    return refused and bool(answer.error) and not again.error and not [*(folder / "cdi").glob("*.json")]


def _devices(api: FakeApiServer) -> dict[str, list[Mapping[str, Any]]]:
    """Published devices by kind."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in api.slices(node=NODE):
        found.setdefault(one["spec"]["pool"]["name"].rpartition("/")[2], []).extend(one["spec"].get("devices", ()))
    return found


def _claim(api: FakeApiServer, name: str, cpus: int) -> ClaimId:
    """A claim as the scheduler leaves it: allocated and reserved for a pod."""
    devices = _devices(api)
    results = [{"request": "device", "driver": DRIVER, "pool": f"{NODE}/char", "device": devices["char"][0]["name"]}]
    if cpus:
        group = max(devices["cpu"], key=lambda one: int(one["capacity"]["cpus"]["value"]))["name"]
        share = {"shareID": "8f2d2c1e-0000-4000-8000-000000000001", "consumedCapacity": {"cpus": str(cpus)}}
        results.append({"request": "cpus", "driver": DRIVER, "pool": f"{NODE}/cpu", "device": group, **share})
    made = api.add_claim(name, results=results)
    return ClaimId("default", name, made["metadata"]["uid"])


def _environment(folder: Path, claim: ClaimId) -> list[str]:
    (path,) = [one for one in (folder / "cdi").glob("*.json") if claim.uid in one.name]
    devices = json.loads(path.read_text())["devices"]
    return [line for one in devices for line in one["containerEdits"].get("env", ())]


async def _pod_refused(kubelet: FakeKubelet) -> bool:
    """Whether kubelet finds no device for a pod, as the agent shows it Unhealthy."""
    async with asyncio.timeout(DEADLINE_S):
        await kubelet.wait_allocatable(f"{DOMAIN}/{DEVICE}", 0)
    try:
        await kubelet.admit_pod("default", "late", {"main": {f"{DOMAIN}/{DEVICE}": 1}})
    except AdmissionError as error:
        print(f"\npod late is refused the same device: {error}")
        return True
    return False


async def _prepared(dra: FakeDraKubelet, claim: ClaimId) -> Outcome:
    """Kubelet tries again for as long as it is refused."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            answer = (await dra.prepare(DRIVER, [claim]))[claim.uid]
            if not answer.error:
                return answer
            await asyncio.sleep(0.1)


def few_cpus() -> bool:
    """Whether this machine has no core to spare for the system."""
    return len(os.sched_getaffinity(0)) < 6
