"""Connects NVMe targets for claims and disconnects them, each step recorded before it is taken.

Every step looks at what is there, so that after a crash at any point the same call completes what it had begun. A
connection that the agent has not recorded is of an admin or another program: it is neither used nor ended. The kernel
makes no second connection of a host to the same port of a subsystem (EALREADY), so what it says to have made is the
agent's own.

A connection that has ended leaves its name, and those of its disks, to the next one. So no container can be handed the
disks of an ended one from before the kernel is asked for another.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.aio.reads import Reads
from nodeagent.core.fabrics.target import Host, Port, Secrets, Timeouts, options
from nodeagent.core.model.device import ContainerEdits, DeviceNode
from nodeagent.errors import HostError
from nodeagent.host.fabrics.connections import LIVE, Connection, Connections
from nodeagent.host.fabrics.kernel import HostKernel, Kernel
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.fabrics.journal import Connected, FabricsJournal

CONNECT_S = 15.0
"""How long the kernel may take to connect, and how long again the disks to appear. Kubelet waits 45 s."""
DISKS_S = 10.0
POLL_S = 0.05
SETTLE_S = 0.3
"""How long the disks of a target have to stay the same: the kernel adds them one after another."""
log = structlog.get_logger()


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A target as a claim wants it connected."""

    device: str
    claim: str
    grant: str
    port: Port
    host: Host
    timeouts: Timeouts
    secrets: Secrets


class _Outcome(msgspec.Struct, frozen=True):
    """What a call of the kernel returned, or what it raised."""

    controller: str = ""
    error: BaseException | None = None


class Connector:
    """One caller at a time, on the node too."""

    def __init__(
        self,
        journal: FabricsJournal,
        connections: Connections,
        has_node: Callable[[str], bool],
        hide: Callable[[], Awaitable[None]],
        *,
        connect_s: float = CONNECT_S,
        disks_s: float = DISKS_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        """has_node: returns whether /dev has a disk. hide: called after disks were forgotten; returns once no file of a
        claim hands them over. The times are deadlines, in seconds."""
        self._journal = journal
        self._connections = connections
        self._has_node = has_node
        self._hide = hide
        # A read is given up once it has made no progress from one look to the next.
        self._calls: Reads[str, _Outcome] = Reads(connect_s / 2)
        self._connect_s, self._disks_s, self._settle_s = connect_s, disks_s, settle_s
        self._hanging: frozenset[str] = frozenset()
        """Devices of the last call that the kernel is still connecting although no caller waits for it."""

    def records(self, *, certain: bool = False) -> Mapping[str, Connected]:
        """Return what is recorded, by device. certain: raise HostError if that cannot be told for the moment."""
        return self._journal.read(certain=certain)

    def standing(self, record: Connected) -> Connection | None:
        """Return the connection of a record, or None if there is none. If the kernel's answer was lost, it is the one
        to this port under this host's name: before it was asked, there was none."""
        if record.controller:
            return self._connections.find(record.controller, record.port)
        every = (one for one in self._connections.to(record.port.nqn) if one.port == record.port)
        return next((one for one in every if record.hostnqn in ("", one.hostnqn)), None)

    # ---------------------------------------------------------------- for a claim

    async def connect(self, wanted: Wanted) -> bool:
        """Have a target connected for a claim, with its disks. Return whether anything was changed. Raise HostError;
        what was begun in this call is undone, as far as it can be. What an earlier call has connected for the same
        grant is kept, whatever is configured now: containers may use it."""
        record = self._journal.read().get(wanted.device)
        if record is not None and record.claim != wanted.claim:
            raise HostError(f"cannot connect {wanted.port}: it is still connected for claim {record.claim}")
        there = await asyncio.to_thread(self.standing, record) if record is not None else None
        if record is not None and there is not None and record.grant == wanted.grant:
            if record.edits is None or record.edits != _edits(there.disks):
                host = replace(wanted.host, nqn=record.hostnqn)
                await self._with_disks(replace(wanted, port=record.port, host=host), there)
                return True
            return False
        if record is not None:  # it has ended, or the claim was allocated again
            await self._end(record)
        there = await self._made(wanted)
        try:
            await self._with_disks(wanted, there)
        except HostError as error:
            left = await self.disconnect([wanted.device])
            raise HostError("; ".join([str(error), *left.values()])) from None
        log.info("target-connected", device=wanted.device, controller=there.name, claim=wanted.claim)
        return True

    async def _made(self, wanted: Wanted) -> Connection:
        if others := await asyncio.to_thread(self._connections.to, wanted.port.nqn):
            names = ", ".join(one.name for one in others)
            raise HostError(
                f"cannot connect {wanted.port}: the node is connected to it already as {names}, and not by this agent"
            )
        await self.forget_disks()
        record = Connected(
            device=wanted.device,
            claim=wanted.claim,
            grant=wanted.grant,
            port=wanted.port,
            hostnqn=wanted.host.nqn,
        )
        self._journal.keep({record.device: record})
        try:
            name = await self._asked(wanted)
        except HostError:
            if wanted.device not in self._hanging:
                self._journal.forget(wanted.device)
            raise
        self._journal.keep({record.device: replace(record, controller=name)})
        await self.forget_disks()  # of one that has ended meanwhile
        there = await self._find(name, wanted.port)
        if there is None:
            raise HostError(f"cannot connect {wanted.port}: {name} is gone again")
        return there

    async def _find(self, name: str, port: Port) -> Connection | None:
        """Return a connection; read in a thread, as the kernel may keep a reader waiting while it connects."""
        return await asyncio.to_thread(self._connections.find, name, port)

    async def _asked(self, wanted: Wanted) -> str:
        """Return the name of the new controller. Raise HostError."""
        text = options(wanted.port, wanted.host, wanted.timeouts, wanted.secrets)
        call = functools.partial(_caught, functools.partial(self._connections.connect, text, str(wanted.port)))
        found, hanging = await self._calls.run({wanted.device: call})
        self._hanging = frozenset(hanging)
        if hanging:
            raise HostError(f"cannot connect {wanted.port}: the target has not answered for {self._connect_s:g} s")
        outcome = found[wanted.device]
        if outcome.error is not None:
            raise outcome.error
        return outcome.controller

    async def _with_disks(self, wanted: Wanted, there: Connection) -> None:
        """Record what the container gets, once the disks have appeared. Raise HostError."""
        until_s, before, since_s = time.monotonic() + self._disks_s, None, 0.0
        while True:
            now = await self._find(there.name, wanted.port)
            if now is None:
                raise HostError(f"cannot use {wanted.port}: {there.name} is gone again")
            ready = now.disks if now.state == LIVE and now.disks and all(map(self._has_node, now.disks)) else None
            if ready is None or ready != before:
                before, since_s = ready, time.monotonic()
            elif time.monotonic() - since_s >= self._settle_s:
                break
            if time.monotonic() > until_s:
                raise HostError(f"cannot use {wanted.port}: {_lacking(now)} after {self._disks_s:g} s")
            await asyncio.sleep(POLL_S)
        record = Connected(
            device=wanted.device,
            claim=wanted.claim,
            grant=wanted.grant,
            port=wanted.port,
            hostnqn=wanted.host.nqn,
            controller=there.name,
            edits=_edits(now.disks),
        )
        await self.forget_disks()
        self._journal.keep({record.device: record})

    # ---------------------------------------------------------------- back

    async def forget_disks(self) -> None:
        """Have the disks of connections that have ended handed over no longer: another target may have their names by
        now. Raise HostError. This alone may be called while another caller, or agent, connects."""
        if await asyncio.to_thread(self._forget_ended):
            await self._hide()

    def _forget_ended(self) -> bool:
        """Record it; return whether there was any. What was recorded of one meanwhile stays. Blocks."""
        ended = [one for one in self._journal.read().values() if one.edits is not None and self.standing(one) is None]
        if ended:
            self._journal.change(
                lambda known: {id: replace(one, edits=None) if one in ended else one for id, one in known.items()}
            )
        return bool(ended)

    async def disconnect(self, devices: Collection[str]) -> dict[str, str]:
        """Disconnect some targets. Return, by device, why one still is connected. Raise HostError if it cannot be told
        for the moment what is connected."""
        errors: dict[str, str] = {}
        for id, record in self._journal.read(certain=True).items():
            if id in devices:
                try:
                    await self._end(record)
                except HostError as error:
                    errors[id] = str(error)
        return errors

    async def _end(self, record: Connected) -> None:
        if record.device in await self._still_hanging(record.device):
            raise HostError(f"cannot disconnect {record.port}: the kernel has not given up connecting it yet")
        if (there := await asyncio.to_thread(self.standing, record)) is not None:
            call = functools.partial(_caught, functools.partial(self._disconnected, there))
            found, hanging = await self._calls.run({record.device: call})
            if hanging:
                why = f"the kernel has not ended it for {self._connect_s:g} s"
                raise HostError(f"cannot disconnect {record.port}: {why}")
            if (error := found[record.device].error) is not None:
                raise error
            if await self._find(there.name, record.port) is not None:
                raise HostError(f"cannot disconnect {record.port}: {there.name} is still there")
        self._journal.forget(record.device)
        log.info("target-disconnected", device=record.device, controller=record.controller, claim=record.claim)

    def _disconnected(self, there: Connection) -> str:
        self._connections.disconnect(there)
        return there.name

    async def _still_hanging(self, device: str) -> frozenset[str]:
        """Return the device if a call for it has not returned yet."""
        _, hanging = await self._calls.run({device: _Outcome})
        return frozenset(hanging)

    def orphans(self, held: Mapping[str, Collection[str]]) -> list[str]:
        """Return the devices that are connected although their grant does not hold them. held: devices by Grant.id."""
        return [id for id, one in self._journal.read().items() if id not in held.get(one.grant, ())]


async def nothing_to_hide() -> None:
    """Do nothing: where no claim is prepared any longer."""


def connector(
    sysfs: SysFs,
    state_dir: Path,
    boot_id: str,
    kernel: Kernel | None = None,
    hide: Callable[[], Awaitable[None]] = nothing_to_hide,
    **times_s: float,
) -> Connector:
    """Return what connects targets on a machine, with the record in a state folder. hide, times_s: as of Connector."""
    connections = Connections(sysfs, kernel or HostKernel(sysfs))
    journal = FabricsJournal(state_dir, boot_id)
    return Connector(journal, connections, lambda disk: sysfs.exists(f"dev/{disk}"), hide, **times_s)


def _caught(call: Callable[[], str]) -> _Outcome:
    try:
        return _Outcome(call())
    except BaseException as error:  # raised again where it is awaited
        return _Outcome(error=error)


def _edits(disks: Collection[str]) -> ContainerEdits:
    paths = [f"/dev/{one}" for one in disks]
    return ContainerEdits(device_nodes=tuple(DeviceNode(host_path=one, container_path=one) for one in paths))


def _lacking(there: Connection) -> str:
    if there.state != LIVE:
        return f"its state is {there.state or 'unknown'}"
    return f"it has no disk for this host, or /dev has none of {', '.join(there.disks) or 'them'}"
