"""Registration against a kubelet that restarts, wipes, comes late, hangs up, refuses, stalls and dies: up to 1.36 and
from 1.37 on.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.aio.revision import Revision
from nodeagent.errors import ConfigError
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.device_plugin_sockets import PluginPaths
from nodeagent.kube.kubelet.registration import FAILED, REGISTERED, WAITING, Registrar, RegistrationTiming
from tests.doubles.kubelet import FakeKubelet
from tests.doubles.kubelet_plugins import Version
from tests.support.observed import observed
from tests.support.paths import CHECKOUT
from tests.support.registering import QUICK, in_state, leave_dead_socket, own_sockets, running, shown
from tests.support.shelf import CPU, GPU, Shelf
from tests.support.until import until


@pytest.fixture(params=[*Version], ids=str)
def kubelet(folder: Path, request: pytest.FixtureRequest) -> FakeKubelet:
    """A kubelet that has not started yet, of each kind."""
    return FakeKubelet(folder, version=request.param)


async def test_a_resource_is_served_registered_and_watched(kubelet: FakeKubelet) -> None:
    """Kubelet shows every device, and the state says which kubelet.sock took the registration."""
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await kubelet.wait_allocatable(CPU, 4)
        await registrar.wait_ready()
        (state,) = registrar.registrations()
        assert (state.resource, state.state, state.watched, state.reason) == (CPU, REGISTERED, True, "")
        assert state.kubelet_inode == kubelet.socket.stat().st_ino
        assert kubelet.registrations == {CPU: 1}


async def test_the_registration_with_each_kubelet_is_timed_once(kubelet: FakeKubelet) -> None:
    """Not again when only the stream was cut: kubelet is the same."""
    before = observed("registration", resource=CPU)
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await registrar.wait_ready()
        for count in (2, 3, 4):
            await kubelet.restart()
            await kubelet.wait_allocatable(CPU, 4)
            await until(partial(_is_observed, before + count))
        assert observed("registration", resource=CPU) == before + 4
        await kubelet.cut_streams()
        await kubelet.wait_registered(CPU, kubelet.registrations[CPU] + 1)
        await registrar.wait_ready()
        assert observed("registration", resource=CPU) == before + 4


def _is_observed(count: int) -> bool:
    return observed("registration", resource=CPU) >= count


async def test_kubelet_restarted_fifty_times_always_has_everything_again(kubelet: FakeKubelet) -> None:
    """After each restart both resources are allocatable again, and pods get devices."""
    resources = [Shelf(CPU, 4), Shelf(GPU, 2)]
    async with kubelet, running(Registrar(resources, kubelet.plugins_folder, pace=QUICK)) as registrar:
        await registrar.wait_ready()
        for turn in range(50):
            await kubelet.restart()
            async with asyncio.timeout(5):
                await kubelet.wait_allocatable(CPU, 4)
                await kubelet.wait_allocatable(GPU, 2)
            pod = await kubelet.admit_pod("default", f"pod-{turn}", {"main": {CPU: 2, GPU: 1}})
            assert len(pod.held(CPU)) == 2
            await kubelet.delete_pod("default", f"pod-{turn}")


async def test_a_new_kubelet_socket_is_answered_within_a_fifth_of_a_second(kubelet: FakeKubelet) -> None:
    """The best of five restarts: from kubelet.sock to registered."""
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
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


async def test_a_late_kubelet_is_waited_for(kubelet: FakeKubelet) -> None:
    """No folder, then an empty folder, then kubelet: the state says what is missing, and all ends well."""
    async with running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await registrar.changed(1)
        (state,) = registrar.registrations()
        assert state.state == WAITING
        assert state.reason == f"waiting for {kubelet.plugins_folder}/kubelet.sock: No such file or directory"
        kubelet.plugins_folder.mkdir()
        async with kubelet:
            await kubelet.wait_allocatable(CPU, 4)


async def test_the_parents_of_the_folder_may_be_missing_too(folder: Path) -> None:
    """The watch climbs down as the folders appear, long before the slow poll."""
    pace = RegistrationTiming(poll_s=50.0)
    async with running(Registrar([Shelf()], folder / "lib" / "kubelet" / "device-plugins", pace=pace)) as registrar:
        await registrar.changed(1)
        async with FakeKubelet(folder / "lib" / "kubelet") as kubelet, asyncio.timeout(5):
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_wiped_folder_is_served_again(kubelet: FakeKubelet) -> None:
    """All sockets but kubelet's are deleted while it runs: a fresh socket, registered again."""
    shelf = Shelf()
    async with kubelet, running(Registrar([shelf], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await registrar.wait_ready()
        (own,) = own_sockets(kubelet)
        kubelet.lose(own)
        await kubelet.wait_registered(CPU, 2)
        await shown(kubelet, shelf)
        assert own_sockets(kubelet) not in ([], [own])


async def test_a_deleted_folder_is_survived(kubelet: FakeKubelet) -> None:
    """The folder goes, kubelet comes back with a new one."""
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await registrar.wait_ready()
        await kubelet.stop()
        shutil.rmtree(kubelet.plugins_folder)
        await kubelet.start()
        async with asyncio.timeout(5):
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_dead_kubelet_socket_is_tried_until_a_live_one_comes(kubelet: FakeKubelet) -> None:
    """A killed kubelet leaves its socket: the state says why registration fails; then the new one is found at once."""
    await kubelet.start()
    await kubelet.stop(leave_socket=True)
    assert kubelet.socket.is_socket()
    async with running(
        Registrar([Shelf()], kubelet.plugins_folder, pace=RegistrationTiming(last_retry_s=50.0))
    ) as registrar:
        reason = await in_state(registrar, FAILED)
        assert reason.startswith(f"cannot register {CPU} at {kubelet.socket}: UNAVAILABLE: ")
        async with kubelet, asyncio.timeout(5):
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_cut_stream_is_registered_again(kubelet: FakeKubelet) -> None:
    """Kubelet lives but watches no more: allocatable is 0, and soon it is not."""
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await registrar.wait_ready()
        for times in range(2, 5):
            await kubelet.cut_streams()
            assert kubelet.allocatable(CPU) == 0
            await kubelet.wait_registered(CPU, times)
            await kubelet.wait_allocatable(CPU, 4)


async def test_a_registration_that_fails_five_times_succeeds_the_sixth(kubelet: FakeKubelet) -> None:
    """Kubelet's own words are in the reason meanwhile."""
    kubelet.refuse(CPU, 5)
    async with kubelet, running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
        assert (await in_state(registrar, FAILED)).endswith(f"UNKNOWN: {CPU} is refused on purpose")
        await kubelet.wait_allocatable(CPU, 4)
        await registrar.wait_ready()
        assert kubelet.registrations == {CPU: 1}


async def test_a_resource_that_always_fails_blocks_no_other(kubelet: FakeKubelet) -> None:
    """One is refused indefinitely; the other is registered, and again after a restart."""
    kubelet.refuse(GPU)
    resources = [Shelf(GPU, 2), Shelf(CPU, 4)]
    async with kubelet, running(Registrar(resources, kubelet.plugins_folder, pace=QUICK)) as registrar:
        await kubelet.wait_allocatable(CPU, 4)
        await kubelet.restart()
        await kubelet.wait_allocatable(CPU, 4)
        assert not registrar.ready
        kubelet.refuse(GPU, 0)
        await kubelet.wait_allocatable(GPU, 2)


async def test_a_resource_whose_socket_cannot_be_bound_blocks_no_other(
    kubelet: FakeKubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder lies where the socket should be: said with its path, and repaired once it is gone."""
    obstacle = PluginPaths(kubelet.plugins_folder, GPU).fresh()
    own = PluginPaths(kubelet.plugins_folder, CPU).fresh()
    monkeypatch.setattr(PluginPaths, "fresh", lambda paths: obstacle if "gpu" in paths._stem else own)
    async with kubelet:
        obstacle.mkdir()
        resources = [Shelf(GPU, 2), Shelf(CPU, 4)]
        async with running(Registrar(resources, kubelet.plugins_folder, pace=QUICK)) as registrar:
            await kubelet.wait_allocatable(CPU, 4)
            state = registrar.registrations()[0]
            assert (state.state, state.reason) == (FAILED, f"cannot serve {obstacle}: Is a directory")
            obstacle.rmdir()
            await kubelet.wait_allocatable(GPU, 2)


async def test_a_kubelet_that_never_answers_is_left_for_the_next_one(kubelet: FakeKubelet) -> None:
    """A Register that hangs does not hide a new kubelet.sock: it is not waited out."""
    kubelet.plugins_folder.mkdir()
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(kubelet.plugins_folder / "kubelet.sock"))
        mute.listen()
        mute.setblocking(False)
        async with running(Registrar([Shelf()], kubelet.plugins_folder, pace=RegistrationTiming(register_s=50.0))):
            accepted, _ = await asyncio.get_running_loop().sock_accept(mute)
            with accepted:
                async with kubelet, asyncio.timeout(5):
                    await kubelet.wait_allocatable(CPU, 4)


async def test_the_newer_of_two_agents_waits_for_the_end_of_the_older_one(kubelet: FakeKubelet) -> None:
    """It says whom it waits for; what the older one serves is left alone, over restarts of kubelet too."""
    older, newer = Shelf(count=1), Shelf(count=2)
    async with kubelet:
        ending = asyncio.create_task(Registrar([older], kubelet.plugins_folder, pace=QUICK).run())
        await shown(kubelet, older)
        async with running(Registrar([newer], kubelet.plugins_folder, pace=QUICK)) as registrar:
            (path,) = own_sockets(kubelet)
            reason = await in_state(registrar, FAILED)
            assert reason == f"cannot serve {CPU}: another process serves {path}"
            assert own_sockets(kubelet) == [path]
            ending.cancel()
            await kubelet.wait_registered(CPU, 2)
            await shown(kubelet, newer)


async def test_a_registrar_that_ends_takes_its_devices_away(kubelet: FakeKubelet) -> None:
    """The streams end, kubelet shows 0, no socket is left."""
    async with kubelet:
        async with running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
            await registrar.wait_ready()
        await kubelet.wait_allocatable(CPU, 0)
        assert own_sockets(kubelet) == []


async def test_kubelet_socket_deleted_by_hand_does_not_stop_a_plugin_that_is_watched(kubelet: FakeKubelet) -> None:
    """Where no plugin could register again, the stream that works is kept."""
    shelf = Shelf()
    async with kubelet, running(Registrar([shelf], kubelet.plugins_folder, pace=QUICK)) as registrar:
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


# ---------------------------------------------------------------- what is no new kubelet


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Revision:
    """Rises each time that a registrar looks at kubelet's socket."""
    counted, look = Revision(), sockets.SocketWatch.look

    def spy(watch: sockets.SocketWatch) -> sockets.SocketIdentity | None:
        asyncio.get_running_loop().call_soon(counted.bump)
        return look(watch)

    monkeypatch.setattr(sockets.SocketWatch, "look", spy)
    return counted


@pytest.mark.parametrize("change", ["touch", "chmod", "chown", "rename"])
async def test_the_socket_of_the_same_kubelet_is_no_new_kubelet(
    kubelet: FakeKubelet, looks: Revision, change: str
) -> None:
    """Whatever is done to its times, mode, owner or name: the stream goes on, nothing is registered again."""
    shelf, aside = Shelf(), kubelet.socket.with_name("aside")
    async with kubelet, running(Registrar([shelf], kubelet.plugins_folder, pace=replace(QUICK, poll_s=0.02))):
        await shown(kubelet, shelf)
        if change == "rename":
            kubelet.socket.rename(aside)
            await changed(looks, 3)
            aside.rename(kubelet.socket)
        else:
            {"touch": os.utime, "chmod": lambda path: path.chmod(0o600), "chown": lambda path: os.chown(path, 0, 1)}[
                change
            ](kubelet.socket)
        await changed(looks, 3)
        shelf.show(7)
        await shown(kubelet, shelf)
        assert kubelet.registrations == {CPU: 1}


async def changed(revision: Revision, times: int) -> None:
    """Return once it has risen that often."""
    for _ in range(times):
        await revision.changed(revision.value)


async def test_a_leftover_stream_of_an_older_kubelet_is_ended_before_the_next_register(folder: Path) -> None:
    """Its kubelet.sock is replaced while it still watches: the new kubelet is the one that counts."""
    shelf, older, newer = Shelf(), FakeKubelet(folder), FakeKubelet(folder)
    async with older, running(Registrar([shelf], older.plugins_folder, pace=QUICK)) as registrar:
        await shown(older, shelf)
        older.socket.unlink()
        async with newer:
            await shown(newer, shelf)
            await older.until(lambda: not older.streams(CPU))
            # Kubelet asks for the list before it answers the register call.
            inode = newer.socket.stat().st_ino
            await until(lambda: registrar.registrations()[0].kubelet_inode == inode)
            older.socket = folder / "device-plugins" / "kubelet.sock"


# ---------------------------------------------------------------- answers that are late, lost or wrong


async def test_a_register_that_was_served_and_answered_too_late_counts(kubelet: FakeKubelet) -> None:
    """Kubelet watches: that is the proof. Nothing is registered a second time."""
    shelf = Shelf()
    kubelet.hold_answers(CPU)
    async with (
        kubelet,
        running(Registrar([shelf], kubelet.plugins_folder, pace=replace(QUICK, register_s=0.2))) as registrar,
    ):
        await shown(kubelet, shelf)
        await registrar.wait_ready()
        kubelet.release(CPU)
        shelf.show(6)
        await shown(kubelet, shelf)
        assert kubelet.registrations == {CPU: 1}


async def test_a_register_that_kubelet_never_came_to_is_tried_on_another_path(kubelet: FakeKubelet) -> None:
    """Kubelet's own words are the reason meanwhile; a path that it may have taken is not named again."""
    shelf = Shelf()
    kubelet.hold_dials(CPU)
    async with (
        kubelet,
        running(Registrar([shelf], kubelet.plugins_folder, pace=replace(QUICK, register_s=0.1))) as registrar,
    ):
        reason = await in_state(registrar, FAILED)
        assert reason == f"cannot register {CPU} at {kubelet.socket}: DEADLINE_EXCEEDED: Deadline Exceeded"
        before = own_sockets(kubelet)
        kubelet.release(CPU)
        await shown(kubelet, shelf)
        assert own_sockets(kubelet) != before
        assert registrar.registrations()[0].state == REGISTERED


async def test_already_connected_counts_where_kubelet_watches(kubelet: FakeKubelet) -> None:
    """It has served the Register that it refuses."""
    shelf = Shelf()
    kubelet.spoil(CPU)
    async with kubelet, running(Registrar([shelf], kubelet.plugins_folder, pace=QUICK)) as registrar:
        await shown(kubelet, shelf)
        await registrar.wait_ready()
        assert kubelet.registrations == {CPU: 1}


@pytest.mark.parametrize("during", ["nothing", "change", "reload"])
async def test_a_kubelet_that_stood_still_shows_everything_when_it_goes_on(kubelet: FakeKubelet, during: str) -> None:
    """For longer than a Register may take; also where the list or the whole resource changed meanwhile."""
    pace, before, after = replace(QUICK, register_s=0.1), Shelf(), Shelf(count=3)
    async with kubelet:
        async with running(Registrar([before], kubelet.plugins_folder, pace=pace)) as registrar:
            await shown(kubelet, before)
            kubelet.pause()
            if during == "change":
                before.show(7)
            if during != "reload":
                await asyncio.wait_for(stood_still(kubelet, pace), 5)
                kubelet.resume()
                await shown(kubelet, before)
                assert kubelet.registrations == {CPU: 1}
                return
        async with running(Registrar([after], kubelet.plugins_folder, pace=pace)) as registrar:
            assert "DEADLINE_EXCEEDED" in await in_state(registrar, FAILED)
            kubelet.resume()
            await shown(kubelet, after)


async def stood_still(kubelet: FakeKubelet, pace: RegistrationTiming) -> None:
    """Return once a Register of another resource has exceeded its deadline."""
    async with running(Registrar([Shelf(GPU)], kubelet.plugins_folder, pace=pace)) as other:
        await in_state(other, FAILED)


# ---------------------------------------------------------------- the agent comes and goes


async def test_two_hundred_restarts_of_the_agent_lose_no_path(kubelet: FakeKubelet) -> None:
    """Some leave a dead socket, as after kill -9; each start removes it."""
    async with kubelet:
        for turn in range(1, 201):
            if turn % 5 == 0:
                leave_dead_socket(kubelet.plugins_folder)
            shelf = Shelf(count=1 + turn % 4)
            async with running(Registrar([shelf], kubelet.plugins_folder, pace=replace(QUICK, clean_up_s=0.1))):
                await shown(kubelet, shelf)
                assert len(own_sockets(kubelet)) == 1
        await kubelet.wait_allocatable(CPU, 0)


async def test_an_agent_that_is_killed_again_and_again_is_registered_each_time(kubelet: FakeKubelet) -> None:
    """kill -9, at rest and in the middle of a registration; the dead ones' sockets do not pile up."""
    async with kubelet:
        for turn in range(1, 6):
            shelf = Shelf(count=turn)
            words = [sys.executable, "-m", "tests.support.doomed", str(kubelet.plugins_folder), str(turn)]
            process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.DEVNULL, cwd=CHECKOUT)
            if turn % 2:
                await shown(kubelet, shelf, within_s=10)
            else:
                await asyncio.wait_for(kubelet.until(lambda: bool(kubelet.streams(CPU))), 10)
            assert len(own_sockets(kubelet)) == 1
            process.send_signal(signal.SIGKILL)
            await process.wait()
        shelf = Shelf(count=7)
        async with running(Registrar([shelf], kubelet.plugins_folder, pace=QUICK)):
            await shown(kubelet, shelf)
            assert len(own_sockets(kubelet)) == 1


async def test_a_resource_that_changes_is_registered_once_more_and_stays(folder: Path) -> None:
    """Up to 1.36 kubelet cleans up by the resource's name, some time after the old stream has ended: the new
    registration waits for that."""
    kubelet = FakeKubelet(folder, version=Version.V1_36, clean_up_s=0.1)
    pace = replace(QUICK, clean_up_s=0.4, unwatched_s=5.0)
    async with kubelet:
        for turn, shelf in enumerate((Shelf(count=2), Shelf(count=5), Shelf(count=3)), start=1):
            async with running(Registrar([shelf], kubelet.plugins_folder, pace=pace)):
                await shown(kubelet, shelf)
                assert kubelet.registrations == {CPU: turn}


async def test_a_clean_up_that_comes_too_late_is_made_good(folder: Path) -> None:
    """Kubelet 1.36 is so slow that it ends the new registration with the old one: the resource is registered again."""
    kubelet = FakeKubelet(folder, version=Version.V1_36, clean_up_s=0.2)
    async with kubelet:
        for times, shelf in ((1, Shelf(count=2)), (3, Shelf(count=5))):
            async with running(Registrar([shelf], kubelet.plugins_folder, pace=replace(QUICK, clean_up_s=0.0))):
                await kubelet.wait_registered(CPU, times)
                await shown(kubelet, shelf)


async def test_sockets_that_dead_servers_left_are_removed_and_no_others(kubelet: FakeKubelet) -> None:
    """Not those of other resources, not what is no socket."""
    async with kubelet:
        dead = [leave_dead_socket(kubelet.plugins_folder) for _ in range(3)]
        kept = [leave_dead_socket(kubelet.plugins_folder, name) for name in (GPU, f"{CPU}-0123abcd", "other.dev/cpu")]
        file, link = (kubelet.plugins_folder / f"nodeagent-nodeagent.dev_cpu-0000000{n}.sock" for n in range(2))
        file.touch()
        link.symlink_to(kubelet.socket)
        async with running(Registrar([Shelf()], kubelet.plugins_folder, pace=QUICK)) as registrar:
            assert await in_state(registrar, FAILED) == f"cannot serve {CPU}: another process serves {link}"
            link.unlink()
            await kubelet.wait_allocatable(CPU, 4)
            assert not any(path.exists() for path in dead)
            assert all(path.exists() for path in (*kept, file))


async def test_a_path_that_kubelet_does_not_watch_is_given_up_and_patience_grows(folder: Path) -> None:
    """Until a stream lasts; each time another path."""
    kubelet, mutes = FakeKubelet(folder), itertools.count()
    shelf, paths = Shelf(), set[Path]()
    take = kubelet._take

    def take_and_forget(endpoint: object) -> None:
        paths.update(own_sockets(kubelet))
        if next(mutes) < 3:
            kubelet._table.ended(endpoint)
        else:
            take(endpoint)

    kubelet._take = take_and_forget
    with capture_logs() as lines:
        async with kubelet, running(Registrar([shelf], kubelet.plugins_folder, pace=QUICK)):
            await shown(kubelet, shelf)
    assert [line["after_s"] for line in lines if line["event"] == "not-watched"] == [0.1, 0.2, 0.4]
    assert len(paths) == 4
