"""Network namespaces: found by their paths, told apart, and entered for as long as a piece of work takes.

Source: setns(2), ioctl_ns(2). A socket stays in the namespace in which it was made; only a thread made for it enters
one, and ends afterwards.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

from nodeagent.errors import HostError, cause_of

OWN = "/proc/self/ns/net"
_CLONE_NEWNET, _NS_GET_NSTYPE = 0x40000000, 0xB703
_Answer = TypeVar("_Answer")


class NetNamespace:
    """An open network namespace, which exists at least as long as this."""

    def __init__(self, path: str) -> None:
        """Open one. Raise HostError if there is none at the path."""
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"cannot open network namespace {path}: {error.strerror}") from None
        self.path = path
        try:
            kind = fcntl.ioctl(self.fd, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != _CLONE_NEWNET:
            self.close()
            raise HostError(f"cannot open network namespace {path}: it is none")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def is_same(self, other: NetNamespace) -> bool:
        """Return whether two are one."""
        mine, its = os.fstat(self.fd), os.fstat(other.fd)
        return (mine.st_dev, mine.st_ino) == (its.st_dev, its.st_ino)

    def socket(self) -> socket.socket:
        """Return a new socket for rtnetlink in it. Raise HostError, such as without the right to enter it."""
        try:
            return self.run(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0))
        except OSError as error:
            raise HostError(f"cannot talk to the kernel in network namespace {self.path}: {cause_of(error)}") from None

    def run(self, work: Callable[[], _Answer]) -> _Answer:
        """Return what `work` returns, done by a thread that is in the namespace. Raise HostError if none can enter it,
        and whatever `work` raises."""
        answers: list[_Answer] = []
        failed: list[BaseException] = []

        def inside() -> None:
            try:
                _enter(self.fd)
            except OSError as error:
                failed.append(HostError(f"cannot enter network namespace {self.path}: {cause_of(error)}"))
                return
            try:
                answers.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=inside, name="namespace", daemon=True)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return answers[0]


def first_of(paths: Iterable[str]) -> NetNamespace:
    """Return the first namespace of some paths that can be opened. Raise HostError with why none can."""
    errors = []
    for path in paths:
        try:
            return NetNamespace(path)
        except HostError as error:
            errors.append(str(error))
    raise HostError("; ".join(errors) or "cannot open a network namespace: the container runtime names none")


def _enter(fd: int) -> None:
    """Move this thread to a namespace. Raise OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
