"""Unix sockets with gRPC on them: what the adapters rely on."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import tempfile
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.device_plugin import DevicePluginServer
from nodeagent.pb import deviceplugin_pb2 as pb
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.support import channels
from tests.support.shelf import Shelf


async def test_a_refused_connection_holds_up_no_other_channel(folder: Path) -> None:
    """By default all channels of a process wait together, for a second and more."""
    server = DevicePluginServer(Shelf(), folder)
    async with channels.channel(server.path) as first:
        with pytest.raises(grpc.aio.AioRpcError):
            await rpc.DevicePluginStub(first).GetDevicePluginOptions(pb.Empty())
        await server.start()
        async with channels.channel(server.path) as second:
            await rpc.DevicePluginStub(second).GetDevicePluginOptions(pb.Empty(), timeout=0.5)
    await server.stop()


def test_a_socket_is_served_while_somebody_listens(folder: Path) -> None:
    """Not a plain file, not a dead socket; a full queue is a server too."""
    path = folder / "s"
    assert not sockets.is_served(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert not sockets.is_served(path)
        server.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(str(path))
        assert sockets.is_served(path)
        for one in waiting:
            one.close()
    assert not sockets.is_served(path)
    path.unlink()
    path.touch()
    assert not sockets.is_served(path)


def test_only_a_socket_that_nobody_listens_on_is_dead(folder: Path) -> None:
    """Not one whose queue is full, nothing that is no socket, not what is missing."""
    path = folder / "s"
    assert not sockets.is_dead(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(str(path))
        assert not sockets.is_dead(path)
        for one in waiting:
            one.close()
    assert sockets.is_dead(path)
    (folder / "link").symlink_to(path)
    (folder / "file").touch()
    assert not any(map(sockets.is_dead, (folder / "link", folder / "file", folder)))


def test_what_cannot_be_seen_has_a_reason_and_no_identity(folder: Path) -> None:
    """In the kernel's words."""
    loop = folder / "loop"
    loop.symlink_to(loop)
    for path, reason in (
        (folder / "none", "No such file or directory"),
        (loop, "Too many levels of symbolic links"),
    ):
        assert sockets.identity(path) is None
        assert sockets.absence(path) == reason
    assert sockets.identity(folder) is not None
    assert sockets.absence(folder) == ""


async def test_a_stop_or_start_that_is_cancelled_is_cancelled_at_any_moment(folder: Path) -> None:
    """gRPC's own stop returns as if nothing had happened where the cancellation comes with its end."""
    dice, lost = random.Random(1), []

    async def up_and_down() -> None:
        while True:
            server = await sockets.serve(folder / "s", lambda one: None)
            await sockets.stop(server, 1.0)

    for turn in range(500):
        task = asyncio.create_task(up_and_down())
        for _ in range(dice.randrange(60)):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=2)
        if not done:
            lost.append(turn)
            task.cancel()
    assert lost == []


def bound(path: Path) -> None:
    """A socket that no process serves, as a process leaves it that was killed."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def test_a_socket_is_the_same_whatever_is_done_to_it(folder: Path) -> None:
    """Touched, with another mode, owner or name for a while: one sighting, with its inode."""
    path = folder / "s"
    bound(path)
    with sockets.SocketWatch(path) as watch:
        seen = watch.look()
        assert seen is not None and seen.inode == path.stat().st_ino
        for change in (os.utime, lambda one: one.chmod(0o600), lambda one: os.chown(one, 0, 1)):
            change(path)
            assert watch.look() == seen
        path.rename(folder / "aside")
        assert watch.look() is None
        (folder / "aside").rename(path)
        assert watch.look() == seen


@given(st.lists(st.sampled_from(["bind", "touch", "remove", "aside", "back", "look", "look"]), max_size=40))
def test_each_new_socket_is_told_from_all_others(steps: list[str]) -> None:
    """However soon the file system uses an inode's number again; against a list kept by hand."""
    with tempfile.TemporaryDirectory(prefix="na-") as folder:
        path, aside = Path(folder) / "s", Path(folder) / "aside"
        here, there, born = 0, 0, 0
        sightings: dict[int, sockets.SocketIdentity] = {}
        with sockets.SocketWatch(path) as watch:
            for step in steps:
                if step == "bind":
                    path.unlink(missing_ok=True)
                    bound(path)
                    here = born = born + 1
                elif step == "touch" and here:
                    os.utime(path)
                elif step == "remove":
                    path.unlink(missing_ok=True)
                    here = 0
                elif step == "aside" and here:
                    path.rename(aside)
                    here, there = 0, here
                elif step == "back" and there:
                    aside.rename(path)
                    here, there = there, 0
                elif step == "look":
                    seen = watch.look()
                    assert (seen is None) == (here == 0)
                    if seen is not None:
                        assert all(one != seen for number, one in sightings.items() if number != here)
                        sightings[here] = seen


def test_a_watch_holds_one_descriptor_and_lets_it_go(folder: Path) -> None:
    """Over a hundred sockets; none is connected to."""
    path, before = folder / "s", open_files()
    with sockets.SocketWatch(path) as watch:
        assert open_files() == before
        for _ in range(100):
            path.unlink(missing_ok=True)
            bound(path)
            watch.look()
            assert open_files() == before + 1
    assert open_files() == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
