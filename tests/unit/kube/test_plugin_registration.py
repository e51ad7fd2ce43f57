"""The driver's sockets and registration, against a kubelet that restarts and refuses, and folders that go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.errors import ConfigError
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.plugin_registration import (
    DraPlugin,
    DraRegistration,
    PluginSockets,
    other_instance_serves,
    plugin_sockets,
    remove_stale,
)
from nodeagent.kube.kubelet.plugin_sockets import FURTHER_NAMES
from nodeagent.kube.kubelet.registration import FAILED, REGISTERED, WAITING
from nodeagent.pb import dra_v1_pb2
from nodeagent.pb import pluginregistration_pb2 as pb
from tests.doubles.dra_kubelet import HEALTH_V1, V1, V1BETA1, DraCallError, FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet
from tests.pb import dra_v1_pb2_grpc
from tests.pb import pluginregistration_pb2_grpc as rpc
from tests.support import channels
from tests.support.claim_desk import POOL, Desk, Vitals, ref
from tests.support.until import until as eventually

DRIVER = "nodeagent.dev"
OLD_UID, NEW_UID = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"


@pytest.fixture
def kubelet_dir(folder: Path) -> Path:
    return folder


def plugin(
    kubelet_dir: Path, desk: Desk | None = None, vitals: Vitals | None = None, uid: str = "", unasked_s: float = 60.0
) -> DraPlugin:
    vitals = vitals or Vitals(("gpu-0", HEALTHY))
    where = plugin_sockets(kubelet_dir, DRIVER, uid)
    return DraPlugin(
        DRIVER, where, desk or Desk(), vitals, poll_s=30.0, retry_s=0.02, unasked_s=unasked_s, heartbeat_s=0.5
    )


@contextlib.asynccontextmanager
async def running(one: DraPlugin) -> AsyncIterator[DraPlugin]:
    """The plugin at work; it must have no error when it ends."""
    task = asyncio.create_task(one.run())
    try:
        yield one
    finally:
        await end(task)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def until(one: DraPlugin, holds: Callable[[DraRegistration], bool], *, seconds: float = 10) -> DraRegistration:
    """The registration once it is like that."""
    seen = 0
    async with asyncio.timeout(seconds):
        while not holds(one.registration):
            seen = await one.changed(seen)
    return one.registration


@contextlib.contextmanager
def dead_socket(path: Path) -> Iterator[Path]:
    """What a killed process leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    yield path


@contextlib.contextmanager
def live_socket(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen()
        yield path


# Names


def test_sockets_are_where_kubelet_looks() -> None:
    """Named by the driver, and by the pod where there is one."""
    kubelet = Path("/var/lib/kubelet")
    assert replace(plugin_sockets(kubelet, DRIVER), further=()) == PluginSockets(
        registration=kubelet / "plugins_registry/nodeagent.dev-reg.sock",
        service=kubelet / "plugins/nodeagent.dev/dra.sock",
    )
    assert replace(plugin_sockets(kubelet, DRIVER, OLD_UID), further=()) == PluginSockets(
        registration=kubelet / f"plugins_registry/nodeagent.dev-{OLD_UID}-reg.sock",
        service=kubelet / f"plugins/nodeagent.dev/dra-{OLD_UID}.sock",
    )


@pytest.mark.parametrize("uid", ["", OLD_UID, "static-pod"])
@pytest.mark.parametrize("driver", ["a.b", f"{'x' * 54}.example", "y" * 63])
@pytest.mark.parametrize("deep", ["/var/lib/kubelet", "/var/snap/microk8s/common/var/lib/kubelet"])
def test_every_path_fits_and_belongs_to_one_instance_alone(deep: str, driver: str, uid: str) -> None:
    """Hashed where it would be too long, differently for each driver and pod."""
    one = plugin_sockets(Path(deep), driver, uid)
    others = [plugin_sockets(Path(deep), "other.dev", uid), plugin_sockets(Path(deep), driver, NEW_UID)]
    every = [(each.registration, each.service, *each.further) for each in (one, *others)]
    paths = [path for instance in every for path in instance]
    assert max(len(os.fsencode(path)) for path in paths) <= sockets.LONGEST_PATH_BYTES
    assert len(set(paths)) == len(paths) == 3 * (2 + FURTHER_NAMES)
    assert one == plugin_sockets(Path(deep), driver, uid)
    assert one.registration.parent == Path(deep) / "plugins_registry"
    assert one.registration.name.endswith("-reg.sock")


def test_a_folder_too_deep_for_any_name_is_the_configuration_s_fault() -> None:
    """With the length and the limit."""
    with pytest.raises(ConfigError, match="the limit is 107"):
        plugin_sockets(Path("/") / ("d" * 80), DRIVER, OLD_UID)


# Other instances


@pytest.mark.parametrize("uid", ["", NEW_UID, "static-pod"])
def test_what_a_dead_instance_left_is_removed_and_nothing_else(uid: str, kubelet_dir: Path) -> None:
    """Not the own sockets, what is served, other drivers', nor what is no socket."""
    registry = kubelet_dir / "plugins_registry"
    old, live = plugin_sockets(kubelet_dir, DRIVER, OLD_UID), plugin_sockets(kubelet_dir, DRIVER, "live-pod")
    mine = plugin_sockets(kubelet_dir, DRIVER, uid)
    kept_names = ["other.dev-reg.sock", f"{DRIVER}-b-reg.sock", f"x{DRIVER}-reg.sock", f"{DRIVER}-reg.sock.old"]
    with contextlib.ExitStack() as stack:
        for path in (old.registration, old.service, mine.registration, mine.service):
            stack.enter_context(dead_socket(path))
        for name in kept_names:
            stack.enter_context(dead_socket(registry / name))
        for path in (live.registration, live.service):
            stack.enter_context(live_socket(path))
        plain = plugin_sockets(kubelet_dir, DRIVER, "33333333-2222-3333-4444-555555555555").registration
        plain.touch()
        assert remove_stale(kubelet_dir, DRIVER, mine) == [old.registration, old.service]
        assert remove_stale(kubelet_dir, DRIVER, mine) == []
        kept = [mine.registration, mine.service, live.registration, live.service, plain]
        assert all(path.exists() for path in [*kept, *(registry / name for name in kept_names)])


def test_an_instance_under_hashed_names_is_found_too(kubelet_dir: Path) -> None:
    """As one is where the driver's name is as long as it may be."""
    driver = "z" * 63
    deep = kubelet_dir / "deeper" / "kubelet"
    old, mine = plugin_sockets(deep, driver, OLD_UID), plugin_sockets(deep, driver, NEW_UID)
    assert driver not in (*old.service.parts, old.registration.name)
    with dead_socket(old.service), live_socket(old.registration):
        assert other_instance_serves(deep, driver, mine)
        assert remove_stale(deep, driver, mine) == [old.service]


def test_without_folders_there_is_no_other_instance(kubelet_dir: Path) -> None:
    """A node's first start."""
    mine = plugin_sockets(kubelet_dir, DRIVER)
    assert remove_stale(kubelet_dir, DRIVER, mine) == []
    assert not other_instance_serves(kubelet_dir, DRIVER, mine)


def test_another_instance_counts_only_while_it_lives(kubelet_dir: Path) -> None:
    """With or without a pod's name; the own socket never counts."""
    mine, other = plugin_sockets(kubelet_dir, DRIVER, NEW_UID), plugin_sockets(kubelet_dir, DRIVER)
    with live_socket(mine.registration):
        assert not other_instance_serves(kubelet_dir, DRIVER, mine)
        with live_socket(other.registration):
            assert other_instance_serves(kubelet_dir, DRIVER, mine)
            assert other_instance_serves(kubelet_dir, DRIVER, other)
        assert not other_instance_serves(kubelet_dir, DRIVER, mine)


# Registration


async def test_kubelet_finds_the_driver_and_uses_it(kubelet_dir: Path) -> None:
    """Registered, connected, claims prepared, health shown."""
    desk, vitals = Desk(), Vitals(("gpu-0", HEALTHY))
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir, desk, vitals)) as one:
        await kubelet.wait_registered(DRIVER)
        state = await until(one, lambda state: state.state == REGISTERED and state.connected)
        assert (state.driver, state.reason, state.times, state.ready) == (DRIVER, "", 1, True)
        claims = [ref(number) for number in range(32)]
        answers = await kubelet.prepare(DRIVER, claims)
        assert {uid: outcome.error for uid, outcome in answers.items()} == {one.uid: "" for one in claims}
        assert answers["uid-7"].devices[0].pool == POOL
        await kubelet.wait_health(DRIVER, POOL, "gpu-0", "HEALTHY")
        vitals.put("gpu-0", UNHEALTHY, "Xid 79")
        await kubelet.wait_health(DRIVER, POOL, "gpu-0", "UNHEALTHY")
        assert await kubelet.unprepare(DRIVER, claims) == {one.uid: "" for one in claims}
        assert desk.held == set()


@pytest.mark.parametrize("services", [(V1,), (V1BETA1,), (V1, V1BETA1)], ids=["v1", "v1beta1", "both"])
async def test_every_kubelet_finds_a_version_that_it_knows(services: tuple[str, ...], kubelet_dir: Path) -> None:
    """The newest of those it knows; health in its version too."""
    async with (
        FakeDraKubelet(kubelet_dir, services=services, health_service=HEALTH_V1) as kubelet,
        running(plugin(kubelet_dir)),
    ):
        await kubelet.wait_registered(DRIVER)
        assert kubelet.chosen(DRIVER).service == services[0]
        assert (await kubelet.prepare(DRIVER, [ref(1)]))["uid-1"].devices
        await kubelet.wait_health(DRIVER, POOL, "gpu-0", "HEALTHY")


async def test_the_driver_is_registered_beside_device_plugins(kubelet_dir: Path) -> None:
    """Both of kubelet's sides work on one folder."""
    async with FakeKubelet(kubelet_dir), FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)):
        await kubelet.wait_registered(DRIVER)


async def test_kubelet_may_ask_what_it_is_while_everything_else_hangs(kubelet_dir: Path) -> None:
    """GetInfo is a constant: 32 claims and the health of devices may wait indefinitely."""
    desk, vitals = Desk(), Vitals(("gpu-0", HEALTHY))
    desk.free.clear()
    vitals.hangs = True
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir, desk, vitals)) as one:
        await kubelet.wait_registered(DRIVER)
        stuck = asyncio.create_task(kubelet.prepare(DRIVER, [ref(number) for number in range(32)]))
        await desk.busy.wait()
        took = []
        async with channels.channel(plugin_sockets(kubelet_dir, DRIVER).registration) as channel:
            stub = rpc.RegistrationStub(channel)
            for _ in range(20):
                begun = time.monotonic()
                info = await stub.GetInfo(pb.InfoRequest(), timeout=1)
                took.append(time.monotonic() - begun)
        assert (info.type, info.name) == ("DRAPlugin", DRIVER)
        assert info.endpoint == str(plugin_sockets(kubelet_dir, DRIVER).service)
        assert [*info.supported_versions] == [
            "v1.DRAPlugin",
            "v1beta1.DRAPlugin",
            "v1.DRAResourceHealth",
            "v1alpha1.DRAResourceHealth",
        ]
        assert min(took) <= 0.010
        assert one.registration.ready
        desk.free.set()
        assert len(await stuck) == 32


async def test_a_kubelet_that_comes_late_is_waited_for(kubelet_dir: Path) -> None:
    """Nothing is made in kubelet's folder before kubelet is there; the state says what is missing."""
    registry = kubelet_dir / "plugins_registry"
    async with running(plugin(kubelet_dir)) as one:
        state = await until(one, lambda state: state.reason.startswith("waiting for"))
        assert (state.state, state.reason) == (WAITING, f"waiting for {registry}: No such file or directory")
        assert os.listdir(kubelet_dir) == []
        async with FakeDraKubelet(kubelet_dir) as kubelet:
            await kubelet.wait_registered(DRIVER)
            await until(one, lambda state: state.ready)


async def test_kubelet_restarted_twenty_times_registers_the_same_sockets_again(kubelet_dir: Path) -> None:
    """Neither socket is touched for it; the count rises each time."""
    where = plugin_sockets(kubelet_dir, DRIVER)
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)) as one:
        await kubelet.wait_registered(DRIVER)
        with sockets.SocketWatch(where.registration) as registration, sockets.SocketWatch(where.service) as service:
            before = registration.look(), service.look()
            for turn in range(2, 22):
                await kubelet.restart()
                async with asyncio.timeout(5):
                    await kubelet.wait_registered(DRIVER, turn)
                    await kubelet.wait_health(DRIVER, POOL, "gpu-0", "HEALTHY")
                assert (await kubelet.prepare(DRIVER, [ref(turn)]))[f"uid-{turn}"].devices
            assert (registration.look(), service.look()) == before
        await until(one, lambda state: state.times == 21)


@pytest.mark.parametrize("which", ["registration", "service"])
async def test_a_socket_that_somebody_deletes_comes_back(which: str, kubelet_dir: Path) -> None:
    """At once, not at the next poll; claims can be prepared again."""
    where = plugin_sockets(kubelet_dir, DRIVER)
    path: Path = getattr(where, which)
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)) as one:
        await kubelet.wait_registered(DRIVER)
        for turn in range(1, 4):
            registrations = kubelet.registrations[DRIVER]
            os.unlink(path)
            if which == "registration":
                await kubelet.wait_registered(DRIVER, registrations + 1)
                await until(one, lambda state, turn=turn: state.ready and state.times == turn + 1)
            else:
                await seen_in(path.parent, lambda: sockets.is_served(path))
            answers = await prepared(kubelet, [ref(turn)])
            assert answers == {f"uid-{turn}"}


async def seen_in(folder: Path, holds: Callable[[], bool]) -> None:
    """Return once that holds; it is asked after every change in a folder."""
    async with asyncio.timeout(10):
        with FolderWatch(folder, poll_s=0.1) as watch:
            while not holds():
                await watch.wait()


async def prepared(kubelet: FakeDraKubelet, claims: Sequence[ClaimRef]) -> set[str]:
    """The UIDs prepared, as soon as kubelet is connected again."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(DraCallError):
                await kubelet.until(lambda: kubelet.instances(DRIVER) != [] and kubelet.chosen(DRIVER).connected)
                return {uid for uid, one in (await kubelet.prepare(DRIVER, claims)).items() if one.devices}


async def test_the_driver_s_own_folder_is_made_again(kubelet_dir: Path) -> None:
    """Whichever process deleted it."""
    where = plugin_sockets(kubelet_dir, DRIVER)
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)):
        await kubelet.wait_registered(DRIVER)
        shutil.rmtree(kubelet_dir / "plugins")
        await seen_in(where.service.parent, lambda: sockets.is_served(where.service))
        assert await prepared(kubelet, [ref(1)]) == {"uid-1"}


async def test_the_registry_may_be_deleted_and_come_back(kubelet_dir: Path) -> None:
    """It is kubelet's to make: until then the state says what is waited for."""
    where = plugin_sockets(kubelet_dir, DRIVER)
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)) as one:
        await kubelet.wait_registered(DRIVER)
        await until(one, lambda state: state.ready)
        shutil.rmtree(kubelet.registry)
        await until(one, lambda state: state.state == WAITING and str(kubelet.registry) in state.reason)
        await kubelet.until(lambda: not kubelet.instances(DRIVER))
        await kubelet.restart()
        await kubelet.wait_registered(DRIVER, 2)
        await until(one, lambda state: state.ready)
        assert sockets.is_served(where.registration)


async def test_a_refusal_is_shown_in_kubelet_s_words_and_tried_again(kubelet_dir: Path) -> None:
    """Said once in the log, until kubelet takes it."""
    path = plugin_sockets(kubelet_dir, DRIVER).registration
    async with FakeDraKubelet(kubelet_dir) as kubelet:
        kubelet.refuse(DRIVER)
        with capture_logs() as lines:
            async with running(plugin(kubelet_dir)) as one:
                state = await until(one, lambda state: state.state == FAILED)
                assert state.reason == f"cannot register {DRIVER} with kubelet: {DRIVER} is refused on purpose"
                await seen_in(path.parent, lambda: not path.exists() and any(path.parent.iterdir()))
                assert one.registration.state == FAILED
                kubelet.refuse(DRIVER, 1)
                await until(one, lambda state: state.ready)
                assert one.registration.reason == ""
        assert [line["log_level"] for line in lines if line["event"] == "not-registered"] == ["warning"]


@pytest.mark.parametrize("fail", [FakeDraKubelet.refuse, FakeDraKubelet.give_up_on], ids=["refused", "no-verdict"])
async def test_a_failed_registration_is_repeated_although_kubelet_waits(
    fail: Callable[[FakeDraKubelet, str, int], None], kubelet_dir: Path
) -> None:
    """After a failure kubelet leaves that path alone for up to two minutes: the next attempt has another name. What is
    left of the earlier ones is no other instance, and is gone."""
    mine = plugin_sockets(kubelet_dir, DRIVER)
    async with FakeDraKubelet(kubelet_dir, retry_s=(600.0, 600.0)) as kubelet:
        fail(kubelet, DRIVER, 4)
        async with running(plugin(kubelet_dir, unasked_s=0.1)) as one:
            await until(one, lambda state: state.ready)
            (path,) = mine.registration.parent.iterdir()
            assert path in mine.further
            assert not other_instance_serves(kubelet_dir, DRIVER, mine)
            path.unlink()
            await kubelet.wait_registered(DRIVER, 2)
            assert [*path.parent.iterdir()] == [path], "the same name again: kubelet knows of no failure of it"
        assert not any(path.parent.iterdir())


def test_a_dead_socket_of_a_further_attempt_is_removed_by_the_next_instance(kubelet_dir: Path) -> None:
    old, mine = (plugin_sockets(kubelet_dir, DRIVER, uid) for uid in (OLD_UID, NEW_UID))
    with dead_socket(old.further[0]), dead_socket(old.registration), dead_socket(mine.registration):
        assert remove_stale(kubelet_dir, DRIVER, mine) == sorted((old.further[0], old.registration))


def test_a_dead_socket_of_ones_own_further_attempt_is_removed_before_the_first(kubelet_dir: Path) -> None:
    """Kubelet may have it registered with the same endpoint, and would take that away when the file goes later."""
    mine = plugin_sockets(kubelet_dir, DRIVER, NEW_UID)
    with dead_socket(mine.further[2]), dead_socket(mine.service):
        assert remove_stale(kubelet_dir, DRIVER, mine) == [mine.further[2]]


async def test_a_verdict_on_an_earlier_attempt_does_not_count_for_this_one(kubelet_dir: Path) -> None:
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)) as one:
        await until(one, lambda state: state.ready)
        await kubelet.wait_registered(DRIVER)
        one._told(one._attempt - 1, taken=False, error="of an earlier attempt")
        assert one.registration.ready
        assert kubelet.registrations == {DRIVER: 1}


async def test_a_kubelet_that_watches_health_has_taken_the_driver_although_its_verdict_is_lost(
    kubelet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would close the connection, and cancel what is being prepared, if the socket went."""
    monkeypatch.setattr(DraPlugin, "_told", lambda *_, **__: None)
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir, unasked_s=0.3)) as one:
        await kubelet.wait_registered(DRIVER)
        await until(one, lambda state: state.connected)
        first = one._again_at_s
        await eventually(lambda: one._again_at_s != first)
        assert [*kubelet.registry.iterdir()] == [plugin_sockets(kubelet_dir, DRIVER).registration]
        assert kubelet.registrations == {DRIVER: 1}


async def test_a_kubelet_that_knows_no_version_of_ours_says_so(kubelet_dir: Path) -> None:
    """The reason names both sides."""
    async with (
        FakeDraKubelet(kubelet_dir, services=("v2.DRAPlugin",)),
        running(plugin(kubelet_dir)) as one,
    ):
        state = await until(one, lambda state: state.state == FAILED)
        assert "v1beta1.DRAPlugin" in state.reason
        assert "v2.DRAPlugin" in state.reason


async def test_a_folder_that_cannot_be_made_is_shown_and_tried_again(kubelet_dir: Path) -> None:
    """A file in its place; once that is gone, kubelet has the driver."""
    async with FakeDraKubelet(kubelet_dir) as kubelet:
        (kubelet_dir / "plugins").write_text("")
        async with running(plugin(kubelet_dir)) as one:
            state = await until(one, lambda state: state.state == FAILED)
            assert state.reason == f"cannot make {kubelet_dir}/plugins/{DRIVER}: Not a directory"
            assert kubelet.instances(DRIVER) == []
            (kubelet_dir / "plugins").unlink()
            await kubelet.wait_registered(DRIVER)
            await until(one, lambda state: state.ready)


async def test_a_socket_that_another_process_serves_is_not_taken_from_it(kubelet_dir: Path) -> None:
    """It is said; as soon as that process is gone, the socket is served."""
    where = plugin_sockets(kubelet_dir, DRIVER)
    async with FakeDraKubelet(kubelet_dir) as kubelet:
        with live_socket(where.service):
            task = asyncio.create_task((one := plugin(kubelet_dir)).run())
            state = await until(one, lambda state: state.state == FAILED)
            assert state.reason == f"cannot serve {where.service}: another process serves it"
        await kubelet.wait_registered(DRIVER)
        await end(task)


async def test_own_dead_sockets_are_no_obstacle(kubelet_dir: Path) -> None:
    """As they lie there after kill -9."""
    where = plugin_sockets(kubelet_dir, DRIVER)
    with dead_socket(where.registration), dead_socket(where.service):
        async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir)):
            await kubelet.wait_registered(DRIVER)
            assert await prepared(kubelet, [ref(1)]) == {"uid-1"}


# The end


async def test_at_its_end_kubelet_is_told_first_and_calls_under_way_finish(kubelet_dir: Path) -> None:
    """Both sockets are gone, and the folder of the driver is empty."""
    where, desk = plugin_sockets(kubelet_dir, DRIVER), Desk()
    async with FakeDraKubelet(kubelet_dir, health_service="") as kubelet:
        task = asyncio.create_task((one := plugin(kubelet_dir, desk)).run())
        await kubelet.wait_registered(DRIVER)
        desk.free.clear()
        async with channels.channel(where.service) as channel:
            call = asyncio.create_task(_prepare_over(channel))
            await desk.busy.wait()
            task.cancel()
            await kubelet.until(lambda: not kubelet.instances(DRIVER))
            assert not where.registration.exists()
            desk.free.set()
            assert await call == {"uid-1": ""}
        await asyncio.wait({task})
        assert os.listdir(where.service.parent) == os.listdir(kubelet.registry) == []
        assert (one.registration.state, one.registration.reason) == (WAITING, "stopped")


async def _prepare_over(channel: grpc.aio.Channel) -> dict[str, str]:
    request = dra_v1_pb2.NodePrepareResourcesRequest(
        claims=[dra_v1_pb2.Claim(namespace="default", name="claim-1", uid="uid-1")]
    )
    answer = await dra_v1_pb2_grpc.DRAPluginStub(channel).NodePrepareResources(request, timeout=10)
    return {uid: one.error for uid, one in answer.claims.items()}


async def test_a_call_that_never_ends_does_not_keep_the_agent_from_ending(kubelet_dir: Path) -> None:
    """It is given a second."""
    desk = Desk()
    desk.free.clear()
    async with FakeDraKubelet(kubelet_dir) as kubelet:
        task = asyncio.create_task(plugin(kubelet_dir, desk).run())
        await kubelet.wait_registered(DRIVER)
        stuck = asyncio.create_task(kubelet.prepare(DRIVER, [ref(1)]))
        await desk.busy.wait()
        begun = time.monotonic()
        await end(task)
        assert time.monotonic() - begun < 5
        with pytest.raises(DraCallError):
            await stuck


async def test_kubelet_that_cancels_in_the_middle_finds_the_claim_done(kubelet_dir: Path) -> None:
    """And other calls go on meanwhile."""
    desk = Desk()
    desk.free.clear()
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir, desk)) as one:
        await kubelet.wait_registered(DRIVER)
        call = asyncio.create_task(kubelet.prepare(DRIVER, [ref(1)]))
        await desk.busy.wait()
        await end(call)
        desk.free.set()
        await desk.done.wait()
        assert desk.held == {"uid-1"}
        assert (await kubelet.prepare(DRIVER, [ref(1)]))["uid-1"].devices
        assert one.registration.ready


async def test_it_may_run_again(kubelet_dir: Path) -> None:
    """On the same sockets."""
    one = plugin(kubelet_dir)
    async with FakeDraKubelet(kubelet_dir) as kubelet:
        for turn in (1, 2, 3):
            async with running(one):
                await kubelet.wait_registered(DRIVER, turn)
                await until(one, lambda state: state.ready and state.connected)
            await kubelet.until(lambda: not kubelet.instances(DRIVER))
            assert not one.registration.connected


# Two instances


async def test_two_instances_are_registered_at_once_and_the_newer_is_used(kubelet_dir: Path) -> None:
    """Either may go first; what it leaves behind is nothing."""
    old_desk, new_desk = Desk(), Desk()
    old, new = (plugin_sockets(kubelet_dir, DRIVER, uid) for uid in (OLD_UID, NEW_UID))
    async with FakeDraKubelet(kubelet_dir) as kubelet, running(plugin(kubelet_dir, old_desk, uid=OLD_UID)):
        await kubelet.wait_instances(DRIVER, old.service)
        async with running(plugin(kubelet_dir, new_desk, uid=NEW_UID)):
            await kubelet.wait_instances(DRIVER, old.service, new.service)
            assert other_instance_serves(kubelet_dir, DRIVER, new)
            assert remove_stale(kubelet_dir, DRIVER, new) == []
            await kubelet.prepare(DRIVER, [ref(1)])
            assert (old_desk.held, new_desk.held) == (set(), {"uid-1"})
        await kubelet.wait_instances(DRIVER, old.service)
        assert not other_instance_serves(kubelet_dir, DRIVER, old)
        await kubelet.prepare(DRIVER, [ref(2)])
        assert old_desk.held == {"uid-2"}
        assert not new.registration.exists()
        assert not new.service.exists()


async def test_an_upgrade_is_never_without_an_instance(kubelet_dir: Path) -> None:
    """Claims are prepared throughout; kubelet forgets the health with the old one, and the new one says it again."""
    old, new = (plugin_sockets(kubelet_dir, DRIVER, uid) for uid in (OLD_UID, NEW_UID))
    async with FakeDraKubelet(kubelet_dir) as kubelet:
        going = asyncio.create_task(plugin(kubelet_dir, uid=OLD_UID).run())
        await kubelet.wait_instances(DRIVER, old.service)
        async with running(plugin(kubelet_dir, uid=NEW_UID)):
            await kubelet.wait_instances(DRIVER, old.service, new.service)
            leaving = asyncio.create_task(end(going))
            while not leaving.done():
                assert (await kubelet.prepare(DRIVER, [ref(1)]))["uid-1"].devices
            await kubelet.wait_instances(DRIVER, new.service)
            await kubelet.wait_health(DRIVER, POOL, "gpu-0", "HEALTHY")
