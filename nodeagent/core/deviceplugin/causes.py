"""Every device of which something is known, as admins see it: the same causes that kubelet and the scheduler get.

What sources report is in the health of the agent. Two more causes follow from the inventory: a whole or a member that
is ill, and a device without a device node to hand over (core/deviceplugin/devices.py, `illness`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import DeviceResource, health_about, illness
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import Health, HealthState, Observed
from nodeagent.core.model.inventory import Inventory

DEVICE_NODE, WHOLE, MEMBERS = "device-node", "whole", "members"
"""Sources of the causes that follow from the inventory."""


def known_health(inventory: Inventory, health: Health, resources: Iterable[object]) -> Mapping[str, HealthState]:
    """Return the health of each device of which anything is known, in order of id; `seen` has all causes.

    resources: those configured. A device that none of them serves is no concern for lacking a device node: a function
    whose driver makes none is a normal part of many machines."""
    served = [one for one in resources if isinstance(one, DeviceResource)]
    found = dict(health)
    for device in inventory.devices:
        ill = illness(device, health)
        if ill is not None and (health_about(device, health) or any(one.serves(device) for one in served)):
            found[device.id] = _with_cause(device, health, ill)
    return MappingProxyType(dict(sorted(found.items())))


def _with_cause(device: Device, health: Health, ill: HealthState) -> HealthState:
    """Return the state that decides over a device, with its own causes and the one from elsewhere, if it is that."""
    own = health.get(device.id)
    if ill is own:
        return ill
    whole = health.get(device.parent) if device.parent is not None else None
    members = (health.get(one) for one in device.members)
    source = WHOLE if ill is whole else MEMBERS if any(ill is one for one in members) else DEVICE_NODE
    seen = {**(own.seen if own is not None else {}), source: Observed(ill.state, ill.reason)}
    return replace(ill, seen=MappingProxyType(seen))
