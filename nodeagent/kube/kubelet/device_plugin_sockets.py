"""Socket paths of a resource's device-plugin server: a different path each time the server starts.

Since 1.37 kubelet refuses a Register for a path whose stream it believes to be open; if that stream then ends, kubelet
refuses the path until kubelet itself restarts. Every version accepts a path it has never seen.

Sockets served by another process are never touched; only a socket that the kernel reports as having no listener is
removed.
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
    """The socket paths of one resource: `nodeagent-RESOURCE-TOKEN.sock` with a new token each time. If that path would
    be too long for a socket, a hash replaces the resource name."""

    def __init__(self, folder: Path, resource: str) -> None:
        """Prepare the paths in `folder`, kubelet's device-plugins folder, which need not exist.

        Raise ConfigError if the folder's path is too long for a socket in it.
        """
        self._folder = folder
        readable = re.sub(r"[^A-Za-z0-9.-]", "_", resource)
        self._stem = f"nodeagent-{readable}"
        if len(os.fsencode(self._path("0" * 2 * _TOKEN_BYTES))) > sockets.LONGEST_PATH_BYTES:
            self._stem = f"nodeagent-{hashlib.sha256(resource.encode()).hexdigest()[:12]}"
        sockets.checked(self._path("0" * 2 * _TOKEN_BYTES))

    def fresh(self) -> Path:
        """Return a path at which no file exists and that no kubelet has been offered."""
        while os.path.lexists(path := self._path(secrets.token_hex(_TOKEN_BYTES))):
            pass
        return path

    def existing(self) -> Iterator[Path]:
        """Yield the existing paths in the folder that carry names of this resource, in order."""
        pattern = re.compile(rf"{re.escape(self._stem)}-{_TOKEN}\.sock")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from (path for path in sorted(self._folder.iterdir()) if pattern.fullmatch(path.name))

    def remove_dead(self) -> bool:
        """Remove the sockets of servers that have died; return whether there were any."""
        dead = [path for path in self.existing() if sockets.is_dead(path)]
        for path in dead:
            with contextlib.suppress(OSError):
                path.unlink()
        return bool(dead)

    def served(self) -> Path | None:
        """Return a path of this resource that some process is serving now, or None."""
        return next((path for path in self.existing() if sockets.is_served(path)), None)

    def _path(self, token: str) -> Path:
        return self._folder / f"{self._stem}-{token}.sock"


def dead_sockets(folder: Path) -> list[Path]:
    """Return the sockets of all resources, in order, whose servers have died."""
    pattern = re.compile(rf"nodeagent-.+-{_TOKEN}\.sock")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name) and sockets.is_dead(path)]
    return []
