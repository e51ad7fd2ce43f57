"""Devices that a claim wants bound to a VFIO driver, for a virtual machine: what goes along with them, and what forbids
it.

Pure. The kernel hands over an IOMMU group as a whole (Documentation/driver-api/vfio.rst): the functions of a group are
bound together, and the holder of one has all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nodeagent.core.ledger.exclusion import blocked, things_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig, from_json
from nodeagent.errors import InputError, Refused

BRIDGE = "bridge"
"""The kind of bridges, which stay with their own driver."""


def driver_for(grant: Grant) -> str:
    """Return the VFIO driver that a claim wants for its device, or "" if it wants none. Settings that a newer build
    wrote and this one cannot read count as none."""
    try:
        settings = from_json(grant.settings)
    except InputError:
        settings = NO_SETTINGS
    return settings.driver if grant.holder.api == CLAIM and grant.devices else ""


def members(inventory: Inventory, id: str) -> tuple[Device, ...]:
    """Return the other functions of a device's IOMMU group, without bridges."""
    device = inventory.device_by_id.get(id)
    if device is None or device.iommu_group is None:
        return ()
    group = (one for one in inventory.devices if one.iommu_group == device.iommu_group and one.id != id)
    return tuple(one for one in group if one.pci_address == one.id and one.kind != BRIDGE)


def things_with_members(inventory: Inventory, ids: Iterable[str], driver: str) -> tuple[tuple[str, str], ...]:
    """Return Grant.things of some devices; if they are wanted under a VFIO driver, with the members of their groups."""
    known = tuple(ids)
    along = ((id, one.id) for id in known for one in members(inventory, id)) if driver else ()
    return tuple(sorted({*things_of(inventory, known), *along}))


def check_driver(
    inventory: Inventory, id: str, settings: OpaqueConfig, allowed: Collection[str], *, shared: bool
) -> None:
    """Raise InputError if a device cannot be bound to the driver that the settings name, whatever else uses it."""
    driver = settings.driver
    if not driver:
        return
    if driver not in allowed:
        raise InputError(f"driver {driver}: dra.passthroughDrivers of this node does not have it")
    device = inventory.device_by_id.get(id)
    if device is None or shared or device.pci_address != device.id:
        raise InputError(f"driver {driver}: {id} is no whole PCI function, and only such can be handed to a guest")
    if device.iommu_group is None:
        raise InputError(f"driver {driver}: {id} is in no IOMMU group")


def refuse_members(inventory: Inventory, ledger: Ledger, grant: Grant) -> None:
    """Raise Refused naming the functions of the device's IOMMU group that anybody else holds or the host uses."""
    if not driver_for(grant):
        return
    taken = blocked(inventory, ledger)
    group = [one for id in grant.devices for one in members(inventory, id)]
    busy = [f"{one.id} is held" for one in group if one.id in taken]
    busy += [f"the host uses {one.id}" for one in group if one.used_by_host]
    if busy:
        why = f"cannot bind the IOMMU group of {', '.join(grant.devices)} to {driver_for(grant)}: {', '.join(busy)}"
        raise Refused(why, want=1 + len(group), free=0, unit="devices")
