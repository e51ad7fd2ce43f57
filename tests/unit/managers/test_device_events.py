"""Events about devices that pods hold, in an API server that is as strict as the real one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from nodeagent.config.schema import Config
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.kube.apiserver.lazy import LazyApi
from nodeagent.managers.device_events import Change, DeviceEvents, event_of, is_configured
from nodeagent.managers.event_sender import Pace
from nodeagent.resources.offer import offers
from tests.builders.devices import DeviceTree
from tests.doubles.api_server import CORE_EVENTS, FakeApiServer, Fault
from tests.doubles.api_server import EVENTS as STORED
from tests.support.health_node import HealthNode, health_node

A, B, SPARE = "0000:3b:00.0", "0000:5e:00.0", "0000:81:00.0"
NODE = "worker-1"
CONFIG = msgspec.convert({"resources": [{"name": "nic", "kind": "nic"}]}, Config)
WAIT_S = 30.0


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    tree = DeviceTree(tmp_path)
    for address in (A, B, SPARE):
        tree.pci(address)
    return tree


class Room:
    """An agent two of whose adapters are held, and the API server."""

    def __init__(self, node: HealthNode, api: FakeApiServer) -> None:
        self.node, self.api = node, api

    def see(self, device: str, state: str, reason: str = "") -> None:
        self.node.agent.observe([Evidence(device=device, source="carrier", state=state, reason=reason)])

    def heal(self, device: str) -> None:
        self.see(device, HEALTHY)
        self.node.now_s += 30
        self.node.agent.recover_due()

    async def events(self, count: int) -> list[dict[str, Any]]:
        """All Events, in the order in which they came, once there are so many."""
        async with asyncio.timeout(WAIT_S):
            await self.api.until(lambda: len(self.api.objects(STORED)) >= count)
        found = self.api.objects(STORED)
        assert len(found) == count
        return sorted(found, key=lambda one: int(one["metadata"]["resourceVersion"]))


@contextlib.asynccontextmanager
async def room(tree: DeviceTree, *, configured: bool = True, pace: Pace | None = None) -> AsyncIterator[Room]:
    async with health_node(tree, every=[]) as node, FakeApiServer() as api:
        (offer,) = offers(CONFIG, builtin_kinds())
        await node.agent.allocate(offer.resource, [[A], [B]], offer.edits, "op")
        client = LazyApi(api.kubeconfig(tree.root))
        manager = DeviceEvents(node.agent, client.event, NODE, "nodeagent.dev", configured, pace)
        leading = asyncio.create_task(manager.lead())
        try:
            yield Room(node, api)
        finally:
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            await client.close()


async def test_each_change_of_a_device_that_is_held_is_one_event_on_the_node(tree: DeviceTree) -> None:
    """With the device, the cause in the words of its health, and who holds it; nothing of a device that is not held."""
    async with room(tree) as one:
        one.see(SPARE, UNHEALTHY, "no carrier on eth9")
        one.see(A, UNHEALTHY, "no carrier on eth1")
        await one.events(1)
        one.see(A, UNHEALTHY, "no carrier on eth1")
        one.see(B, UNKNOWN, "eth2 is dormant")
        await one.events(2)
        one.heal(A)
        found = await one.events(3)
    assert [(event["type"], event["reason"]) for event in found] == [
        ("Warning", "DeviceUnhealthy"),
        ("Warning", "DeviceHealthUnknown"),
        ("Normal", "DeviceHealthy"),
    ]
    holder = "a container not yet listed (nodeagent.dev/nic)"
    assert [event["note"] for event in found] == [
        f"device {A} is unhealthy: no carrier on eth1; held by {holder}",
        f"device {B} is unknown: eth2 is dormant; held by {holder}",
        f"device {A} is healthy; held by {holder}",
    ]
    assert {tuple(event["regarding"].items()) for event in found} == {
        (("apiVersion", "v1"), ("kind", "Node"), ("name", NODE), ("uid", NODE))
    }


async def test_a_device_that_flaps_is_told_at_a_pace_and_as_it_then_is(tree: DeviceTree) -> None:
    now_s = [0.0]
    pace = Pace(burst=2, pace_s=30, clock=lambda: now_s[0])
    for _ in range(2):
        assert pace.wait_s() == 0
        pace.take()
    assert pace.wait_s() == 30
    now_s[0] = 30
    assert pace.wait_s() == 0
    pace.take()
    assert pace.wait_s() == 30
    now_s[0] = 1000
    pace.take()
    assert pace.wait_s() == 0, "the burst is complete again"
    slow = Pace(burst=1, pace_s=0.2)
    async with room(tree, pace=slow) as one:
        one.see(A, UNHEALTHY, "no carrier on eth1")
        await one.events(1)
        for _ in range(5):
            one.heal(A)
            one.see(A, UNHEALTHY, "no carrier on eth1")
        one.heal(A)
        one.see(B, UNHEALTHY, "no carrier on eth2")
        found = await one.events(3)
    assert [(event["reason"], event["note"][:19]) for event in found] == [
        ("DeviceUnhealthy", f"device {A}"),
        ("DeviceHealthy", f"device {A}"),
        ("DeviceUnhealthy", f"device {B}"),
    ]


@pytest.mark.parametrize("fault", [Fault(kind="close"), Fault(status=500), Fault(status=403), Fault(kind="garbage")])
async def test_an_event_that_fails_is_logged_once_and_not_sent_again(tree: DeviceTree, fault: Fault) -> None:
    """What has changed since is sent, unless the agent may not send any."""
    async with room(tree) as one:
        fault.resource = STORED
        one.api.answers.append(fault)
        if fault.status == 403:
            one.api.answers.append(Fault(status=403, resource=CORE_EVENTS))
        with capture_logs() as lines:
            one.see(A, UNHEALTHY, "no carrier on eth1")
            async with asyncio.timeout(WAIT_S):
                await one.api.until(lambda: not one.api.answers)
            one.see(B, UNHEALTHY, "no carrier on eth2")
            if fault.status != 403:
                (event,) = await one.events(1)
                assert event["note"].startswith(f"device {B}")
        assert [line["event"] for line in lines].count("event-not-sent") <= 1
        assert one.api.count("create", STORED) == (1 if fault.status == 403 else 2)


async def test_credentials_of_kubelet_may_write_events_of_the_core_group_alone(tree: DeviceTree) -> None:
    async with room(tree) as one:
        one.api.answers.append(Fault(status=403, resource=STORED))
        one.see(A, UNHEALTHY, "no carrier on eth1")
        async with asyncio.timeout(WAIT_S):
            await one.api.until(lambda: bool(one.api.objects(CORE_EVENTS)))
        (event,) = one.api.objects(CORE_EVENTS)
        assert one.api.rejected == []
    assert event["message"].startswith(f"device {A} is unhealthy: no carrier on eth1; held by ")
    assert (event["reason"], event["involvedObject"]["name"]) == ("DeviceUnhealthy", NODE)


async def test_nothing_is_sent_without_an_api_server(tree: DeviceTree) -> None:
    async with room(tree, configured=False) as one:
        one.see(A, UNHEALTHY, "no carrier on eth1")
        assert one.api.requests == []
    assert not is_configured("", {})
    assert is_configured("/etc/kubernetes/kubelet.conf", {})
    assert is_configured("", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})


async def test_a_device_that_has_left_is_not_told_to_be_healthy(tree: DeviceTree) -> None:
    async with room(tree) as one:
        one.see(A, UNHEALTHY, "no carrier on eth1")
        await one.events(1)
        (tree.root / f"sys/bus/pci/devices/{A}").unlink()
        one.node.rescan()
        one.see(B, UNHEALTHY, "no carrier on eth2")
        found = await one.events(2)
    assert [event["reason"] for event in found] == ["DeviceUnhealthy"] * 2


def test_a_note_is_never_too_long_and_a_name_always_one(tree: DeviceTree) -> None:
    """Also of many holders, and of an id that is no text."""
    change = Change("usb-\udcff", UNHEALTHY, "ü" * 900, tuple(f"ns/pod-{one}" for one in range(200)))
    event = event_of(change, "n." * 120 + "node", "nodeagent.dev", 0.0)
    assert len(event["note"].encode()) <= 1024
    assert len(event["metadata"]["name"]) <= 253
    assert event["eventTime"] == "1970-01-01T00:00:00.000000Z"
