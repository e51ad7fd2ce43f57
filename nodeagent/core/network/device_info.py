"""Device information files: what a device plugin tells CNI meta-plugins such as Multus of a device that it gave away.

Source: Network Plumbing Working Group, Device Information Specification 1.1.0: chapters 3 (format) and 4.1 (name).
Multus reads the file of a claim's device under the names in its ResourceSlice, which are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.variables import VHOST_NET

VERSION = "1.1.0"
_ID = r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7](::[0-9]{1,4})?"
_REPRESENTOR = re.compile(r"(?:c\d+)?pf\d+vf(\d+)")
ResourceOf = Callable[[Device], str]
"""Returns the full name of the resource of a claim's device, or "" if it is none of CNI's."""


def file_name(resource: str, id: str) -> str:
    """Return the name of the file of a device. id: what kubelet or the ResourceSlice calls it."""
    return f"{resource.replace('/', '-')}-{id}-device.json"


def resource_of_file(name: str, resources: Iterable[str]) -> str:
    """Return which of some resources a file is for, or "" if it is for none of them. Only names that end in a PCI
    address, as ours do: the name of one resource may begin with that of another."""
    for one in resources:
        if re.fullmatch(f"{re.escape(one.replace('/', '-'))}-{_ID}-device\\.json", name):
            return one
    return ""


def files_of(
    inventory: Inventory,
    grants: Iterable[Grant],
    resources: Mapping[str, bool],
    resource_of: ResourceOf,
) -> dict[str, bytes]:
    """Return the content of each file that some grants need, by name.

    resources: those that are shown to CNI, by full name; whether their containers get vhost-net.
    """
    found: dict[str, bytes] = {}
    for grant in grants:
        for resource, id, device in _given(inventory, grant, resource_of):
            if resource in resources:
                content = pci_info(inventory, device, vhost_net=resources[resource])
                found[file_name(resource, id)] = msgspec.json.encode(content)
    return found


def pci_info(inventory: Inventory, device: Device, *, vhost_net: bool = False) -> dict[str, Any]:
    """Return the content of the file of a PCI function."""
    said: dict[str, str | None] = {
        "pci-address": device.pci_address,
        "vhost-net": VHOST_NET if vhost_net else None,
        "rdma-device": str(device.attributes.get("rdma", "")) or None,
        "pf-pci-address": device.parent if device.attributes.get("sriov") == "vf" else None,
        "representor-device": _representor(inventory, device),
    }
    return {"type": "pci", "version": VERSION, "pci": {key: value for key, value in said.items() if value}}


def _given(inventory: Inventory, grant: Grant, resource_of: ResourceOf) -> Iterator[tuple[str, str, Device]]:
    """Yield the adapters that a grant holds, each with the resource and the id under which CNI knows it. An adapter
    that is not there is left out."""
    api, known = grant.holder.api, inventory.device_by_id
    for one in (*grant.devices, *grant.shares):
        device = known.get(one)
        if device is None or device.kind != "nic" or device.pci_address != device.id:
            continue
        if api == CLAIM:
            yield resource_of(device), device.id, device
        elif api == DEVICE_PLUGIN:
            yield from ((grant.holder.resource, id, device) for id in grant.ids if id.partition("::")[0] == one)


def _representor(inventory: Inventory, device: Device) -> str | None:
    """Return the interface that stands for a virtual function in its adapter's switch, if there is one."""
    owner = inventory.device_by_id.get(device.parent or "")
    listed = str(owner.attributes.get("representors", "")) if owner is not None else ""
    ports = (one.partition("=") for one in listed.split(",") if one)
    mine = (name for name, _, port in ports if _port(port) == device.attributes.get("vf_index", -1))
    return next(mine, None)


def _port(text: str) -> int | None:
    found = _REPRESENTOR.fullmatch(text)
    return int(found[1]) if found is not None else None
