"""Unix sockets with gRPC on them, both ends. Serving is robust: a stale file is no obstacle, and what is one is named.

gRPC removes the file of a socket when its server stops, whoever the file belongs to by then: a server is stopped before
its successor binds the same path.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import grpc

from nodeagent.errors import ConfigError, HostError

LONGEST_PATH_BYTES = 107
"""sockaddr_un.sun_path less its final zero byte (unix(7))."""

_PEER = struct.Struct("iII")
"""struct ucred: process, user, group."""
_CHANNEL_OPTIONS = (
    # Channels share connections by default, and with them a back-off of seconds after a refused one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Identity(NamedTuple):
    """Which socket lies at a path. The inode alone is not enough: file systems use numbers again at once."""

    device: int
    inode: int
    changed_ns: int


def identity(path: Path) -> Identity | None:
    """Which file lies at `path`; None where it cannot be seen (`absence` says why)."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return Identity(found.st_dev, found.st_ino, found.st_mtime_ns)
    return None


def absence(path: Path) -> str:
    """Why nothing can be seen at `path`, in the kernel's words; "" where something is there."""
    try:
        path.stat()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def listener(path: Path) -> int | None:
    """The process that listens at `path`; None where none does. Does not block.

    0 where it is in a PID namespace that cannot be seen from here (unix(7), SO_PEERCRED).
    """
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.setblocking(False)
        probe.connect(str(path))
        pid: int = _PEER.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        return pid
    return None


def is_served(path: Path) -> bool:
    """Whether some process accepts connections at `path` at this moment. Does not block."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def checked(path: Path) -> Path:
    """The path itself; ConfigError where it is too long for a socket."""
    length = len(os.fsencode(path))
    if length > LONGEST_PATH_BYTES:
        raise ConfigError(f"cannot use socket {path}: the path has {length} bytes, the limit is {LONGEST_PATH_BYTES}")
    return path


async def serve(path: Path, add: Callable[[grpc.aio.Server], None]) -> grpc.aio.Server:
    """A started server at `path`, with the services that `add` gives it; HostError with path and cause."""
    checked(path)
    _make_free(path)
    server = grpc.aio.server()
    add(server)
    try:
        server.add_insecure_port(_address(path))
    except RuntimeError as error:
        raise HostError(f"cannot serve {path}: {_why_not(path) or error}") from None
    await server.start()
    return server


def channel(path: Path, *, largest_answer_bytes: int = 4 << 20) -> grpc.aio.Channel:
    """A channel to the socket at `path`; it connects with its first call."""
    limit = ("grpc.max_receive_message_length", largest_answer_bytes)
    return grpc.aio.insecure_channel(_address(path), options=(*_CHANNEL_OPTIONS, limit))


def cause(error: grpc.aio.AioRpcError) -> str:
    """A failed call as one line: the status code and what the peer said."""
    return f"{error.code().name}: {error.details()}"


def _address(path: Path) -> str:
    return f"unix:{quote(os.fsencode(path))}"


def _make_free(path: Path) -> None:
    """Remove a stale socket."""
    try:
        if path.is_symlink() or path.exists():
            path.unlink()
    except OSError as error:
        raise HostError(f"cannot serve {path}: {error.strerror or error}") from None


def _why_not(path: Path) -> str:
    """Why no socket can be bound at a path: gRPC's own error does not carry the cause."""
    try:
        with socket.socket(socket.AF_UNIX) as trial:
            trial.bind(str(path))
        path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""
