"""Which devices their kinds have prepared, for what containers get. Reads the journal and decides nothing."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from nodeagent.core.model.device import Device, PreparedFor
from nodeagent.core.model.inventory import Inventory
from nodeagent.managers.kinds.journal import KindsJournal, Record


class PreparedTable:
    """What is recorded at this moment. Its method blocks for the length of reading a small file."""

    def __init__(self, journal: KindsJournal) -> None:
        self._journal = journal
        self._view: tuple[Inventory, Mapping[str, Record], Inventory] | None = None

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with what kinds said of the devices that they have prepared on this boot."""
        now = self._journal.boot_id
        records = {id: one for id, one in self._journal.read().items() if one.edits is not None and one.boot_id == now}
        if not records:
            return inventory
        known = self._view
        if known is None or known[0] is not inventory or known[1] != records:
            devices = tuple(_with(one, records.get(one.id)) for one in inventory.devices)
            known = self._view = inventory, records, replace(inventory, devices=devices)
        return known[2]


def _with(device: Device, record: Record | None) -> Device:
    if record is None or record.edits is None:
        return device
    return replace(device, prepared=PreparedFor(grant=record.grant, edits=record.edits))
