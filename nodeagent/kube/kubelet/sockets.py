"""Unix sockets with gRPC on them. Serving copes with stale files, and reports what does prevent it.

One socket is distinguished from the next at the same path by its inode number alone: times, mode and owner change
without any restart. File systems reuse an inode number as soon as the inode is gone, so inodes are compared only while
something keeps them alive: a served socket keeps its own, a SocketWatch that of another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from nodeagent.errors import ConfigError, HostError
from nodeagent.kube.rpc.server import Server

LONGEST_PATH_BYTES = 107
"""sockaddr_un.sun_path without its terminating zero byte (unix(7))."""

_PEER = struct.Struct("iII")
"""struct ucred: pid, uid, gid."""


class Identity(NamedTuple):
    """Identity of the socket at a path. Compare it only while the socket is served or pinned, so its inode exists."""

    device: int
    inode: int


def identity(path: Path) -> Identity | None:
    """Return the identity of the file at `path`, or None if it cannot be seen (`absence` gives the cause)."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return Identity(found.st_dev, found.st_ino)
    return None


class SocketIdentity(NamedTuple):
    """One socket of another process, as a SocketWatch saw it: different from every other socket that watch sees."""

    number: int
    """How many sockets the watch has seen at the path, including this one."""
    inode: int


class SocketWatch:
    """Reports which of another process's sockets is at a path: a new one always yields another SocketIdentity.

    The inode seen last is kept open (O_PATH, which does not connect), so its number is not reused, even while nothing
    is at the path. Building a watch opens nothing; close() releases the inode.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pinned: int | None = None
        self._seen = SocketIdentity(0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def look(self) -> SocketIdentity | None:
        """Return which socket is at the path now, or None if none can be seen (`absence` gives the cause)."""
        try:
            if not self._is_pinned(self.path.stat()):
                self._pin(os.open(self.path, os.O_PATH))
        except OSError:
            return None
        return self._seen

    def close(self) -> None:
        """Release the socket seen last; whatever look() sees afterwards counts as another one."""
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            os.close(pinned)

    def _is_pinned(self, found: os.stat_result) -> bool:
        return self._pinned is not None and os.path.samestat(found, os.fstat(self._pinned))

    def _pin(self, handle: int) -> None:
        found = os.fstat(handle)
        if self._is_pinned(found):
            os.close(handle)
            return
        self.close()
        self._pinned = handle
        self._seen = SocketIdentity(self._seen.number + 1, found.st_ino)


def absence(path: Path) -> str:
    """Return why nothing can be seen at `path`, in the kernel's words, or "" if something is there."""
    try:
        path.stat()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def listener(path: Path) -> int | None:
    """Return the PID of the process listening at `path`, or None if there is none. Does not block.

    The PID is 0 if the process is in a PID namespace that is not visible from here (unix(7), SO_PEERCRED).
    """
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.setblocking(False)
        probe.connect(str(path))
        pid: int = _PEER.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        return pid
    return None


def is_served(path: Path) -> bool:
    """Return whether some process accepts connections at `path` now. Does not block."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def is_dead(path: Path) -> bool:
    """Return whether `path` is a socket that, according to the kernel, no process listens on. Does not block.

    In any other doubt the socket counts as alive.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def checked(path: Path) -> Path:
    """Return the path. Raise ConfigError if it is too long for a socket."""
    length = len(os.fsencode(path))
    if length > LONGEST_PATH_BYTES:
        raise ConfigError(f"cannot use socket {path}: the path has {length} bytes, the limit is {LONGEST_PATH_BYTES}")
    return path


async def serve(path: Path, add: Callable[[Server], None]) -> Server:
    """Return a started server at `path` with the services that `add` registers. Raise HostError with path and cause."""
    checked(path)
    _make_free(path)
    server = Server(path)
    add(server)
    try:
        await server.start()
    except OSError as error:
        raise HostError(f"cannot serve {path}: {error.strerror or error}") from None
    return server


async def stop(server: Server, grace_s: float) -> None:
    """Accept no more calls, let those in progress finish for up to `grace_s`, and remove the socket.

    A cancelled stop continues in the background, and may be called again.
    """
    await asyncio.shield(asyncio.ensure_future(server.stop(grace_s)))


def _make_free(path: Path) -> None:
    """Remove a stale socket. Raise HostError if that fails."""
    try:
        if path.is_symlink() or path.exists():
            path.unlink()
    except OSError as error:
        raise HostError(f"cannot serve {path}: {error.strerror or error}") from None
