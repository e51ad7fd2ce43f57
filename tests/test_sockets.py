"""Unix sockets with gRPC on them: what the adapters rely on."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import pytest
from shelf import Shelf

from nodeagent.kube import sockets
from nodeagent.kube.deviceplugin import Server
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.pb import deviceplugin_pb2_grpc as rpc


async def test_a_refused_connection_holds_up_no_other_channel(folder: Path) -> None:
    """By default all channels of a process wait together, for a second and more."""
    server = Server(Shelf(), folder)
    async with sockets.channel(server.path) as first:
        with pytest.raises(grpc.aio.AioRpcError):
            await rpc.DevicePluginStub(first).GetDevicePluginOptions(pb.Empty())
        await server.start()
        async with sockets.channel(server.path) as second:
            await rpc.DevicePluginStub(second).GetDevicePluginOptions(pb.Empty(), timeout=0.5)
    await server.stop()


def test_a_socket_is_served_while_somebody_listens(folder: Path) -> None:
    """Not a plain file, not a dead socket; a full queue is somebody too."""
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
