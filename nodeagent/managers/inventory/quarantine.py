"""Devices that the configuration keeps from being granted, whatever else is known of them (health.quarantine).

A pattern matches a device's id, PCI address, UUID or serial number, as fnmatch(3); that of a whole covers its parts,
which are as ill as the whole. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import UNHEALTHY, Evidence, Health, Said
from nodeagent.core.model.inventory import Inventory

SOURCE = "quarantine"
_NAMED_BY = ("uuid", "serial")
"""Attributes by which admins know a device."""


def quarantined(
    inventory: Inventory, patterns: Sequence[str], health: Health
) -> tuple[list[Evidence], list[Said], list[str]]:
    """Return the evidence, what was said before of devices that no pattern matches any longer, and the patterns that
    match nothing."""
    by_device = {device.id: [one for one in patterns if _matches(device, one)] for device in inventory.devices}
    evidence = [
        Evidence(device=id, source=SOURCE, state=UNHEALTHY, reason=f"quarantined by the configuration ({some[0]})")
        for id, some in by_device.items()
        if some
    ]
    freed = [(id, SOURCE) for id, state in health.items() if SOURCE in state.seen and not by_device.get(id)]
    used = {one for some in by_device.values() for one in some}
    return evidence, freed, [one for one in patterns if one not in used]


def notes(unused: Iterable[str]) -> list[str]:
    """Return what an admin may want to change, one sentence each."""
    return [f"health.quarantine: no device here has the id, PCI address, UUID or serial number {one}" for one in unused]


def _matches(device: Device, pattern: str) -> bool:
    names = (device.id, device.pci_address, *(device.attributes.get(one) for one in _NAMED_BY))
    return any(fnmatchcase(str(one), pattern) for one in names if one)
