"""Which targets are connected for which grants, for what containers get. Reads the journal and decides nothing."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from nodeagent.core.fabrics.target import KIND
from nodeagent.core.model.device import Device, PreparedFor
from nodeagent.core.model.inventory import Inventory
from nodeagent.managers.fabrics.journal import Connected, FabricsJournal


class ConnectedTable:
    """What is recorded at this moment. Its method blocks for the length of reading a small file."""

    def __init__(self, journal: FabricsJournal) -> None:
        self._journal = journal
        self._view: tuple[Inventory, Mapping[str, Connected], Inventory] | None = None

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the disks of the targets that are connected."""
        if not inventory.devices_by_kind.get(KIND):
            return inventory
        records = {id: one for id, one in self._journal.read().items() if one.edits is not None}
        if not records:
            return inventory
        known = self._view
        if known is None or known[0] is not inventory or known[1] != records:
            devices = tuple(_with(one, records.get(one.id)) for one in inventory.devices)
            known = self._view = inventory, records, replace(inventory, devices=devices)
        return known[2]


def _with(device: Device, record: Connected | None) -> Device:
    if record is None or record.edits is None or device.kind != KIND:
        return device
    return replace(device, prepared=PreparedFor(grant=record.grant, edits=record.edits))
