"""Which properties of a virtual function are set at once, what they are called, and what forbids setting them. Pure.

Source: do_setvfinfo in net/core/rtnetlink.c, which sets a VLAN with its priority and protocol, and both rates, at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.dra.interfaces import interface_names
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.vf_properties import DEFAULT_PROTOCOL, VfProperties
from nodeagent.errors import InputError


class Property(StrEnum):
    """What the kernel sets at once, in the order in which it is set; named as in `network.vfProperties`."""

    MAC = "mac"
    VLAN = "vlan"
    TX_RATE = "txRate"
    SPOOF_CHECK = "spoofCheck"
    LINK_STATE = "linkState"
    TRUST = "trust"


_NAMES: Mapping[Property, str] = MappingProxyType(
    {
        Property.MAC: "MAC address",
        Property.VLAN: "VLAN",
        Property.TX_RATE: "transmit rate",
        Property.SPOOF_CHECK: "spoof checking",
        Property.LINK_STATE: "link state",
        Property.TRUST: "trust",
    }
)
_ON_OFF: Mapping[bool, str] = MappingProxyType({True: "on", False: "off"})


class VfPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a virtual function is."""

    pf: str
    """PCI address of its physical function."""
    interface: str
    """Of the physical function, on the host."""
    index: int


def value_of(said: VfProperties, which: Property) -> tuple[object, ...]:
    """Return one property as a value that can be compared, or an empty one if it has no value."""
    match which:
        case Property.MAC:
            return (said.mac,) if said.mac else ()
        case Property.VLAN:
            return (said.vlan, said.vlan_qos, said.vlan_protocol) if said.vlan else (said.vlan,) * (said.vlan == 0)
        case Property.TX_RATE:
            return () if said.max_tx_rate_mbps is None else (said.min_tx_rate_mbps, said.max_tx_rate_mbps)
        case Property.SPOOF_CHECK:
            return () if said.spoof_check is None else (said.spoof_check,)
        case Property.LINK_STATE:
            return (said.link_state,) if said.link_state else ()
        case Property.TRUST:
            return () if said.trust is None else (said.trust,)


def said_of(said: VfProperties) -> tuple[Property, ...]:
    """Return the properties that a claim sets, in the order in which they are set."""
    return tuple(one for one in Property if value_of(said, one))


def text_of(said: VfProperties, which: Property) -> str:
    """Return one property in words, such as "VLAN 100"; only its name if the claim does not set it."""
    name, value = _NAMES[which], value_of(said, which)
    if not value:
        return name
    if which == Property.VLAN:
        priority = f" with priority {said.vlan_qos}" if said.vlan_qos else ""
        protocol = f" ({said.vlan_protocol})" if said.vlan and said.vlan_protocol != DEFAULT_PROTOCOL else ""
        return f"{name} {said.vlan}{priority}{protocol}"
    if which == Property.TX_RATE:
        return f"{name} {said.min_tx_rate_mbps} to {said.max_tx_rate_mbps or 'any'} Mbit/s"
    return f"{name} {_ON_OFF[value[0]] if isinstance(value[0], bool) else value[0]}"


def check_vf(inventory: Inventory, id: str, wanted: VfProperties, allowed: Collection[str], *, shared: bool) -> None:
    """Raise InputError if the properties of a device cannot be set for a claim.

    allowed: what claims may set on this node. shared: whether the claim has a share of the device only.
    """
    if forbidden := [one for one in said_of(wanted) if one not in allowed]:
        raise InputError(f"vf: network.vfProperties of this node does not allow {', '.join(forbidden)}")
    if shared:
        raise InputError(f"vf: {id} is shared, and its properties would be those of all who have it")
    place_of(inventory, id)


def place_of(inventory: Inventory, id: str) -> VfPlace:
    """Return where a virtual function is. Raise InputError if a device is none, or its physical function has not one
    interface on the host."""
    device = inventory.device_by_id.get(id)
    if device is None or device.attributes.get("sriov") != "vf" or device.pci_address != device.id:
        raise InputError(f"vf: {id} is no virtual function")
    owner, index = inventory.device_by_id.get(device.parent or ""), device.attributes.get("vf_index")
    if owner is None or not isinstance(index, int):
        raise InputError(f"vf: it is not known which virtual function of its adapter {id} is")
    names = interface_names(owner)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise InputError(f"vf: {owner.id}, the physical function of {id}, has {len(names)} interfaces ({found})")
    return VfPlace(pf=owner.id, interface=names[0], index=index)


def last_place(inventory: Inventory, id: str, known: VfPlace) -> VfPlace | None:
    """Return where a virtual function is, or was, if a scan has not seen it: the kernel knows whether it is there. None
    if its physical function is gone too. Raise InputError as `place_of` does.

    known: where it was.
    """
    if id in inventory.device_by_id:
        return place_of(inventory, id)
    owner = inventory.device_by_id.get(known.pf)
    names = interface_names(owner) if owner is not None else []
    return replace(known, interface=names[0]) if names else None
