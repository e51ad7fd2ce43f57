"""Which slots are queues for which grants, for what containers get. Reads the journal and decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from msgspec.structs import replace

from nodeagent.core.dsa.division import KIND, Held
from nodeagent.core.model.device import Device, PreparedFor
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import HostError
from nodeagent.managers.dsa.journal import DsaJournal


class QueueTable:
    """What is recorded at this moment. Its method blocks for the length of reading a small file."""

    def __init__(self, journal: DsaJournal) -> None:
        self._journal = journal
        self._made: Mapping[str, Held] = {}
        self._view: tuple[Inventory, Mapping[str, Held], Inventory] | None = None

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the nodes of the queues that are made."""
        if not inventory.devices_by_kind.get(KIND):
            return inventory
        with contextlib.suppress(HostError):  # otherwise as read last
            every = ((record, one) for record in self._journal.read(certain=True).values() for one in record.held)
            self._made = {record.id(one.slot): one for record, one in every if one.edits is not None}
        made = self._made
        if not made:
            return inventory
        known = self._view
        if known is None or known[0] is not inventory or known[1] != made:
            devices = tuple(_with(one, made.get(one.id)) for one in inventory.devices)
            known = self._view = inventory, made, replace(inventory, devices=devices)
        return known[2]


def _with(device: Device, held: Held | None) -> Device:
    if held is None or held.edits is None or device.kind != KIND:
        return device
    return replace(device, prepared=PreparedFor(grant=held.grant, edits=held.edits))
