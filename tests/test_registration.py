"""Registration against a kubelet that restarts, wipes, comes late, hangs up and refuses."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import FakeKubelet
from shelf import CPU, GPU, Shelf

from nodeagent.errors import ConfigError
from nodeagent.kube.registration import FAILED, REGISTERED, WAITING, Pace, Registrar

QUICK = Pace(first_retry_s=0.02, last_retry_s=0.1, unwatched_s=0.1, poll_s=1.0, register_s=5.0)


@contextlib.asynccontextmanager
async def running(registrar: Registrar) -> AsyncIterator[Registrar]:
    """The registrar at work; it must have no error when it ends."""
    task = asyncio.create_task(registrar.run())
    try:
        yield registrar
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def plugin_folder(folder: Path) -> Path:
    return folder / "device-plugins"


async def test_a_resource_is_served_registered_and_watched(folder: Path) -> None:
    """Kubelet shows every device, and the state says which kubelet.sock took the registration."""
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await kubelet.wait_allocatable(CPU, 4)
        await registrar.wait_ready()
        (state,) = registrar.registrations()
        assert (state.resource, state.state, state.watched, state.reason) == (CPU, REGISTERED, True, "")
        assert state.kubelet_inode == kubelet.socket.stat().st_ino
        assert kubelet.registrations == {CPU: 1}


async def test_kubelet_restarted_fifty_times_always_has_everything_again(folder: Path) -> None:
    """After each restart both resources are allocatable again, and pods get devices."""
    resources = [Shelf(CPU, 4), Shelf(GPU, 2)]
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar(resources, kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await registrar.wait_ready()
        for turn in range(50):
            await kubelet.restart()
            async with asyncio.timeout(5):
                await kubelet.wait_allocatable(CPU, 4)
                await kubelet.wait_allocatable(GPU, 2)
            pod = await kubelet.admit_pod("default", f"pod-{turn}", {"main": {CPU: 2, GPU: 1}})
            assert len(pod.held(CPU)) == 2
            await kubelet.delete_pod("default", f"pod-{turn}")


async def test_a_new_kubelet_socket_is_answered_within_a_fifth_of_a_second(folder: Path) -> None:
    """The best of five restarts: from kubelet.sock to registered."""
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await registrar.wait_ready()
        took = []
        for _ in range(5):
            await kubelet.stop()
            times = kubelet.registrations[CPU]
            await kubelet.start()
            started = time.monotonic()
            await kubelet.wait_registered(CPU, times + 1)
            took.append(time.monotonic() - started)
        assert min(took) < 0.2


async def test_a_late_kubelet_is_waited_for(folder: Path) -> None:
    """No folder, then an empty folder, then kubelet: the state says what is missing, and all ends well."""
    async with running(Registrar([Shelf()], plugin_folder(folder), pace=QUICK)) as registrar:
        await registrar.changed(1)
        (state,) = registrar.registrations()
        assert state.state == WAITING
        assert state.reason == f"waiting for {plugin_folder(folder)}/kubelet.sock: No such file or directory"
        plugin_folder(folder).mkdir()
        async with FakeKubelet(folder) as kubelet:
            await kubelet.wait_allocatable(CPU, 4)


async def test_the_parents_of_the_folder_may_be_missing_too(folder: Path) -> None:
    """The watch climbs down as the folders appear, long before the slow poll."""
    pace = Pace(poll_s=50.0)
    async with running(Registrar([Shelf()], folder / "lib" / "kubelet" / "device-plugins", pace=pace)) as registrar:
        await registrar.changed(1)
        async with FakeKubelet(folder / "lib" / "kubelet") as kubelet, asyncio.timeout(5):
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_wiped_folder_is_served_again(folder: Path) -> None:
    """All sockets but kubelet's are deleted while it runs: a fresh socket, registered again."""
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await registrar.wait_ready()
        (own,) = kubelet.plugins_folder.glob("nodeagent-*.sock")
        own.unlink()
        await kubelet.wait_registered(CPU, 2)
        await kubelet.wait_allocatable(CPU, 4)
        assert own.is_socket()


async def test_a_deleted_folder_is_survived(folder: Path) -> None:
    """The folder goes, kubelet comes back with a new one."""
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await registrar.wait_ready()
        await kubelet.stop()
        shutil.rmtree(kubelet.plugins_folder)
        await kubelet.start()
        async with asyncio.timeout(5):
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_dead_kubelet_socket_is_tried_until_a_live_one_comes(folder: Path) -> None:
    """A killed kubelet leaves its socket: the state says why registration fails; then the new one is found at once."""
    kubelet = FakeKubelet(folder)
    await kubelet.start()
    await kubelet.stop(leave_socket=True)
    assert kubelet.socket.is_socket()
    async with running(Registrar([Shelf()], kubelet.plugins_folder, pace=Pace(last_retry_s=50.0))) as registrar:
        seen = 1
        while registrar.registrations()[0].state != FAILED:
            seen = await registrar.changed(seen)
        reason = registrar.registrations()[0].reason
        assert reason.startswith(f"cannot register {CPU} at {kubelet.socket}: UNAVAILABLE: ")
        async with kubelet, asyncio.timeout(5):
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_cut_stream_is_registered_again(folder: Path) -> None:
    """Kubelet lives but watches no more: allocatable is 0, and soon it is not."""
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await registrar.wait_ready()
        for times in range(2, 5):
            await kubelet.cut_streams()
            assert kubelet.allocatable(CPU) == 0
            await kubelet.wait_registered(CPU, times)
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_registration_that_fails_five_times_succeeds_the_sixth(folder: Path) -> None:
    """Kubelet's own words are in the reason meanwhile."""
    kubelet = FakeKubelet(folder)
    kubelet.refuse(CPU, 5)
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        seen = 1
        while registrar.registrations()[0].state != FAILED:
            seen = await registrar.changed(seen)
        assert registrar.registrations()[0].reason.endswith(f"UNKNOWN: {CPU} is refused on purpose")
        await kubelet.wait_allocatable(CPU, 4)
        await registrar.wait_ready()
        assert kubelet.registrations == {CPU: 1}


async def test_a_resource_that_always_fails_blocks_no_other(folder: Path) -> None:
    """One is refused for ever; the other is registered, and again after a restart."""
    kubelet = FakeKubelet(folder)
    kubelet.refuse(GPU)
    resources = [Shelf(GPU, 2), Shelf(CPU, 4)]
    async with kubelet, running(Registrar(resources, kubelet.plugins_folder, pace=QUICK)) as registrar:
        await kubelet.wait_allocatable(CPU, 4)
        await kubelet.restart()
        await kubelet.wait_allocatable(CPU, 4)
        assert not registrar.ready
        kubelet.refuse(GPU, 0)
        await kubelet.wait_allocatable(GPU, 2)


async def test_a_resource_whose_socket_cannot_be_bound_blocks_no_other(folder: Path) -> None:
    """A folder lies where the socket should be: said with its path, and repaired once it is gone."""
    async with FakeKubelet(folder) as kubelet:
        obstacle = kubelet.plugins_folder / "nodeagent-nodeagent.dev_gpu.sock"
        obstacle.mkdir()
        resources = [Shelf(GPU, 2), Shelf(CPU, 4)]
        async with running(Registrar(resources, kubelet.plugins_folder, pace=QUICK)) as registrar:
            await kubelet.wait_allocatable(CPU, 4)
            state = registrar.registrations()[0]
            assert (state.state, state.reason) == (FAILED, f"cannot serve {obstacle}: Is a directory")
            obstacle.rmdir()
            await kubelet.wait_allocatable(GPU, 2)


async def test_a_kubelet_that_never_answers_is_left_for_the_next_one(folder: Path) -> None:
    """A Register that hangs does not hide a new kubelet.sock: it is not waited out."""
    plugin_folder(folder).mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(plugin_folder(folder) / "kubelet.sock"))
        mute.listen()
        mute.setblocking(False)
        async with running(Registrar([Shelf()], plugin_folder(folder), pace=Pace(register_s=50.0))):
            accepted, _ = await asyncio.get_running_loop().sock_accept(mute)
            with accepted:
                async with FakeKubelet(folder) as kubelet, asyncio.timeout(5):
                    await kubelet.wait_allocatable(CPU, 4)


async def test_the_newer_of_two_agents_keeps_the_resource(folder: Path) -> None:
    """A rolling update: the older one yields, says why, and takes over again when the newer one ends."""
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([Shelf(count=1)], kubelet.plugins_folder, pace=QUICK)) as older,
    ):
        await kubelet.wait_allocatable(CPU, 1)
        async with running(Registrar([Shelf(count=2)], kubelet.plugins_folder, pace=QUICK)):
            await kubelet.wait_allocatable(CPU, 2)
            seen = 0
            while older.registrations()[0].state != FAILED:
                seen = await older.changed(seen)
            assert older.registrations()[0].reason.endswith("another process serves it")
            times = kubelet.registrations[CPU]
        await kubelet.wait_allocatable(CPU, 1)
        assert kubelet.registrations[CPU] == times + 1


async def test_the_end_of_the_older_agent_does_not_take_the_newer_one_away(folder: Path) -> None:
    """Stopping, gRPC removes the file at its path, though it is the newer agent's by now: that one serves again."""
    async with FakeKubelet(folder) as kubelet:
        older = asyncio.create_task(Registrar([Shelf(count=1)], kubelet.plugins_folder, pace=QUICK).run())
        await kubelet.wait_allocatable(CPU, 1)
        async with running(Registrar([Shelf(count=2)], kubelet.plugins_folder, pace=QUICK)) as newer:
            await kubelet.wait_allocatable(CPU, 2)
            older.cancel()
            await asyncio.wait({older})
            await kubelet.wait_registered(CPU, 3)
            await kubelet.wait_allocatable(CPU, 2)
            await newer.wait_ready()
            assert [*kubelet.plugins_folder.glob("nodeagent-*")]


async def test_a_registrar_that_ends_takes_its_devices_away(folder: Path) -> None:
    """The streams end, kubelet shows 0, no socket is left."""
    async with FakeKubelet(folder) as kubelet:
        async with running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
            await registrar.wait_ready()
        await kubelet.wait_allocatable(CPU, 0)
        assert not [*kubelet.plugins_folder.glob("nodeagent-*")]


async def test_kubelet_socket_deleted_by_hand_does_not_stop_a_plugin_that_is_watched(folder: Path) -> None:
    """Where nobody could register again, the stream that works is kept."""
    shelf = Shelf()
    async with (
        FakeKubelet(folder) as kubelet,
        running(Registrar([shelf], kubelet.plugins_folder, pace=QUICK)) as registrar,
    ):
        await registrar.wait_ready()
        kubelet.wipe()
        shelf.show(7)
        await kubelet.wait_allocatable(CPU, 7)
        assert registrar.ready


def test_a_folder_too_deep_for_a_socket_is_refused_at_once() -> None:
    """Even the short name does not fit: the path and the limit are named."""
    deep = Path("/var/lib") / ("k" * 100)
    with pytest.raises(
        ConfigError, match=r"cannot use socket /var/lib/k+/.*: the path has \d+ bytes, the limit is 107"
    ):
        Registrar([Shelf()], deep)
