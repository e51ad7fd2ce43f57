"""Where a resource is served for kubelet's device-plugin API: at another path each time its server starts.

Since 1.37 kubelet refuses a Register for a path whose stream it holds to be open, and where that stream then ends it
refuses the path until it restarts itself. A path that it has never seen is accepted at once by every version.

What another process serves is never touched; only what the kernel says nobody listens on is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from nodeagent.kube.kubelet import sockets

_TOKEN_BYTES = 4
_TOKEN = rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}"


class PluginPaths:
    """The socket paths of one resource: `nodeagent-RESOURCE-TOKEN.sock` with a new token each time, and a hash in place
    of the resource's name where the path would be too long for a socket.
    """

    def __init__(self, folder: Path, resource: str) -> None:
        """`folder` is kubelet's device-plugins folder; it need not exist. ConfigError where it lies too deep."""
        self._folder = folder
        readable = re.sub(r"[^A-Za-z0-9.-]", "_", resource)
        self._stem = f"nodeagent-{readable}"
        if len(os.fsencode(self._path("0" * 2 * _TOKEN_BYTES))) > sockets.LONGEST_PATH_BYTES:
            self._stem = f"nodeagent-{hashlib.sha256(resource.encode()).hexdigest()[:12]}"
        sockets.checked(self._path("0" * 2 * _TOKEN_BYTES))

    def fresh(self) -> Path:
        """Return a path at which nothing lies, and which no kubelet has been offered."""
        while os.path.lexists(path := self._path(secrets.token_hex(_TOKEN_BYTES))):
            pass
        return path

    def existing(self) -> Iterator[Path]:
        """What lies in the folder under names of this resource, in their order."""
        pattern = re.compile(rf"{re.escape(self._stem)}-{_TOKEN}\.sock")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from (path for path in sorted(self._folder.iterdir()) if pattern.fullmatch(path.name))

    def remove_dead(self) -> bool:
        """Remove the sockets of servers that no longer live; return whether there were any."""
        dead = [path for path in self.existing() if sockets.is_dead(path)]
        for path in dead:
            with contextlib.suppress(OSError):
                path.unlink()
        return bool(dead)

    def served(self) -> Path | None:
        """Return a path of this resource that some process serves at this moment, or None."""
        return next((path for path in self.existing() if sockets.is_served(path)), None)

    def _path(self, token: str) -> Path:
        return self._folder / f"{self._stem}-{token}.sock"
