"""The NRI plugin against a runtime that comes late, restarts, hangs up, is old, is slow, and lists in parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodeagent.core.model.container import RUNNING, UNKNOWN, Adjustment, Container, Pod, Resources, Update
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import ConfigError, HostError, InputError, Refused
from nodeagent.nri.plugin import NriPlugin, NriTiming
from nodeagent.nri.service import event_mask
from nodeagent.nri.translation import page_bytes, page_name, read_container, read_pod, write_update
from nodeagent.pb import nri_pb2 as pb
from nodeagent.telemetry import metrics
from tests.doubles.runtime import ContractViolation, FakeRuntime, PluginRefusedError
from tests.support.until import News

QUICK = NriTiming(first_retry_s=0.01, last_retry_s=0.05)


class Desk:
    """A handler that pins what is named "exclusive-N" to CPU N and all others to the rest of eight."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.known: dict[str, Container] = {}
        self.pods: Sequence[Pod] = ()
        self.resources = Resources()
        self.fails: Exception | None = None
        self.hangs = False
        self.now_s, self.takes_s = 0.0, 0.0
        """What the plugin's clock says, and by how much each question moves it."""

    def clock(self) -> float:
        return self.now_s

    @property
    def shared(self) -> CpuSet:
        taken = {int(one.name.split("-")[1]) for one in self.known.values() if one.name.startswith("exclusive")}
        return CpuSet(set(range(8)) - taken)

    def confined(self) -> list[Update]:
        shared = self.shared
        return [Update(container_id=id, cpus=shared) for id, one in self.known.items() if one.name[0] != "e"]

    async def note(self, what: str) -> None:
        self.seen.append(what)
        self.now_s += self.takes_s
        if self.fails is not None:
            raise self.fails
        if self.hangs:
            await asyncio.Event().wait()

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> Sequence[Update]:
        self.pods, self.known = pods, {one.id: one for one in containers}
        await self.note("synchronize")
        return self.confined()

    async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
        await self.note(f"create {pod.name}/{container.name}")
        self.known[container.id] = container
        if not container.name.startswith("exclusive"):
            return Adjustment(cpus=self.shared), ()
        own = CpuSet([int(container.name.split("-")[1])])
        env = {"NODEAGENT_CPUS": str(own)}
        return Adjustment(cpus=own, mems=CpuSet([0]), hugepage_limits={2 << 20: 4 << 20}, env=env), self.confined()

    async def update(self, pod: Pod, container: Container, resources: Resources) -> Sequence[Update]:
        self.resources = resources
        await self.note(f"update {container.name}")
        return [Update(container_id=container.id, cpus=self.shared)]

    async def stopped(self, pod: Pod, container: Container) -> Sequence[Update]:
        self.known.pop(container.id, None)
        await self.note(f"stopped {container.name}")
        return self.confined()

    async def removed(self, pod: Pod, container: Container) -> None:
        await self.note(f"removed {container.name}")


class CuriousDesk(Desk):
    """One that is notified of everything."""

    async def starting(self, pod: Pod, container: Container, within_s: float) -> None:
        await self.note(f"starting {container.name}")

    async def started(self, pod: Pod, container: Container) -> None:
        await self.note(f"started {container.name}")

    async def pod_started(self, pod: Pod) -> None:
        await self.note(f"pod started {pod.name}")

    async def pod_stopped(self, pod: Pod) -> None:
        await self.note(f"pod stopped {pod.name}")

    async def pod_removed(self, pod: Pod) -> None:
        await self.note(f"pod removed {pod.name}")


class Changes:
    """Counts the calls of on_change, and lets a test wait for what they bring."""

    def __init__(self) -> None:
        self.count = 0
        self._news = News()

    def __call__(self) -> None:
        self.count += 1
        self._news.tell()

    async def until(self, holds: Callable[[], bool]) -> None:
        await self._news.until(holds)


@contextlib.asynccontextmanager
async def running(plugin: NriPlugin) -> AsyncIterator[NriPlugin]:
    """The plugin at work; it must have no error when it ends."""
    task = asyncio.create_task(plugin.run())
    try:
        yield plugin
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def plugin_at(
    socket: Path, desk: Desk, on_change: Callable[[], None] = lambda: None, pace: NriTiming = QUICK
) -> NriPlugin:
    return NriPlugin(socket, "nodeagent", "10", desk, pace=pace, on_change=on_change, clock=desk.clock)


def counted(name: str, **labels: str) -> float:
    """What a counter says."""
    return metrics.REGISTRY.get_sample_value(f"nodeagent_nri_{name}_total", labels) or 0.0


async def test_an_exclusive_container_gets_its_cpus_and_the_others_leave_them_in_the_same_answer(folder: Path) -> None:
    desk = Desk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        runtime.add("old")
        await runtime.connected()
        assert runtime.cpus("old") == "0-7"
        await runtime.create("web", pod="other")
        answer = await runtime.create("exclusive-3")
        assert (runtime.cpus("exclusive-3"), runtime.cpus("web"), runtime.cpus("old")) == ("3", "0-2,4-7", "0-2,4-7")
        assert answer.adjust.linux.resources.cpu.mems == "0"
        assert [(one.page_size, one.limit) for one in answer.adjust.linux.resources.hugepage_limits] == [
            ("2MB", 4 << 20)
        ]
        assert [(one.key, one.value) for one in answer.adjust.env] == [("NODEAGENT_CPUS", "3")]
        await runtime.stop_container("exclusive-3")
        assert (runtime.cpus("web"), runtime.cpus("old")) == ("0-7", "0-7")
        await runtime.remove_container("exclusive-3")
        assert desk.seen == [
            "synchronize",
            "create other/web",
            "create pod/exclusive-3",
            "stopped exclusive-3",
            "removed exclusive-3",
        ]


async def test_what_the_runtime_says_of_a_container_arrives(folder: Path) -> None:
    desk = Desk()
    async with FakeRuntime(folder) as runtime:
        container = runtime.add(
            "db", pod="data", cpus="0-3,8", env=["A=1", "B=x=y", "A=2", "ODD"], annotations={"k": "v"}, pid=77
        )
        container.linux.resources.cpu.mems = "1"
        container.linux.resources.cpu.quota.value = 50_000
        container.linux.resources.cpu.period.value = 100_000
        container.linux.resources.hugepage_limits.add(page_size="1GB", limit=2 << 30)
        runtime.pods["sandbox-data"].linux.cgroup_parent = "/kubepods/uid-data"
        runtime.pods["sandbox-data"].annotations["p"] = "q"
        async with running(plugin_at(runtime.socket, desk)):
            await runtime.connected()
    assert list(desk.known.values()) == [
        Container(
            id="id-db",
            pod_id="sandbox-data",
            pod_uid="uid-data",
            namespace="default",
            pod_name="data",
            name="db",
            state=RUNNING,
            env={"A": "2", "B": "x=y", "ODD": ""},
            annotations={"k": "v"},
            cgroup_path="/kubepods/uid-data/id-db",
            resources=Resources(
                cpus=CpuSet.parse("0-3,8"),
                mems=CpuSet([1]),
                hugepage_limits={1 << 30: 2 << 30},
            ),
            pid=77,
        )
    ]
    assert list(desk.pods) == [
        Pod(
            id="sandbox-data",
            uid="uid-data",
            namespace="default",
            name="data",
            annotations={"p": "q"},
            cgroup_parent="/kubepods/uid-data",
        )
    ]


async def test_a_long_list_comes_in_parts(folder: Path) -> None:
    """A container may come before its pod; updates go with the answer to the last part."""
    desk = Desk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        runtime.chunk = 7
        for number in range(40):
            runtime.add(f"c{number}", pod=f"p{number}")
        runtime.pods = dict(reversed(runtime.pods.items()))
        await runtime.connected()
        assert len(desk.known) == len(desk.pods) == 40
        assert all(one.pod_uid == f"uid-{one.pod_name}" for one in desk.known.values())
        assert {runtime.cpus(f"c{number}") for number in range(40)} == {"0-7"}


async def test_a_container_whose_pod_is_not_listed_is_seen_without_it(folder: Path) -> None:
    desk = Desk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        runtime.add("lost")
        runtime.pods.clear()
        await runtime.connected()
        assert (desk.known["id-lost"].pod_id, desk.known["id-lost"].pod_uid) == ("sandbox-pod", "")


async def test_only_what_the_handler_hears_is_asked_for(folder: Path) -> None:
    assert event_mask(Desk()) == 0b110_1000_1000
    desk = CuriousDesk()
    assert event_mask(desk) == 0b110_1110_1111
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        await runtime.connected()
        await every_event(runtime)
    assert desk.seen[1:] == EVERYTHING


async def test_an_old_runtime_tells_of_changes_of_state(folder: Path) -> None:
    desk = CuriousDesk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        runtime.old = True
        await runtime.connected()
        await every_event(runtime)
    assert desk.seen[1:] == EVERYTHING


async def every_event(runtime: FakeRuntime) -> None:
    runtime.add("web")
    await runtime.pod_event(pb.RUN_POD_SANDBOX, "pod")
    await runtime.create("web")
    await runtime.start_container("web")
    await runtime.stop_container("web")
    await runtime.remove_container("web")
    await runtime.pod_event(pb.STOP_POD_SANDBOX, "pod")
    await runtime.pod_event(pb.REMOVE_POD_SANDBOX, "pod")


EVERYTHING = [
    "pod started pod",
    "create pod/web",
    "starting web",
    "started web",
    "stopped web",
    "removed web",
    "pod stopped pod",
    "pod removed pod",
]


async def test_a_refused_container_is_not_created_and_the_reason_is_said(folder: Path) -> None:
    desk, changes = Desk(), Changes()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        await runtime.connected()
        await changes.until(lambda: plugin.standing.connected)
        desk.fails = Refused(
            "cannot place 2 CPUs: 1 is free", want=2, free=1, unit="CPUs", would_admit="asking for 1 would fit"
        )
        before = changes.count
        with pytest.raises(PluginRefusedError, match=r"^cannot place 2 CPUs: 1 is free; asking for 1 would fit$"):
            await runtime.create("web")
        assert not runtime.containers
        assert (plugin.standing.failed, changes.count) == (1, before + 1)


async def test_a_decision_that_cannot_be_written_refuses_the_container(folder: Path) -> None:
    """An empty set would mean "no change" on the wire: the container would run anywhere."""

    class Empty(Desk):
        async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
            return Adjustment(cpus=CpuSet()), ()

    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, Empty())):
        await runtime.connected()
        with pytest.raises(PluginRefusedError, match="cannot confine new container: its set of CPUs is empty"):
            await runtime.create("web")


async def test_a_late_decision_refuses_the_container_before_the_runtime_drops_the_plugin(folder: Path) -> None:
    desk = Desk()
    async with (
        FakeRuntime(folder, request_timeout_s=0.4) as runtime,
        running(plugin_at(runtime.socket, desk)) as plugin,
    ):
        await runtime.connected()
        desk.hangs = True
        with pytest.raises(PluginRefusedError, match=r"not decided within 0\.36 s"):
            await runtime.create("web")
        desk.hangs = False
        await runtime.create("web")
        assert (runtime.connections, plugin.standing.failed) == (1, 1)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
async def test_a_pod_that_must_not_start_does_not(folder: Path, old: bool) -> None:
    desk = CuriousDesk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        runtime.old = old
        runtime.add("web")
        await runtime.connected()
        desk.fails = HostError("cannot move interface ens7 into pod default/pod: hostNetwork")
        with pytest.raises(PluginRefusedError, match=r"^cannot move interface ens7 into pod default/pod: hostNetwork$"):
            await runtime.pod_event(pb.RUN_POD_SANDBOX, "pod")
        desk.fails = None
        await runtime.pod_event(pb.RUN_POD_SANDBOX, "pod")


@pytest.mark.parametrize(
    ("own", "network", "on_host"),
    [
        ([("pid", ""), ("network", "/run/netns/a")], "/run/netns/a", False),
        ([("network", "")], "", False),
        ([("pid", ""), ("ipc", "")], "", True),
        ([], "", False),
    ],
    ids=["named", "of-the-process", "host-network", "runtime-lists-none"],
)
def test_the_network_of_a_pod_is_its_own_unless_the_runtime_lists_others_alone(
    own: list[tuple[str, str]], network: str, on_host: bool
) -> None:
    namespaces = [pb.LinuxNamespace(type=kind, path=path) for kind, path in own]
    found = read_pod(pb.PodSandbox(id="s", pid=7, linux=pb.LinuxPodSandbox(namespaces=namespaces)))
    assert (found.network, found.on_host_network, found.pid) == (network, on_host, 7)


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
async def test_any_other_failure_is_logged_and_changes_nothing(folder: Path, hangs: bool) -> None:
    """An error would keep containers from being stopped and removed."""
    desk = CuriousDesk()
    async with (
        FakeRuntime(folder, request_timeout_s=0.8 if hangs else 2.0) as runtime,
        running(plugin_at(runtime.socket, desk)) as plugin,
    ):
        await runtime.connected()
        await runtime.create("web")
        desk.fails, desk.hangs = (None, True) if hangs else (KeyError("bug"), False)
        with capture_logs() as lines:
            await runtime.started("web")
            await runtime.resize("web", pb.LinuxResources(cpu=pb.LinuxCPU(cpus="0-1")))
            assert runtime.cpus("web") == "0-1"
            await runtime.stop_container("web")
            await runtime.remove_container("web")
            await runtime.pod_event(pb.STOP_POD_SANDBOX, "pod")
        said = [(line["call"], line.get("pod")) for line in lines if line["event"] == "nri-call-failed"]
        calls = ["started", "update", "stopped", "removed", "pod_stopped"]
        assert said == [(call, "default/pod") for call in calls]
        assert (runtime.connections, plugin.standing.failed) == (1, 5)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
async def test_a_container_that_must_not_start_does_not(folder: Path, old: bool) -> None:
    """It is there by then, and nothing of it has run."""
    desk = CuriousDesk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        runtime.old = old
        await runtime.connected()
        await runtime.create("web")
        desk.fails = HostError("cannot start container default/pod/web: it is not confined")
        with pytest.raises(PluginRefusedError, match="cannot start container default/pod/web: it is not confined"):
            await runtime.start_container("web")
        assert runtime.containers["id-web"].state == pb.CONTAINER_CREATED


async def test_a_synchronization_that_fails_leaves_the_plugin_connected(folder: Path) -> None:
    """New containers are still asked about."""
    desk = Desk()
    desk.fails = RuntimeError("no ledger")
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)) as plugin:
        await runtime.connected()
        desk.fails = None
        await runtime.create("web")
        assert (runtime.cpus("web"), plugin.standing.failed) == ("0-7", 1)


async def test_kubelet_s_resize_is_heard_and_the_cpus_stay_ours(folder: Path) -> None:
    desk = Desk()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk)):
        await runtime.connected()
        await runtime.create("exclusive-1")
        await runtime.create("web")
        cpu = pb.LinuxCPU(cpus="0-7", quota=pb.OptionalInt64(value=-1), period=pb.OptionalUInt64(value=100_000))
        await runtime.resize("web", pb.LinuxResources(cpu=cpu))
        assert desk.resources == Resources(cpus=CpuSet(range(8)))
        assert runtime.cpus("web") == "0,2-7"


async def test_updates_of_a_thousand_containers_fit_into_the_runtime_s_buffers(folder: Path) -> None:
    names = [f"{number:064x}" for number in range(1000)]
    async with FakeRuntime(folder) as runtime:
        for name in names:
            runtime.add(name)
        async with running(plugin_at(runtime.socket, Desk())):
            await runtime.connected()
            assert {runtime.cpus(name) for name in names} == {"0-7"}


async def test_a_runtime_may_come_late(folder: Path) -> None:
    """The state says what is missing; it is said once in the log, and told once."""
    changes = Changes()
    runtime = FakeRuntime(folder)
    with capture_logs() as lines:
        async with running(plugin_at(runtime.socket, Desk(), changes)) as plugin:
            missing = f"cannot connect to {runtime.socket}: No such file or directory"
            await changes.until(lambda: plugin.standing.reason == missing)
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as stale:
                stale.bind(str(runtime.socket))
                await changes.until(lambda: plugin.standing.reason.endswith("Connection refused"))
            async with runtime:
                await runtime.connected()
                await changes.until(lambda: plugin.standing.connected)
                found = plugin.standing
                assert (found.runtime, found.version, found.reason, found.failed) == ("containerd", "2.0", "", 0)
    assert [line["error"] for line in lines if line["event"] == "runtime-not-connected"] == [
        missing,
        f"cannot connect to {runtime.socket}: Connection refused",
    ]
    assert changes.count <= 6


async def test_a_runtime_restarted_thirty_times_is_always_connected_again(folder: Path) -> None:
    """Each time everything is listed again, and containers are asked about."""
    desk, changes = Desk(), Changes()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        for times in range(30):
            await runtime.connected(times + 1)
            await runtime.create(f"web-{times}")
            await runtime.stop()
            await changes.until(lambda: not plugin.standing.connected)
            await runtime.start()
        assert desk.seen.count("synchronize") >= 30
        assert plugin.standing.calls >= 90


async def test_a_connection_that_closes_at_any_moment_is_made_anew(folder: Path) -> None:
    """Before registration, inside a message, after it: whatever was read of it is forgotten."""
    path = folder / "nri.sock"
    closes_after = iter([b"", b"\0", b"\0\0\0\2\0\0\0\x0a\0\0", b"\xff" * 64, b"\0\0\0\1\0\0\0\x02ab", b"\0" * 4000])

    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = next(closes_after, None)
        if data is None:
            everything_tried.set()
        writer.write(data or b"")
        writer.close()

    everything_tried = asyncio.Event()
    changes = Changes()
    async with running(plugin_at(path, Desk(), changes)) as plugin:
        server = await asyncio.start_unix_server(rude, str(path))
        await everything_tried.wait()
        assert not plugin.standing.connected
        server.close()
        async with FakeRuntime(folder) as runtime:
            await runtime.connected()
            await changes.until(lambda: plugin.standing.connected)


async def test_a_runtime_that_says_nothing_is_given_up(folder: Path) -> None:
    """It accepts the connection and never answers."""
    changes = Changes()
    pace = NriTiming(first_retry_s=0.01, last_retry_s=0.05, registration_s=0.05)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as mute:
        mute.bind(str(folder / "nri.sock"))
        mute.listen()
        async with running(plugin_at(folder / "nri.sock", Desk(), changes, pace)) as plugin:
            await changes.until(lambda: "RegisterPlugin: DEADLINE_EXCEEDED" in plugin.standing.reason)


async def test_connected_means_synchronized(folder: Path) -> None:
    """A runtime may have to wait for its own pods first."""
    changes = Changes()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, Desk(), changes)) as plugin:
        runtime.synchronize_after = asyncio.Event()
        await changes.until(lambda: plugin.standing.reason == "configured, waiting to be synchronized")
        assert not plugin.standing.connected
        runtime.synchronize_after.set()
        await changes.until(lambda: plugin.standing.connected)


# A runtime that asks no more


async def test_a_runtime_that_never_synchronizes_is_connected_to_again_with_more_and_more_patience(
    folder: Path,
) -> None:
    """The reason is shown and counted; as soon as the runtime synchronizes, containers are asked about."""
    pace = NriTiming(first_retry_s=0.01, last_retry_s=0.01, synchronize_s=0.02, longest_synchronize_s=0.06)
    changes = Changes()
    before = counted("disconnects", reason="unsynchronized")
    async with FakeRuntime(folder) as runtime:
        runtime.synchronize_after = asyncio.Event()
        async with running(plugin_at(runtime.socket, Desk(), changes, pace)) as plugin:
            for within in ("0.02 s", "0.04 s", "0.06 s", "0.06 s"):
                why = f"cannot serve {runtime.socket}: the runtime did not synchronize the plugin within {within}"
                await changes.until(lambda why=why: plugin.standing.reason == why)  # type: ignore[misc]
                await changes.until(lambda why=why: plugin.standing.reason != why)  # type: ignore[misc]
            assert counted("disconnects", reason="unsynchronized") >= before + 4
            assert not plugin.standing.connected
            runtime.synchronize_after.set()
            await changes.until(lambda: plugin.standing.connected)
            await runtime.connected()
            await runtime.create("exclusive-3")
            assert runtime.cpus("exclusive-3") == "3"


async def test_a_runtime_that_gave_up_on_its_list_is_made_to_list_again(folder: Path) -> None:
    """It keeps the connection open and would never ask about a container again."""
    desk, changes = Desk(), Changes()
    before = counted("disconnects", reason="late"), counted("late_answers", method="Synchronize")
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        runtime.forgives_late, runtime.gives_up_s, desk.takes_s = True, {"Synchronize": 0.0}, 3.0
        await changes.until(lambda: "cannot answer Synchronize in time: it took 3 s" in plugin.standing.reason)
        assert runtime.forgotten and not plugin.standing.connected
        runtime.gives_up_s, desk.takes_s = {}, 0.0
        await changes.until(lambda: plugin.standing.connected)
        await runtime.connected()
        await runtime.create("exclusive-3")
        assert runtime.cpus("exclusive-3") == "3"
    after = counted("disconnects", reason="late"), counted("late_answers", method="Synchronize")
    assert after[0] - before[0] == after[1] - before[1] == len(runtime.forgotten)


async def test_a_container_that_was_answered_late_is_listed_at_once_on_a_new_connection(folder: Path) -> None:
    """The runtime has made it without an answer and closed the connection."""
    desk, changes = Desk(), Changes()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        await runtime.connected()
        runtime.forgives_late, runtime.gives_up_s, desk.takes_s = True, {"CreateContainer": 0.0}, 2.0
        with capture_logs() as lines:
            await runtime.create("web")
            assert runtime.cpus("web") == "" and runtime.plugin is None
            desk.takes_s = 0.0
            await runtime.connected(2)
            await changes.until(lambda: plugin.standing.connected)
        assert runtime.cpus("web") == "0-7"
        (said,) = [line["error"] for line in lines if line["event"] == "runtime-not-connected"]
        assert said == "cannot answer CreateContainer in time: it took 2 s, the runtime waits 2 s"


async def test_a_runtime_that_closes_while_it_waits_too_long_was_answered_late(folder: Path) -> None:
    """What it hung up on is named, though no answer was sent."""
    desk, changes = Desk(), Changes()
    before = counted("late_answers", method="StopContainer")
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        await runtime.connected()
        await runtime.create("web")
        runtime.forgives_late, runtime.gives_up_s = True, {"StopContainer": 0.02}
        desk.takes_s, desk.hangs = 1.9, True
        await runtime.stop_container("web")
        await changes.until(lambda: "StopContainer in time: there was none after 1.9 s" in plugin.standing.reason)
        desk.hangs, desk.takes_s = False, 0.0
        await changes.until(lambda: plugin.standing.connected)
    assert counted("late_answers", method="StopContainer") == before + 1


async def test_an_answer_within_the_time_limit_is_none_that_was_late(folder: Path) -> None:
    desk, changes = Desk(), Changes()
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        desk.takes_s = 1.8
        await changes.until(lambda: plugin.standing.connected)
        await runtime.connected()
        for name in ("a", "b", "c"):
            await runtime.create(name)
        assert runtime.connections == 1 and plugin.standing.connected


async def test_evidence_that_the_runtime_asks_no_more_makes_it_list_again(folder: Path) -> None:
    desk, changes = Desk(), Changes()
    before = counted("disconnects", reason="unasked")
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, desk, changes)) as plugin:
        plugin.reconnect("no runtime is connected yet")
        await changes.until(lambda: plugin.standing.connected)
        assert runtime.connections == 1
        runtime.add("unasked")
        with capture_logs() as lines:
            plugin.reconnect("container unasked started without a question")
            await changes.until(lambda: not plugin.standing.connected)
            await changes.until(lambda: plugin.standing.connected)
        why = f"cannot rely on {runtime.socket}: container unasked started without a question"
        assert [line["error"] for line in lines if line["event"] == "runtime-not-connected"] == [why]
        assert "id-unasked" in desk.known and counted("disconnects", reason="unasked") == before + 1


async def test_the_runtime_s_own_time_limits_are_learnt(folder: Path) -> None:
    changes = Changes()
    async with (
        FakeRuntime(folder, request_timeout_s=7.0) as runtime,
        running(plugin_at(runtime.socket, Desk(), changes)) as plugin,
    ):
        await changes.until(lambda: plugin.standing.connected)
        assert plugin._service is not None
        assert plugin._service.request_timeout_s == 7.0
        assert (plugin._registration_s, plugin._request_s) == (5.0, 7.0)


@pytest.mark.parametrize(("name", "index"), [("", "10"), ("a b", "10"), ("nodeagent", "1"), ("nodeagent", "٣٤")])
def test_a_name_that_no_runtime_takes_is_a_configuration_error(folder: Path, name: str, index: str) -> None:
    with pytest.raises(ConfigError, match="cannot register plugin"):
        NriPlugin(folder / "nri.sock", name, index, Desk())


def test_one_value_that_cannot_be_read_does_not_hide_the_container() -> None:
    odd = pb.Container(id="c1", name="odd", state=pb.CONTAINER_UNKNOWN)
    odd.linux.resources.cpu.cpus = "zero"
    odd.linux.resources.hugepage_limits.add(page_size="2Mi", limit=1)
    odd.linux.resources.hugepage_limits.add(page_size="2MB", limit=3)
    with capture_logs() as lines:
        found = read_container(odd, None)
    assert (found.state, found.resources) == (UNKNOWN, Resources(hugepage_limits={2 << 20: 3}))
    assert [line["container"] for line in lines] == ["c1", "c1"]
    assert "cannot read CPU list 'zero'" in lines[0]["error"]
    assert 'cannot read page size "2Mi"' in lines[1]["error"]


@pytest.mark.parametrize(
    ("size", "name"), [(64 << 10, "64KB"), (2 << 20, "2MB"), (32 << 20, "32MB"), (16 << 30, "16GB")]
)
def test_page_sizes_are_named_as_the_kernel_names_them(size: int, name: str) -> None:
    assert (page_name(size), page_bytes(name)) == (name, size)


@pytest.mark.parametrize(
    "update",
    [
        Update(container_id="c1", mems=CpuSet()),
        Update(container_id="c1", hugepage_limits={1000: 1}),
        Update(container_id="c1", hugepage_limits={2 << 20: -1}),
        Update(container_id="c1", hugepage_limits={2 << 20: 1 << 64}),
    ],
)
def test_what_cannot_be_meant_is_not_written(update: Update) -> None:
    with pytest.raises(InputError):
        write_update(update)


def test_an_update_without_a_change_names_the_container_only() -> None:
    assert write_update(Update(container_id="c1")) == pb.ContainerUpdate(
        container_id="c1", linux=pb.LinuxContainerUpdate(resources=pb.LinuxResources())
    )


async def test_the_runtime_of_these_tests_notices_what_containerd_does_not_allow(folder: Path) -> None:
    """An update of the container that is being created."""

    class Wrong(Desk):
        async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
            return Adjustment(), [Update(container_id=container.id, cpus=CpuSet([1]))]

    with pytest.raises(ContractViolation, match="update of id-web during its creation"):
        async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, Wrong())):
            await runtime.connected()
            await runtime.create("web")


async def test_a_creation_among_250_containers_is_answered_at_once(folder: Path) -> None:
    """Each answer changes all others. What is measured includes the runtime's side here."""
    async with FakeRuntime(folder) as runtime, running(plugin_at(runtime.socket, Desk())):
        for number in range(250):
            runtime.add(f"c{number}", env=[f"VARIABLE_{n}=some value" for n in range(40)])
        await runtime.connected()
        took_s = []
        for _ in range(20):
            begin = time.perf_counter()
            answer = await runtime.create("exclusive-3")
            took_s.append(time.perf_counter() - begin)
            assert len(answer.update) == 250
            await runtime.stop_container("exclusive-3")
        assert sorted(took_s)[10] < 0.05


CONTAINERD = Path(os.environ.get("NODEAGENT_E2E_BIN", "/nonexistent")) / "containerd"
CONFIG = """
version = 3
root = "{0}/root"
state = "{0}/state"
[grpc]
  address = "{0}/containerd.sock"
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{0}"]
  conf_dir = "{0}"
[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "{0}/nri.sock"
  plugin_path = "{0}/plugins"
  plugin_config_path = "{0}/conf.d"
"""


@pytest.mark.skipif(not CONTAINERD.exists(), reason=f"no containerd: NODEAGENT_E2E_BIN has no {CONTAINERD}")
@pytest.mark.skipif(os.geteuid() != 0, reason="containerd needs root")
async def test_a_real_containerd_takes_the_plugin_again_after_a_kill(folder: Path) -> None:
    desk, changes = Desk(), Changes()
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder))
    async with running(plugin_at(folder / "nri.sock", desk, changes)) as plugin:
        for _ in range(2):
            with (folder / "log").open("ab") as log:
                daemon = await asyncio.create_subprocess_exec(
                    str(CONTAINERD), "-c", str(config), stdout=log, stderr=log
                )
            try:
                await changes.until(lambda: plugin.standing.connected)
                assert plugin.standing.runtime == "containerd"
            finally:
                daemon.kill()
                await daemon.wait()
            await changes.until(lambda: not plugin.standing.connected)
    assert desk.seen == ["synchronize"] * 2
