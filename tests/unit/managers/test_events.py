"""Events of a node, in an API server that is as strict as the real one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.events.happenings import MOST_PODS, RULES, Happening, PodRef, Reason, drift
from nodeagent.core.events.states import Node
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.kube.apiserver.lazy import LazyApi, is_configured
from nodeagent.managers.events import recorder
from nodeagent.managers.events.event_queue import MOST_KNOWN, MOST_WAITING, SERIES_S, STALE_S, EventQueue
from nodeagent.managers.events.manager import START_S, EventsManager
from nodeagent.managers.events.pace import Pace
from nodeagent.managers.events.recorder import NOT_ALLOWED_S, EventRecorder
from nodeagent.resources.offer import offers
from tests.builders.devices import DeviceTree
from tests.doubles.api_server import CORE_EVENTS, FakeApiServer, Fault
from tests.doubles.api_server import EVENTS as STORED
from tests.support.health_node import HealthNode, health_node
from tests.support.until import until

A, B, SPARE = "0000:3b:00.0", "0000:5e:00.0", "0000:81:00.0"
NODE, DRIVER = "worker-1", "nodeagent.dev"
CONFIG = msgspec.convert({"resources": [{"name": "nic", "kind": "nic"}]}, Config)
POD = PodRef("trading", "book-0", "uid-book-0")
HOLDER = "a container not yet listed (nodeagent.dev/nic)"
WAIT_S = 30.0
FAST = (1000, 0.001)
"""Burst and pace, in seconds, that hold nothing up."""


class Desk:
    """Writes Events to an API server. `now_s` is the time, which passes when told."""

    def __init__(self, api: FakeApiServer, client: LazyApi, burst: int, pace_s: float) -> None:
        self.api, self.client = api, client
        self.now_s = 10_000.0
        self.pace = burst, pace_s
        self.recorder = self._recorder()

    def _recorder(self) -> EventRecorder:
        clock = lambda: self.now_s  # noqa: E731
        found = EventRecorder(self.client, NODE, DRIVER, Pace(*self.pace), clock, clock)
        found.enable(True)
        return found

    def restarted(self) -> None:
        """Another agent in place of the one before; serve() again."""
        self.recorder = self._recorder()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.recorder.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.api.until(holds)

    async def events(self, count: int) -> list[dict[str, Any]]:
        """All Events, in the order in which they were last written, once there are so many."""
        await self.until(lambda: len(self.api.objects(STORED)) >= count)
        found = self.api.objects(STORED)
        assert len(found) == count
        return sorted(found, key=lambda one: int(one["metadata"]["resourceVersion"]))


@contextlib.asynccontextmanager
async def desk(folder: Path, *pace: float) -> AsyncIterator[Desk]:
    async with FakeApiServer() as api:
        client = LazyApi(api.kubeconfig(folder))
        burst, pace_s = pace or FAST
        try:
            yield Desk(api, client, int(burst), pace_s)
        finally:
            await client.close()
            assert api.rejected == []


def said(text: str, subject: str = "", *, pods: tuple[PodRef, ...] = (), found: bool = False) -> Happening:
    return Happening(reason=Reason.CLAIM_REFUSED, subject=subject or text, note=text, pods=pods, found=found)


# ---------------------------------------------------------------- one Event


async def test_a_happening_is_one_event_on_each_of_its_pods_and_else_on_the_node(tmp_path: Path) -> None:
    """With the reason, the action and the type of its kind; `kubectl describe` finds it by the UID."""
    other = PodRef("trading", "book-1", "uid-book-1")
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("cannot prepare claim trading/c", pods=(POD, other)))
        one.recorder.report(drift("pod 77", ["cpuset.cpus", "cpuset.cpus"], None))
        pods_and_node = await one.events(3)
    first, second, third = pods_and_node
    named = {"apiVersion": "v1", "kind": "Pod", "namespace": "trading", "name": "book-0", "uid": "uid-book-0"}
    assert first["regarding"] == named
    assert second["regarding"]["name"] == "book-1"
    assert (first["reason"], first["action"], first["type"]) == ("ClaimRefused", "PrepareClaim", "Warning")
    assert third["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": NODE, "uid": NODE}
    assert (third["reason"], third["type"]) == ("DriftRepaired", "Normal")
    assert third["note"] == "another process changed cpuset.cpus of pod 77; repaired"
    assert {one["reportingInstance"] for one in pods_and_node} == {NODE}


def test_every_reason_is_camel_case_and_has_an_action() -> None:
    assert RULES.keys() == {*Reason}
    assert all(one.isalnum() and one[0].isupper() for one in (*Reason, *(rule.action for rule in RULES.values())))


async def test_a_note_is_never_too_long_and_a_name_always_one(tmp_path: Path) -> None:
    """Also of an id that is no text."""
    pod = PodRef("ns", "n." * 120 + "pod", "uid")
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("usb-\udcff " + "ü" * 900, pods=(pod,)))
        (event,) = await one.events(1)
    assert len(event["note"].encode()) <= 1024
    assert len(event["metadata"]["name"]) <= 253


# ---------------------------------------------------------------- repetitions


async def test_what_repeats_is_counted_in_one_event_and_seldom_written(tmp_path: Path) -> None:
    """Kubelet asks again every few seconds: the API server learns of it every SERIES_S, with how often and when."""
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("no CPU is free"))
        await one.events(1)
        for _ in range(40):
            one.now_s += 2
            one.recorder.report(said("no CPU is free"))
        one.recorder.report(said("other"))
        await one.events(2)
        assert one.api.count("apply", STORED) == 0
        one.now_s += SERIES_S
        one.recorder.report(said("no CPU is free"))
        await one.until(lambda: one.api.count("apply", STORED) == 1)
        event = next(event for event in await one.events(2) if event["note"] == "no CPU is free")
    assert event["series"]["count"] == 42
    assert event["series"]["lastObservedTime"] > event["eventTime"]


async def test_nothing_is_written_while_nothing_happens(tmp_path: Path) -> None:
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("once"))
        await one.events(1)
        one.now_s += 2 * SERIES_S
        one.recorder.report(said("later"))
        await one.events(2)
        assert [seen.verb for seen in one.api.requests] == ["create", "create"]


async def test_of_what_waits_about_one_subject_the_newest_is_written(tmp_path: Path) -> None:
    async with desk(tmp_path, 1, 0.2) as one, one.serving():
        one.recorder.report(said("device is unhealthy", "a"))
        await one.events(1)
        for text in ("device is healthy", "device is unhealthy", "device is unhealthy", "device is healthy"):
            one.recorder.report(said(text, "a"))
        one.recorder.report(said("another is unhealthy", "b"))
        found = await one.events(3)
    assert [event["note"] for event in found] == ["device is unhealthy", "device is healthy", "another is unhealthy"]
    assert not any("series" in event for event in found)


async def test_a_state_that_comes_back_is_written_at_once_with_its_count(tmp_path: Path) -> None:
    """Otherwise the newest Event would say the opposite."""
    async with desk(tmp_path) as one, one.serving():
        for number, text in enumerate(("unhealthy", "healthy"), 1):
            one.recorder.report(said(text, "device"))
            await one.events(number)
        one.recorder.report(said("unhealthy", "device"))
        await one.until(lambda: any("series" in event for event in one.api.objects(STORED)))
        found = await one.events(2)
    assert [(event["note"], event.get("series", {}).get("count")) for event in found] == [
        ("healthy", None),
        ("unhealthy", 2),
    ]


async def test_a_restarted_agent_counts_on_and_reports_no_state_twice(tmp_path: Path) -> None:
    async with desk(tmp_path) as one:
        async with one.serving():
            one.recorder.report(said("a refusal"))
            one.recorder.report(said("a state"))
            await one.events(2)
        one.restarted()
        async with one.serving():
            one.recorder.report(said("a state", found=True))
            one.recorder.report(said("a refusal"))
            await one.until(lambda: any("series" in event for event in one.api.objects(STORED)))
            found = {event["note"]: event.get("series", {}).get("count") for event in await one.events(2)}
            assert found == {"a state": None, "a refusal": 2}
            one.now_s += SERIES_S
            one.recorder.report(said("a state"))
            await one.until(lambda: all("series" in event for event in one.api.objects(STORED)))
            found = {event["note"]: event["series"]["count"] for event in await one.events(2)}
    assert found == {"a state": 2, "a refusal": 2}


async def test_an_event_that_the_api_server_has_forgotten_is_created_again(tmp_path: Path) -> None:
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("a refusal"))
        (event,) = await one.events(1)
        one.api.delete(STORED, event["metadata"]["name"], "default")
        one.now_s += SERIES_S
        one.recorder.report(said("a refusal"))
        (again,) = await one.events(1)
    assert again["series"]["count"] == 2


# ---------------------------------------------------------------- bad days


@pytest.mark.parametrize(
    "fault", [Fault(kind="close"), Fault(status=500), Fault(kind="garbage"), Fault(status=429, retry_after_s=60)]
)
async def test_what_cannot_be_written_waits_and_is_in_the_notes(tmp_path: Path, fault: Fault) -> None:
    async with desk(tmp_path) as one, one.serving():
        one.api.answers.append(fault)
        with capture_logs() as lines:
            one.recorder.report(said("first"))
            await until(lambda: bool(one.recorder.notes()))
            one.recorder.report(said("second"))
            (note,) = one.recorder.notes()
            assert note.startswith(
                "Events cannot be written at present; waiting: 2; cause: cannot create events in default at "
            )
            one.now_s += 60
            one.recorder.report(said("third"))
            found = await one.events(3)
        assert [event["note"] for event in found] == ["first", "second", "third"]
        assert [line["event"] for line in lines] == ["event-not-written"]
        await until(lambda: one.recorder.notes() == [])


async def test_a_server_that_hangs_delays_nothing_but_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "DEADLINE_S", 0.05)
    async with desk(tmp_path) as one, one.serving():
        one.api.answers.append(Fault(kind="hang"))
        one.recorder.report(said("first"))
        await until(lambda: bool(one.recorder.notes()))
        assert one.recorder.notes()[0].endswith("the API server did not answer within 0.05 s")
        monkeypatch.undo()
        one.now_s += 60
        one.recorder.report(said("second"))
        await one.events(2)


async def test_without_the_right_to_write_events_nothing_is_lost_and_hardly_asked(tmp_path: Path) -> None:
    async with desk(tmp_path) as one, one.serving():
        for resource in (STORED, CORE_EVENTS):
            one.api.fail(403, resource=resource)
        one.recorder.report(said("first"))
        await until(lambda: bool(one.recorder.notes()))
        for number in range(5):
            one.recorder.report(said(f"more {number}"))
        one.recorder.report(said("in another namespace", pods=(POD,)))
        await one.events(1)
        assert len(one.api.requests) == 3
        one.now_s += NOT_ALLOWED_S
        one.recorder.report(said("last"))
        await one.events(8)


async def test_only_the_right_to_create_is_missing_nothing_but_counts(tmp_path: Path) -> None:
    """As with the ClusterRole of an earlier version."""
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("first"))
        await one.events(1)
        for resource in (STORED, CORE_EVENTS):
            one.api.fail(403, verb="apply", resource=resource)
        one.now_s += SERIES_S
        one.recorder.report(said("first"))
        await until(lambda: bool(one.recorder.notes()))
        one.recorder.report(said("second"))
        await one.events(2)


async def test_credentials_of_kubelet_may_write_events_of_the_core_group_alone(tmp_path: Path) -> None:
    async with desk(tmp_path) as one, one.serving():
        one.api.fail(403, times=9, resource=STORED)
        one.recorder.report(said("a refusal"))
        await one.until(lambda: bool(one.api.objects(CORE_EVENTS)))
        one.now_s += SERIES_S
        one.recorder.report(said("a refusal"))
        await one.until(lambda: "series" in one.api.objects(CORE_EVENTS)[0])
        (event,) = one.api.objects(CORE_EVENTS)
    assert (event["message"], event["involvedObject"]["name"]) == ("a refusal", NODE)
    assert event["series"]["count"] == 2


async def test_an_event_in_a_namespace_that_is_gone_delays_no_other(tmp_path: Path) -> None:
    async with desk(tmp_path) as one, one.serving():
        one.api.fail(404)
        one.recorder.report(said("gone", pods=(POD,)))
        one.recorder.report(said("here"))
        await one.events(1)
        assert one.recorder.notes()[0].startswith(
            "Events never written since the agent started: 1; the last one refused: cannot create events in trading"
        )


async def test_an_event_that_always_fails_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    """As in a namespace with a broken webhook, where kubelet has the same thing refused again and again."""
    async with desk(tmp_path) as one, one.serving():
        one.api.fail(500)
        one.recorder.report(said("broken", pods=(POD,)))
        await until(lambda: bool(one.recorder.notes()))
        one.recorder.report(said("here"))
        one.api.fail(500)
        one.now_s += 60
        one.recorder.report(said("broken", pods=(POD,)))
        await until(lambda: one.recorder._failures == 2)
        one.now_s += 60
        one.recorder.report(said("broken", pods=(POD,)))
        await one.events(2)
        assert [request.namespace for request in one.api.requests] == ["trading", "trading", "default", "trading"]


async def test_one_happening_is_reported_on_a_few_pods_at_most(tmp_path: Path) -> None:
    """A device that 256 pods share does not take the places of what else waits."""
    pods = tuple(PodRef("trading", f"book-{number}", f"uid-{number}") for number in range(256))
    async with desk(tmp_path) as one, one.serving():
        one.recorder.report(said("lost", pods=pods))
        one.recorder.report(said("here"))
        assert len(await one.events(MOST_PODS + 1)) == MOST_PODS + 1
        assert one.recorder.notes() == []


async def test_an_event_whose_answer_is_lost_is_counted_once(tmp_path: Path) -> None:
    async with desk(tmp_path) as one, one.serving():
        one.api.answers.append(Fault(kind="close", done=True))
        one.recorder.report(said("first"))
        await until(lambda: bool(one.recorder.notes()))
        one.now_s += 60
        one.recorder.report(said("second"))
        first, _ = await one.events(2)
        await until(lambda: one.recorder.notes() == [])
        assert "series" not in first
        one.now_s += SERIES_S
        one.recorder.report(said("first"))
        await one.until(lambda: any(event.get("series") for event in one.api.objects(STORED)))
        (counted,) = (event["series"]["count"] for event in one.api.objects(STORED) if event.get("series"))
        assert counted == 2


async def test_too_many_and_too_old_events_are_dropped_and_counted(tmp_path: Path) -> None:
    async with desk(tmp_path) as one:
        for number in range(MOST_WAITING + 5):
            one.recorder.report(said(f"refusal {number}"))
        assert one.recorder.notes() == ["Events never written since the agent started: 5"]
        one.now_s += STALE_S + 1
        one.recorder.report(said("new"))
        async with one.serving():
            (event,) = await one.events(1)
        assert event["note"] == "new"
        assert one.recorder.notes() == [f"Events never written since the agent started: {MOST_WAITING + 5}"]


def test_what_was_written_long_ago_takes_no_memory() -> None:
    """Whether it was replaced while it was being written or not."""
    now_s = [10_000.0]
    queue = EventQueue(NODE, DRIVER, lambda: now_s[0], lambda: now_s[0])
    for number in range(3 * MOST_KNOWN):
        queue.add(said(f"refusal {number}", f"claim {number}"))
        one, _ = queue.next()
        assert one is not None
        if number % 2:
            queue.add(said(f"another {number}", f"claim {number}"))
        queue.wrote(one, 1, now_s[0])
        while (one := queue.next()[0]) is not None:
            queue.wrote(one, one.count, now_s[0])
    assert len(queue._known) <= MOST_KNOWN + 1
    now_s[0] += STALE_S + 1
    queue.add(said("new"))
    queue.next()
    assert len(queue._known) == 1 and len(queue._last) == 0 and len(queue) == 1


async def test_events_that_are_switched_off_are_not_written(tmp_path: Path) -> None:
    async with desk(tmp_path) as one:
        one.recorder.report(said("before"))
        one.recorder.enable(False)
        one.recorder.report(said("meanwhile"))
        one.recorder.enable(True)
        one.recorder.report(said("after"))
        async with one.serving():
            (event,) = await one.events(1)
    assert event["note"] == "after"


def test_the_pace_allows_a_burst_and_then_one_at_a_time() -> None:
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


# ---------------------------------------------------------------- states of the node


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    tree = DeviceTree(tmp_path)
    for address in (A, B, SPARE):
        tree.pci(address)
    return tree


class Watched(Desk):
    """An agent two of whose adapters are held, and what else is known of its node."""

    node: HealthNode
    manager: EventsManager
    known: dict[str, Any]

    def look(self) -> Node:
        agent = self.node.agent
        return Node(inventory=agent.inventory, ledger=agent.ledger, health=agent.health, **self.known)

    def see(self, device: str, state: str, reason: str = "") -> None:
        self.node.agent.observe([Evidence(device=device, source="carrier", state=state, reason=reason)])
        self.manager.look()

    def heal(self, device: str) -> None:
        self.see(device, HEALTHY)
        self.node.now_s += 30
        self.node.agent.recover_due()
        self.manager.look()

    def rescan(self) -> None:
        self.node.rescan()
        self.manager.look()

    async def reads(self, **known: Any) -> tuple[str, str, str]:
        """Type, reason and note of the one Event that follows when something else is known."""
        before = len(self.api.objects(STORED))
        self.known |= known
        self.manager.look()
        event = (await self.events(before + 1))[-1]
        return event["type"], event["reason"], event["note"]


@contextlib.asynccontextmanager
async def watched(tree: DeviceTree, **config: Any) -> AsyncIterator[Watched]:
    async with health_node(tree, every=[]) as node, FakeApiServer() as api:
        (offer,) = offers(CONFIG, builtin_kinds())
        await node.agent.allocate(offer.resource, [[A], [B]], offer.edits, "op")
        client = LazyApi(api.kubeconfig(tree.root))
        one = Watched(api, client, int(FAST[0]), FAST[1])
        one.node, one.known = node, {}
        one.manager = EventsManager(
            one.recorder, one.look, lambda uid: None, Revision(), configured=True, clock=lambda: one.now_s
        )
        await one.manager.apply(msgspec.convert({"events": config}, Config))
        one.manager.look()
        one.now_s += START_S
        try:
            async with one.serving():
                yield one
        finally:
            await client.close()
            assert api.rejected == []


async def test_each_change_of_a_device_that_is_held_is_one_event_on_the_node(tree: DeviceTree) -> None:
    """With the device, the cause in the words of its health, and who holds it; nothing of a device that is not held."""
    async with watched(tree) as one:
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
    assert [event["note"] for event in found] == [
        f"device {A} is unhealthy: no carrier on eth1; held by {HOLDER}",
        f"device {B} is unknown: eth2 is dormant; held by {HOLDER}",
        f"device {A} is healthy; held by {HOLDER}",
    ]


async def test_a_device_that_is_lost_and_comes_back_is_reported_as_such(tree: DeviceTree) -> None:
    """Not as healthy while it is away."""
    async with watched(tree) as one:
        one.see(A, UNHEALTHY, "no carrier on eth1")
        await one.events(1)
        link = tree.root / f"sys/bus/pci/devices/{A}"
        where = link.readlink()
        link.unlink()
        one.rescan()
        await one.events(2)
        link.symlink_to(where)
        one.rescan()
        found = await one.events(3)
    assert [event["reason"] for event in found] == ["DeviceUnhealthy", "DeviceLost", "DeviceReturned"]
    assert found[1]["note"] == f"device {A} is no longer there; held by {HOLDER}"


async def test_conflicts_the_ledger_and_the_configuration_are_reported_when_they_change(tree: DeviceTree) -> None:
    """On the Node, both ways; what is good at the start is no news."""
    async with watched(tree) as one:
        one.known["refused"] = {"nodeagent.dev/gpu": ""}
        one.manager.look()
        refused = await one.reads(refused={"nodeagent.dev/gpu": "another device plugin offers gpu-0"})
        assert refused[1:] == (
            "ResourceNotServed",
            "resource nodeagent.dev/gpu is not served: another device plugin offers gpu-0",
        )
        assert (await one.reads(refused={"nodeagent.dev/gpu": ""}))[:2] == ("Normal", "ResourceServed")
        assert (await one.reads(conflicts=["kubelet reserves CPUs 0"]))[:2] == ("Warning", "KubeletConflict")
        assert (await one.reads(not_exclusive="CPUs 2 are not"))[1] == "CPUsNotExclusive"
        assert (await one.reads(not_exclusive=""))[1] == "CPUsExclusive"
        assert (await one.reads(loss="the file was damaged"))[:2] == ("Warning", "LedgerIncomplete")
        assert (await one.reads(loss=""))[:2] == ("Normal", "LedgerRebuilt")
        assert (await one.reads(replaced=["moved aside"]))[1:] == ("LedgerReplaced", "moved aside")
        assert (await one.reads(config_error="bad key"))[1] == "ConfigurationRefused"
        assert (await one.reads(config_error=""))[1] == "ConfigurationApplied"


async def test_events_can_be_switched_off(tree: DeviceTree) -> None:
    async with watched(tree, enabled=False) as one:
        one.see(A, UNHEALTHY, "no carrier on eth1")
        await one.manager.apply(Config())
        one.see(B, UNHEALTHY, "no carrier on eth2")
        found = await one.events(2)
    assert len(found) == 2, "what is bad when they are switched on is reported"


async def test_without_an_api_server_nothing_is_kept_or_asked(tmp_path: Path) -> None:
    async with desk(tmp_path) as one:
        manager = EventsManager(
            one.recorder, lambda: pytest.fail("looked"), lambda uid: None, Revision(), configured=False
        )
        await manager.apply(Config())
        one.recorder.report(said("a refusal"))
        await asyncio.wait_for(asyncio.gather(manager.serve(), manager.lead()), WAIT_S)
        assert one.api.requests == [] and manager.notes() == []
    assert not is_configured("", {})
    assert is_configured("/etc/kubernetes/kubelet.conf", {})
    assert is_configured("", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
