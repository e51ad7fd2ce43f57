"""Which work queues are enabled for which grants, for what containers get. Reads the journal and decides nothing."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device, PreparedFor
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.idxd import node_of
from nodeagent.managers.queues.journal import Enabled, QueueJournal


class QueueTable:
    """What is recorded at this moment. Its method blocks for the length of reading a small file."""

    def __init__(self, journal: QueueJournal) -> None:
        self._journal = journal
        self._view: tuple[Inventory, Mapping[str, Enabled], Inventory] | None = None

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the nodes of the queues that are enabled for claims."""
        records = {id: one for id, one in self._journal.read().items() if one.ready}
        if not records:
            return inventory
        known = self._view
        if known is None or known[0] is not inventory or known[1] != records:
            devices = tuple(_with(one, records.get(one.id)) for one in inventory.devices)
            known = self._view = inventory, records, replace(inventory, devices=devices)
        return known[2]


def _with(device: Device, record: Enabled | None) -> Device:
    if record is None or not device.made_for_claims:
        return device
    node = node_of(record.accelerator, record.queue)
    return replace(device, paths=(node,), prepared=PreparedFor(grant=record.grant, edits=ContainerEdits()))
