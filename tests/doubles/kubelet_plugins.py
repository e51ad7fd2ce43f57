"""Kubelet's tables of device plugins, as its device manager keeps them up to 1.36 and from 1.37 on, flaws included.

What follows from a Register and from the end of a stream was read from pkg/kubelet/cm/devicemanager of 1.30, 1.36.2 and
1.37.2. Needs nothing but gRPC and the generated code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import grpc

from nodeagent.pb import deviceplugin_pb2 as pb
from tests.pb import deviceplugin_pb2_grpc as rpc

_LOCAL = (("grpc.use_local_subchannel_pool", 1),)


class Version(StrEnum):
    """Which kubelet: these two treat a second Register differently."""

    V1_36 = "1.36"
    V1_37 = "1.37"


class AlreadyConnectedError(Exception):
    """What 1.37 says to a Register for a path that it holds to be connected."""


class Endpoint:
    """One registered plugin and the connection to it."""

    def __init__(self, resource: str, path: Path) -> None:
        self.resource = resource
        self.path = path
        self.channel = grpc.aio.insecure_channel(f"unix:{path}", options=_LOCAL)
        self.stub = rpc.DevicePluginStub(self.channel)
        self.options = pb.DevicePluginOptions()
        self.stopped = False
        """Whether kubelet holds it to be gone."""
        self.ended = asyncio.Event()
        """Kubelet has read the end of the stream."""
        self.watcher: asyncio.Task[None] | None = None
        self.stream: Any = None

    def hang_up(self) -> None:
        """Break the connection without a word; the watcher reads the end of the stream."""
        if self.stream is not None:
            self.stream.cancel()

    async def close(self) -> None:
        """Forget it at once: no watcher, no connection."""
        if self.watcher is not None:
            self.watcher.cancel()
            await asyncio.wait({self.watcher})
        await self.channel.close(None)


class PluginTable(Protocol):
    """What kubelet makes of its plugins, by resource."""

    endpoints: dict[str, Endpoint]
    """The one that is asked to allocate."""
    devices: dict[str, dict[str, pb.Device]]
    """The newest list; empty where kubelet has marked all as unhealthy."""

    def begin(self, endpoint: Endpoint) -> None:
        """A Register has come, and its plugin is about to be dialled."""

    def connected(self, endpoint: Endpoint) -> None:
        """The plugin has answered; AlreadyConnectedError."""

    def failed(self, endpoint: Endpoint) -> None:
        """The plugin could not be connected."""

    def ended(self, endpoint: Endpoint) -> Endpoint | None:
        """A stream has ended: clean up; who is hung up on."""

    def stranded(self) -> list[Path]:
        """The paths of plugins whose end will change nothing."""


class TableByName:
    """Up to 1.36: the newest Register wins, and the older plugin's stream goes on. What ends or fails takes along
    whichever plugin its resource has by then."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.devices: dict[str, dict[str, pb.Device]] = {}
        self._clients: dict[str, Endpoint] = {}

    def begin(self, endpoint: Endpoint) -> None:
        self._clients[endpoint.resource] = endpoint

    def connected(self, endpoint: Endpoint) -> None:
        self.endpoints[endpoint.resource] = endpoint

    def failed(self, endpoint: Endpoint) -> None:
        self._clients.pop(endpoint.resource, None)

    def ended(self, endpoint: Endpoint) -> Endpoint | None:
        client = self._clients.pop(endpoint.resource, None)
        if client is not None:
            self.devices[endpoint.resource] = {}
            self.endpoints[endpoint.resource].stopped = True
        return client

    def stranded(self) -> list[Path]:
        return [one.path for name, one in self.endpoints.items() if not (one.stopped or name in self._clients)]


class TableByPath:
    """From 1.37: a path is taken once. A Register for a path that is taken is refused, and makes kubelet forget the
    client whose end would free it: the path is lost, and its devices are shown indefinitely."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.devices: dict[str, dict[str, pb.Device]] = {}
        self._clients: dict[str, list[Endpoint]] = {}
        self._taken: dict[str, dict[Path, Endpoint]] = {}

    def begin(self, endpoint: Endpoint) -> None:
        self._clients.setdefault(endpoint.resource, []).append(endpoint)

    def connected(self, endpoint: Endpoint) -> None:
        taken = self._taken.setdefault(endpoint.resource, {})
        if endpoint.path in taken:
            raise AlreadyConnectedError(f"device plugin already connected: {endpoint.path}")
        taken[endpoint.path] = self.endpoints[endpoint.resource] = endpoint

    def failed(self, endpoint: Endpoint) -> None:
        clients = self._clients.get(endpoint.resource, [])
        self._clients[endpoint.resource] = [one for one in clients if one.path != endpoint.path]

    def ended(self, endpoint: Endpoint) -> Endpoint | None:
        clients = self._clients.get(endpoint.resource, [])
        client = next((one for one in clients if one.path == endpoint.path), None)
        if client is None:
            return None
        self.failed(endpoint)
        taken = self._taken.get(endpoint.resource, {})
        if (gone := taken.pop(endpoint.path, None)) is not None:
            gone.stopped = True
            self._promote(endpoint.resource, taken)
        return client

    def stranded(self) -> list[Path]:
        known = {one.path for clients in self._clients.values() for one in clients}
        return [path for taken in self._taken.values() for path in taken if path not in known]

    def _promote(self, resource: str, left: Mapping[Path, Endpoint]) -> None:
        if left:
            self.endpoints[resource] = next(iter(left.values()))
        else:
            self.devices[resource] = {}


def table_of(version: Version) -> PluginTable:
    """An empty table, as a kubelet has that has just started."""
    return TableByPath() if version is Version.V1_37 else TableByName()
