"""Real events of the kernel: written to a device's uevent file, received over netlink."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pyudev

from nodeagent.host import uevents as udev
from nodeagent.host.uevents import MachineChange, Uevent

FILES = ("/sys/class/misc/fuse/uevent", "/sys/class/tty/tty0/uevent", "/sys/class/misc/vga_arbiter/uevent")
DEADLINE_S = 10.0


def _writable() -> Path | str:
    """A uevent file that makes the kernel announce its device again, or why there is none."""
    for name in FILES:
        file = Path(name)
        try:
            file.write_text("change\n")
        except OSError as error:
            reason = f"cannot make the kernel send events: {name}: {error.strerror}"
            continue
        return file
    return reason


@pytest.fixture
def device() -> Path:
    found = _writable()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@contextlib.asynccontextmanager
async def watching(**options: Any) -> AsyncIterator[AsyncIterator[MachineChange]]:
    """A running watch on the kernel's own events, ended afterwards."""
    changes = udev.watch(origin="kernel", **options)
    async with contextlib.aclosing(changes):
        yield changes


async def _next_with(changes: AsyncIterator[MachineChange], path: str) -> MachineChange:
    """The next change that names a device; the machine may have news of its own meanwhile."""
    async with asyncio.timeout(DEADLINE_S):
        async for change in changes:
            if any(event.path == path for event in change.events):
                return change
    raise AssertionError("the watch ended")


def announce(device: Path, action: str = "change") -> None:
    """Make the kernel send an event for the device."""
    device.write_text(f"{action}\n")


def _subsystem(device: Path) -> str:
    return device.resolve().parent.parent.name


def _path(device: Path) -> str:
    return str(device.resolve().parent).removeprefix("/sys")


async def _listening(changes: AsyncIterator[MachineChange]) -> asyncio.Task[MachineChange]:
    """Begin to wait: the socket is open as soon as the task has had its first turn."""
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    return waiting


async def test_an_event_of_the_kernel_becomes_a_change(device: Path) -> None:
    """With its action, subsystem and path."""
    async with watching() as changes:
        waiting = await _listening(changes)
        announce(device)
        change = await asyncio.wait_for(waiting, DEADLINE_S)
        if _path(device) not in {event.path for event in change.events}:
            change = await _next_with(changes, _path(device))
    assert change.reason == "udev"
    assert not change.lost
    assert Uevent(action="change", subsystem=_subsystem(device), path=_path(device)) in change.events


async def test_a_burst_is_one_change_with_each_event_once(device: Path) -> None:
    """Fifty writes in a row, two actions."""
    async with watching(quiet_s=0.2, longest_s=5.0) as changes:
        waiting = await _listening(changes)
        for action in ["change", "add"] * 25:
            announce(device, action)
        change = await asyncio.wait_for(waiting, DEADLINE_S)
    ours = [event.action for event in change.events if event.path == _path(device)]
    assert ours == ["change", "add"]


async def test_a_change_is_told_at_the_longest_delay_however_long_quiet_takes(device: Path) -> None:
    """So that a storm of events cannot hold it back."""
    async with watching(quiet_s=30.0, longest_s=0.1) as changes:
        waiting = await _listening(changes)
        announce(device)
        change = await asyncio.wait_for(waiting, DEADLINE_S)
    assert change.reason == "udev"


async def test_other_subsystems_are_not_heard(device: Path) -> None:
    """A watch on block devices stays silent for others: its first word is the resync."""
    async with watching(subsystems=("block",), resync_s=0.3) as changes:
        waiting = await _listening(changes)
        announce(device)
        change = await asyncio.wait_for(waiting, DEADLINE_S)
    assert _path(device) not in {event.path for event in change.events}


async def test_without_events_there_is_a_resync_again_and_again() -> None:
    """The safety net, for what is never announced."""
    async with watching(subsystems=("no-such-subsystem",), resync_s=0.05) as changes:
        found = [await asyncio.wait_for(anext(changes), DEADLINE_S) for _ in range(3)]
    assert found == [MachineChange(reason="resync")] * 3


async def test_events_that_the_kernel_dropped_are_a_resync_that_says_so(device: Path) -> None:
    """A socket with the smallest buffer, and more events than it holds before anyone reads."""
    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), "kernel")
    monitor.set_receive_buffer_size(1)
    monitor.start()
    for _ in range(100):
        announce(device)
    inbox = udev._Inbox(monitor)
    inbox.drain()
    assert inbox.arrived.is_set()
    change = inbox.take()
    assert (change.reason, change.lost) == ("resync", True)
    assert 0 < len(change.events) <= 100
    announce(device)
    inbox.drain()
    assert inbox.take().reason == "udev"


async def test_ticks_alone_are_enough_where_nothing_can_be_heard() -> None:
    ticks = udev.ticks(0.01)
    assert [await asyncio.wait_for(anext(ticks), DEADLINE_S) for _ in range(2)] == [MachineChange(reason="resync")] * 2


async def test_nothing_is_left_on_the_loop_when_the_watch_ends() -> None:
    """Its socket is closed with it: as many descriptors as before."""
    before = _descriptors()
    async with watching(resync_s=0.01) as changes:
        await asyncio.wait_for(anext(changes), DEADLINE_S)
        assert _descriptors() > before
    assert _descriptors() == before


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_udevs_own_events_are_taken_only_where_udevd_runs(tmp_path: Path) -> None:
    """Its control socket is the sign."""
    control = tmp_path / "control"
    assert udev.source(str(control)) == "kernel"
    control.touch()
    assert udev.source(str(control)) == "udev"
