"""The agent's own MIG instances as others of its parts need them: for a scan, for what a container gets, for an error
that the driver reports of one. Reads the journal and decides nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping

from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.partitions.instances import Record
from nodeagent.host.devices.all_kinds import PartitionSelector
from nodeagent.host.nvml.mig_devices import capabilities, capability_table, with_instance
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.partitions.journal import PartitionJournal

Gone = tuple[str, int, int]
"""(UUID of the GPU, profile, start) of an instance."""


class InstanceTable:
    """What is recorded at this moment. Its methods block for the length of reading a small file."""

    def __init__(self, journal: PartitionJournal, sysfs: SysFs) -> None:
        self.journal = journal
        self._sysfs = sysfs
        self._ended: dict[Gone, float] = {}
        """Instances that were destroyed, and when (time.monotonic): an older answer of NVML still shows them."""
        self._view: tuple[Inventory, Mapping[str, Record], Inventory] | None = None

    def selector(self) -> PartitionSelector:
        """Return which instances a scan takes for the agent's own."""
        own = {(one.gpu, one.profile, one.start) for one in self.journal.read().values()}
        return PartitionSelector(own=frozenset(own | self._ended.keys()))

    def ended(self, record: Record) -> None:
        """Note that an instance was destroyed just now."""
        self._ended[record.gpu, record.profile, record.start] = time.monotonic()

    def asked(self, at_s: float) -> None:
        """Note that NVML has answered what it was asked at a moment (time.monotonic)."""
        self._ended = {one: when for one, when in self._ended.items() if when >= at_s}

    def partition_of(self, inventory: Inventory, gpu: str, gi: int) -> str | None:
        """Return the device of an own instance, given by its GPU (a PCI address) and number, or None if it is none."""
        return self.partitions(inventory).get((gpu, gi))

    def partitions(self, inventory: Inventory) -> Mapping[tuple[str, int], str]:
        """Return the devices of all own instances, each by its GPU (a PCI address) and number."""
        found = (
            (one, inventory.device_by_id.get(one.partition))
            for one in self.journal.read().values()
            if one.gi is not None
        )
        return {
            (device.parent, one.gi): device.id
            for one, device in found
            if device is not None and device.parent is not None and one.gi is not None
        }

    def view(self, inventory: Inventory) -> Inventory:
        """Return the inventory with the instances that exist: their devices have UUIDs and nodes."""
        records = {id: one for id, one in self.journal.read().items() if one.uuid}
        if not records:
            return inventory
        known = self._view
        if known is None or known[0] is not inventory or known[1] != records:
            known = self._view = inventory, records, self._with_instances(inventory, records)
        return known[2]

    def _with_instances(self, inventory: Inventory, records: Mapping[str, Record]) -> Inventory:
        table = capability_table(Tolerant(self._sysfs))

        def made(device: Device) -> Device:
            one = records.get(device.id)
            if one is None or device.partition is None or one.gi is None or one.ci is None:
                return device
            whole = inventory.device_by_id.get(device.parent or "")
            minor = whole.attributes.get("minor") if whole is not None else None
            return with_instance(device, one.uuid, capabilities(table, minor, one.gi, one.ci))

        return replace(inventory, devices=tuple(map(made, inventory.devices)))
