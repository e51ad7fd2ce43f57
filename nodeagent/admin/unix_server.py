"""The status socket's end: an HTTP server on a unix socket, for its owner and one group."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

import structlog

from nodeagent.admin.http import Handler
from nodeagent.admin.listener import HttpListener
from nodeagent.errors import HostError

_ACCESS_LIST, _ACCESS_LIST_VERSION = "system.posix_acl_access", 2
log = structlog.get_logger()


class UnixHttpServer:
    """Serves one socket. Building it binds nothing; it can be started again after a stop."""

    def __init__(self, path: Path, handler: Handler, *, group_id: int | None = None) -> None:
        """group_id: members of this group may connect, in addition to root and the agent's own user."""
        self.path = path
        self.listener = HttpListener(handler)
        self._group_id = group_id
        self._bound: tuple[int, int] | None = None

    @property
    def lost(self) -> bool:
        """Return whether the file at the path is not the socket being served."""
        return not self.listener.serving or _inode(self.path) != self._bound

    def start(self) -> None:
        """Serve. Raise HostError if the socket cannot be created."""
        bound = _bind(self.path, self._group_id)
        self._bound = _inode(self.path)
        self.listener.start(bound)

    async def stop(self) -> None:
        """Disconnect every client and remove the socket."""
        if not self.listener.serving:
            return
        await self.listener.stop()
        if _inode(self.path) == self._bound:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _bind(path: Path, group_id: int | None) -> socket.socket:
    """Bind next to the path and rename, so that no half-made socket is visible and a stale one is never in the way."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        bound.bind(str(draft))
        draft.chmod(0o600)
        if group_id is not None:
            _allow(draft, group_id)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # a container's mount of a socket that does not exist yet leaves an empty folder
        draft.rename(path)
    except OSError as error:
        bound.close()
        with contextlib.suppress(OSError):
            draft.unlink()
        raise HostError(f"cannot serve {path}: {error.strerror or error}") from None
    return bound


def _allow(path: Path, group_id: int) -> None:
    """Let the members of a group connect to a socket, by an access list (acl(5)): the owner of a file needs no
    capability for that, as for changing its group. On a file system without access lists, change the group; if that is
    not allowed either, the socket stays the owner's alone, which is logged."""
    try:
        os.setxattr(path, _ACCESS_LIST, _access_list(group_id))
    except OSError as without_lists:
        try:
            os.chown(path, -1, group_id)
            path.chmod(0o660)
        except OSError as error:
            reasons = f"{without_lists.strerror}; {error.strerror}"
            log.warning("status-group-not-let-in", group_id=group_id, reason=reasons)


def _access_list(group_id: int) -> bytes:
    """Return an access list by which the owner and one group may read and write, as the kernel stores it
    (include/uapi/linux/posix_acl_xattr.h, posix_acl.h)."""
    user, owning_group, group, mask, other, none = 0x01, 0x04, 0x08, 0x10, 0x20, 0xFFFFFFFF
    entries = ((user, 6, none), (owning_group, 0, none), (group, 6, group_id), (mask, 6, none), (other, 0, none))
    return struct.pack("<I", _ACCESS_LIST_VERSION) + b"".join(struct.pack("<HHI", *one) for one in entries)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
