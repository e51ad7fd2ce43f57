"""Keeps every resource registered with kubelet indefinitely, even if kubelet starts late, restarts, empties its folder
or forgets.

Each resource has its own task, so none waits for another. The next step of a resource is decided in register_steps.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.revision import Revision
from nodeagent.kube.kubelet import device_plugin as deviceplugin
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.registration_state import DEFAULT_PACE, Registration, RegistrationState, RegistrationTiming
from nodeagent.kube.kubelet.resource_keeper import PluginKeeper

__all__ = [
    "FAILED",
    "KUBELET_SOCKET",
    "REGISTERED",
    "WAITING",
    "Registrar",
    "Registration",
    "RegistrationState",
    "RegistrationTiming",
]

KUBELET_SOCKET = "kubelet.sock"
WAITING, REGISTERED, FAILED = RegistrationState


class Registrar:
    """Serves the resources in the device-plugins folder and keeps them registered while run() is running."""

    def __init__(
        self, resources: Sequence[deviceplugin.Resource], folder: Path, *, pace: RegistrationTiming = DEFAULT_PACE
    ) -> None:
        """Set up without starting anything. Raise ConfigError if a socket's path would be too long."""
        self._folder = folder
        self._pace = pace
        self._revision = Revision()
        self._kubelet = sockets.SocketWatch(sockets.checked(folder / KUBELET_SOCKET))
        self._plugins = [PluginKeeper(one, self._kubelet, pace, self._revision.bump) for one in resources]

    def registrations(self) -> tuple[Registration, ...]:
        """Return the registration status of each resource, in the order given."""
        return tuple(plugin.registration for plugin in self._plugins)

    @property
    def ready(self) -> bool:
        """Return whether kubelet has accepted and watches every resource."""
        return all(one.ready for one in self.registrations())

    async def changed(self, seen: int) -> int:
        """Return the version of registrations(), counted from 1, as soon as it differs from `seen` (0: immediately)."""
        return await self._revision.changed(seen)

    async def wait_ready(self) -> None:
        """Wait until every resource is ready."""
        while not self.ready:
            await self.changed(self._revision.value)

    async def run(self) -> None:
        """Keep everything registered until cancelled.

        Then end all streams, remove the sockets, and return once kubelet has had time to notice.
        """
        with self._kubelet:
            try:
                async with asyncio.TaskGroup() as tasks:
                    # The watch first: what it finds at the start must not interrupt an attempt in progress.
                    tasks.create_task(self._watch())
                    for plugin in self._plugins:
                        tasks.create_task(plugin.keep())
            finally:
                await asyncio.gather(*(plugin.end() for plugin in self._plugins))

    async def _watch(self) -> None:
        before: sockets.SocketIdentity | None = None
        with FolderWatch(self._folder, poll_s=self._pace.poll_s) as folder:
            while True:
                kubelet = self._kubelet.look()
                for plugin in self._plugins:
                    if kubelet != before or plugin.server.lost:
                        plugin.interrupt()
                before = kubelet
                await folder.wait()
