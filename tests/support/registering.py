"""A registrar at work alongside a kubelet, for tests: what is run, what is broken, and what has to hold at the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from nodeagent.kube.kubelet.device_plugin_sockets import PluginPaths
from nodeagent.kube.kubelet.registration import Registrar, RegistrationState, RegistrationTiming
from tests.doubles.kubelet import FakeKubelet
from tests.support.shelf import CPU, Shelf

QUICK = RegistrationTiming(
    first_retry_s=0.02,
    last_retry_s=0.1,
    unwatched_s=0.1,
    unwatched_most_s=0.4,
    clean_up_s=0.06,
    poll_s=1.0,
    register_s=5.0,
)
AGAIN_S = 2.0
"""How soon a resource has to be allocatable again, whatever happened to it."""


@contextlib.asynccontextmanager
async def running(registrar: Registrar) -> AsyncIterator[Registrar]:
    """The registrar at work; it must have no error when it ends."""
    task = asyncio.create_task(registrar.run())
    try:
        yield registrar
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def in_state(registrar: Registrar, state: RegistrationState) -> str:
    """Return once the first resource is in a state: the reason."""
    seen = 0
    while registrar.registrations()[0].state != state:
        seen = await registrar.changed(seen)
    return registrar.registrations()[0].reason


async def shown(kubelet: FakeKubelet, shelf: Shelf, *, within_s: float = AGAIN_S, end_noticed: bool = True) -> None:
    """Return once kubelet shows exactly what is advertised, from one living plugin; `end_noticed`: whose end it will
    notice."""

    def wrong() -> str:
        ids, now = [one.id for one in shelf.advertised() if one.healthy], kubelet.healthy(shelf.name)
        connected, served = [one.path for one in kubelet.connections(shelf.name)], own_sockets(kubelet, shelf.name)
        if now != ids or connected != served or [kubelet.endpoints[shelf.name].path] != served:
            return f"{len(now)} of {len(ids)} devices are shown, connected: {connected}, served: {served}"
        return f"stranded: {kubelet.stranded()}" if end_noticed and kubelet.stranded() else ""

    try:
        async with asyncio.timeout(within_s):
            await kubelet.until(lambda: not wrong())
    except TimeoutError:
        raise AssertionError(f"after {within_s:g} s: {wrong()}") from None


def own_sockets(kubelet: FakeKubelet, resource: str = CPU) -> list[Path]:
    """The plugin sockets of a resource that lie in the folder."""
    return [*PluginPaths(kubelet.plugins_folder, resource).existing()]


def leave_dead_socket(folder: Path, resource: str = CPU) -> Path:
    """What a plugin leaves that was killed."""
    path = PluginPaths(folder, resource).fresh()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    return path
