"""Has kinds prepare devices and undo it, each step recorded before it is taken.

After a crash at any point the same call completes what it had begun: it looks at the journal, and calls the kind again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.decode import read_own
from nodeagent.core.opaque.settings import from_json
from nodeagent.errors import HostError, InputError, NodeagentError
from nodeagent.host.devices.base import Kind
from nodeagent.host.devices.hooks import Preparing, forms, preparing
from nodeagent.managers.journal import recorded_for_others
from nodeagent.managers.kinds.calls import HookCalls
from nodeagent.managers.kinds.journal import KindsJournal, Record

log = structlog.get_logger()


class KindGoneError(HostError):
    """The kind that prepared a device is not here: nothing can undo it."""


class DevicePreparer:
    """One caller at a time, on the node too."""

    def __init__(self, journal: KindsJournal, families: Sequence[Kind], inventory: Callable[[], Inventory]) -> None:
        self._journal = journal
        self._kinds = preparing(families)
        self._forms = forms(families)
        self._inventory = inventory
        self._calls = HookCalls()

    def records(self, *, certain: bool = False) -> Mapping[str, Record]:
        """Return what is recorded, by device. certain: raise HostError if that cannot be told for the moment."""
        return self._journal.read(certain=certain)

    def wanted(self, grants: Iterable[Grant]) -> list[tuple[Grant, Device, Preparing]]:
        """Return the devices of grants that a kind prepares, each with its grant and the kind."""
        known = self._inventory().device_by_id
        every = [(one, known[id]) for one in grants for id in one.devices if id in known]
        return [(one, device, self._kinds[device.kind]) for one, device in every if device.kind in self._kinds]

    async def prepare(self, uid: str, grants: Sequence[Grant]) -> bool:
        """Have all devices of a claim prepared, or none. Return whether there was anything to do. Raise HostError or
        InputError; what could not be undone then is recorded."""
        others = await self.undo(recorded_for_others(self._journal.read, uid, grants).values())
        if others:
            raise HostError("; ".join(others.values()))
        begun: list[str] = []
        try:
            for grant, device, kind in self.wanted(grants):
                if not self._is_prepared(grant, device):
                    await self._prepare(uid, grant, device, kind, begun)
        except NodeagentError as error:
            left = await self.undo([self._journal.read()[id] for id in reversed(begun)])
            raise HostError("; ".join([str(error), *left.values()])) from None
        return bool(begun)

    async def _prepare(self, uid: str, grant: Grant, device: Device, kind: Preparing, begun: list[str]) -> None:
        form = self._forms.own.get(device.kind)
        config = read_own(from_json(grant.settings), form) if form is not None else None
        record = Record(
            device=device.id,
            kind=device.kind,
            claim=uid,
            grant=grant.id,
            settings=grant.settings,
            boot_id=self._journal.boot_id,
            pci_address=device.pci_address,
            paths=device.paths,
            parent=device.parent,
            attributes=dict(device.attributes),
        )
        self._journal.keep({record.device: record})
        begun.append(device.id)
        edits = await self._calls.prepare(kind, device, config)
        self._journal.keep({record.device: replace(record, edits=edits)})
        log.info("device-prepared", device=device.id, kind=device.kind, claim=uid)

    def _is_prepared(self, grant: Grant, device: Device) -> bool:
        one = self._journal.read().get(device.id)
        if one is None or one.edits is None:
            return False
        return (one.grant, one.settings, one.boot_id) == (grant.id, grant.settings, self._journal.boot_id)

    async def undo(self, records: Iterable[Record]) -> dict[str, str]:
        """Have devices unprepared. Return, by device, why one is not."""
        left: dict[str, str] = {}
        for one in records:
            try:
                await self._undo(one)
            except HostError as error:
                left[one.device] = str(error)
        return left

    async def give_back(self, claims: Iterable[str]) -> dict[str, str]:
        """Have the devices of some claims unprepared. Return, by UID, why one is not. If its kind is gone, it is only
        noted: nothing can be done for it as long as it is."""
        mine, errors = frozenset(claims), dict[str, str]()
        for one in self._journal.read(certain=True).values():
            if one.claim in mine:
                try:
                    await self._undo(one)
                except KindGoneError as error:
                    log.warning("device-not-unprepared", device=one.device, claim=one.claim, error=str(error))
                except HostError as error:
                    errors[one.claim] = str(error)
        return errors

    async def _undo(self, record: Record) -> None:
        kind = self._kinds.get(record.kind)
        if kind is None:
            why = f"the kind {record.kind} that prepared it is not installed, or cannot be used"
            raise KindGoneError(f"cannot unprepare {record.device}: {why}")
        device = self._inventory().device_by_id.get(record.device)
        if device is None or device.kind != record.kind:
            device = record.as_found()
        # From here on it is not prepared, whatever happens.
        self._journal.keep({record.device: replace(record, edits=None)})
        await self._calls.unprepare(kind, device, self._recorded_config(record))
        self._journal.forget(record.device)
        log.info("device-unprepared", device=record.device, kind=record.kind, claim=record.claim)

    def _recorded_config(self, record: Record) -> object:
        form = self._forms.own.get(record.kind)
        try:
            return read_own(from_json(record.settings), form) if form is not None else None
        except InputError as error:
            log.warning("settings-unreadable", device=record.device, claim=record.claim, error=str(error))
            return None

    def orphans(self, held: Mapping[str, Grant]) -> list[Record]:
        """Return what is recorded of devices that their grants do not have. held: all grants, by id."""
        every = self._journal.read().values()
        return [one for one in every if one.grant not in held or one.device not in held[one.grant].devices]
