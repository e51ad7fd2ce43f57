"""Kernel notifications that the machine has changed, in coalesced batches, and a slow tick for unannounced changes.

Promises: no thread; one MachineChange per burst of events; lost events (a full socket buffer) are reported as a resync.
Without netlink (no permission, a private network namespace) the ticks continue.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from nodeagent.errors import HostError

if TYPE_CHECKING:
    import pyudev

SUBSYSTEMS = (
    *("accel", "auxiliary", "block", "cpu", "dax", "drm", "dsa", "fpga_manager", "fpga_region", "hidraw"),
    *("infiniband", "infiniband_verbs", "kfd", "memory", "misc", "net", "node", "nvme", "pci", "sound"),
    *("tty", "usb", "usbmisc", "vdpa", "vfio", "vfio-dev", "video4linux"),
)
"""Subsystems that can change the inventory. Hugepage pools send no events; the resync finds their changes."""
Source = Literal["udev", "kernel"]
_CONTROL = "/run/udev/control"
_BUFFER_BYTES = 16 << 20


class Uevent(msgspec.Struct, frozen=True, kw_only=True):
    """One event. action: add, remove, change, bind, unbind, online, offline, move."""

    action: str
    subsystem: str
    path: str
    """Path below /sys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineChange:
    """A reason to read the machine again. events: each once, in order; empty for a resync."""

    reason: Literal["udev", "resync"]
    events: tuple[Uevent, ...] = ()
    lost: bool = False
    """The kernel dropped events: anything may have changed."""
    arrived_s: float | None = field(default=None, compare=False)
    """When the first event came (time.monotonic); None for a resync."""


def source(control: str = _CONTROL) -> Source:
    """Return "udev" if udevd runs (its events arrive once its rules are done), else "kernel"."""
    return "udev" if Path(control).exists() else "kernel"


async def watch(
    *,
    resync_s: float = 60.0,
    quiet_s: float = 0.02,
    longest_s: float = 0.1,
    subsystems: Iterable[str] = SUBSYSTEMS,
    origin: Source | None = None,
) -> AsyncGenerator[MachineChange, None]:
    """Yield a MachineChange when a burst has been quiet for quiet_s, at the latest longest_s after its first event, and
    one every resync_s. Raise HostError if the event socket cannot be opened; `ticks` works without one."""
    loop = asyncio.get_running_loop()
    inbox = _Inbox(_open(origin or source(), subsystems))
    loop.add_reader(inbox.fileno(), inbox.drain)
    try:
        resync_at = loop.time() + resync_s
        while True:
            if await _arrives(inbox.arrived, resync_at):
                await _settle(inbox.arrived, quiet_s, longest_s)
                yield inbox.take()
            else:
                resync_at = loop.time() + resync_s
                yield MachineChange(reason="resync")
    finally:
        loop.remove_reader(inbox.fileno())


async def ticks(resync_s: float = 60.0) -> AsyncGenerator[MachineChange, None]:
    """Yield only resyncs, for a machine whose events cannot be received."""
    while True:
        await asyncio.sleep(resync_s)
        yield MachineChange(reason="resync")


class _Inbox:
    """The events received since the last take."""

    def __init__(self, monitor: pyudev.Monitor) -> None:
        self._monitor = monitor
        self._events: dict[Uevent, None] = {}
        self._lost = False
        self._broken: OSError | None = None
        self._arrived_s: float | None = None
        self.arrived = asyncio.Event()

    def fileno(self) -> int:
        return int(self._monitor.fileno())

    def drain(self) -> None:
        """Receive everything that is readable; the event loop calls this."""
        try:
            while (device := self._receive()) is not None:
                self._arrived_s = self._arrived_s or time.monotonic()
                self._events[Uevent(action=device.action, subsystem=device.subsystem, path=device.device_path)] = None
                self.arrived.set()
        except OSError as error:
            self._broken = error
            self.arrived.set()

    def take(self) -> MachineChange:
        """Return everything received since the last take. Raise HostError if the socket is broken."""
        if self._broken is not None:
            raise HostError(f"cannot listen to events: {self._broken}")
        events, lost = tuple(self._events), self._lost
        arrived_s = self._arrived_s
        self._events, self._lost, self._arrived_s = {}, False, None
        self.arrived.clear()
        return MachineChange(reason="resync" if lost else "udev", events=events, lost=lost, arrived_s=arrived_s)

    def _receive(self) -> pyudev.Device | None:
        """Return the next event. pyudev reports only that the socket has an error; which one must
        be read once from the socket."""
        try:
            return self._monitor.poll(timeout=0)
        except OSError:
            if _pending_error(self.fileno()) != errno.ENOBUFS:
                raise
        self._lost = True
        self.arrived.set()
        return self._monitor.poll(timeout=0)


def _pending_error(handle: int) -> int:
    with socket.socket(fileno=os.dup(handle)) as same:
        return same.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _open(origin: Source, subsystems: Iterable[str]) -> pyudev.Monitor:
    import pyudev  # 30 ms and 2 MiB (ctypes and libudev): only listeners pay for it

    try:
        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), origin)
        for name in subsystems:
            monitor.filter_by(name)
        with contextlib.suppress(OSError):  # needs CAP_NET_ADMIN; the default size only overflows sooner
            monitor.set_receive_buffer_size(_BUFFER_BYTES)
        monitor.start()
    except (OSError, ImportError) as error:
        raise HostError(f"cannot listen to {origin} events: {error}") from error
    return monitor


async def _arrives(arrived: asyncio.Event, at: float) -> bool:
    try:
        async with asyncio.timeout_at(at):
            await arrived.wait()
    except TimeoutError:
        return False
    return True


async def _settle(arrived: asyncio.Event, quiet_s: float, longest_s: float) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + longest_s
    while (now := loop.time()) < end:
        arrived.clear()
        if not await _arrives(arrived, min(now + quiet_s, end)):
            return
