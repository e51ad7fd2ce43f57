"""Which functions the SR-IOV network device plugin selects, by its own rules (pkg/netdevice, pkg/resources of its
source), for devices of the type netDevice: an oracle for what its configuration becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nodeagent.core.model.device import Device


def selects(selectors: list[Mapping[str, Any]], device: Device) -> bool:
    """Return whether one of the selectors of a resource takes a PCI function."""
    told = device.attributes
    listed = device.kind == "nic" and device.pci_address == device.id and not told.get("default_route")
    with_functions = told.get("sriov") == "pf" and bool(told.get("sriov_numvfs"))
    return listed and not with_functions and any(_takes(one, device) for one in selectors)


def _takes(said: Mapping[str, Any], device: Device) -> bool:
    told = device.attributes
    virtual = told.get("sriov") == "vf"
    values = {
        "vendors": device.vendor,
        "devices": device.device,
        "drivers": device.driver,
        "pciAddresses": device.pci_address,
        "acpiIndexes": told.get("acpi_index", ""),
        "linkTypes": told.get("link_type", ""),
    }
    if any(said.get(key) and value not in said[key] for key, value in values.items()):
        return False
    owners = {"pfNames": told.get("pf_name", "") if virtual else "", "rootDevices": device.parent if virtual else ""}
    if any(said.get(key) and not _owned(said[key], str(owner or ""), told) for key, owner in owners.items()):
        return False
    return not said.get("isRdma") or bool(told.get("rdma"))


def _owned(items: list[str], owner: str, told: Mapping[str, Any]) -> bool:
    item = next((one for one in items if one.split("#")[0].lower() == owner.lower()), "") if owner else ""
    if "#" not in item:
        return bool(item)
    index = int(told["vf_index"])
    for part in item.split("#")[1].split(","):
        first, _, last = part.partition("-")
        if int(first) <= index <= int(last or first):
            return True
    return False
