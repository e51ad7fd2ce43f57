"""Network interfaces that claims want in their pods: which grants ask for one, and what forbids it. Which grants want
properties of their virtual functions.

Pure. An interface is in one network namespace at a time, so it is asked for with a whole adapter that has one
interface, and by a claim whose pods are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from nodeagent.core.model.claim import Claim
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.interface import Interface
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig, from_json
from nodeagent.errors import InputError

_WORD, _VF_WORD = '"interface":', '"vf":'
"""What settings contain that ask for an interface in the pod, and for properties of a virtual function."""


def interface_of(grant: Grant) -> Interface | None:
    """Return what a claim wants its adapter's interface to be in the pod, or None if it is to stay on the host.
    Settings that a newer build wrote and this one cannot read count as none."""
    return _settings_with(_WORD, grant).interface


def rdma_of(grant: Grant, device: Device) -> tuple[str, ...]:
    """Return the RDMA devices that go along with an adapter's interface into the pod, by their names on the host: none
    if the claim wants no interface there, or no RDMA."""
    settings = _settings_with(_WORD, grant)
    if settings.interface is None or settings.rdma is False:
        return ()
    return tuple(one for one in str(device.attributes.get("rdma", "")).split(",") if one)


def vf_of(grant: Grant) -> VfProperties | None:
    """Return what a claim wants its virtual function to be set to, or None if it is to stay as it is."""
    return _settings_with(_VF_WORD, grant).vf


def _settings_with(word: str, grant: Grant) -> OpaqueConfig:
    """Return a claim's settings for a whole device, or empty ones if a word is not in them."""
    if word not in grant.settings or grant.holder.api != CLAIM or not grant.devices:
        return NO_SETTINGS
    try:
        return from_json(grant.settings)
    except InputError:
        return NO_SETTINGS


def check_interface(
    inventory: Inventory, claim: Claim, id: str, settings: OpaqueConfig, *, allowed: bool, shared: bool
) -> None:
    """Raise InputError if an adapter's interface cannot be moved into the pod of a claim.

    allowed: whether the node moves interfaces at all. shared: whether the claim has a share of the adapter only.
    """
    if settings.interface is None:
        return
    if not allowed:
        raise InputError("interface: network.moveInterfaces of this node does not allow it")
    if claim.groups:
        raise InputError("interface: the claim is reserved for a group, whose pods are not known before they start")
    device = inventory.device_by_id.get(id)
    if device is None or shared:
        raise InputError(f"interface: {id} is no whole adapter, and an interface is in one pod at a time")
    names = interface_names(device)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise InputError(f"interface: {id} has {len(names)} interfaces on the host ({found}), expected one")
    if device.attributes.get("default_route"):
        raise InputError(f"interface: a default route of the node leads through {names[0]}")


def check_names(asked: Iterable[OpaqueConfig]) -> None:
    """Raise InputError if two interfaces of one claim would have the same name in the pod."""
    counts = Counter(one.interface.name for one in asked if one.interface is not None and one.interface.name)
    for name, count in counts.items():
        if count > 1:
            raise InputError(f"{count} interfaces of the claim would be called {name} in the pod")


def interface_names(device: Device) -> list[str]:
    """Return the names of an adapter's interfaces on the host, as last seen there."""
    return [one for one in str(device.attributes.get("netdevs", "")).split(",") if one]


def network_data(inventory: Inventory, grant: Grant) -> dict[str, Any]:
    """Return the NetworkDeviceData (resource.k8s.io/v1) of an adapter that has an interface, or nothing: as the claim
    wants it in the pod, and otherwise as last seen on the host."""
    device = inventory.device_by_id.get(next(iter((*grant.devices, *grant.shares)), ""))
    if device is None or device.kind != "nic":
        return {}
    asked, vf = interface_of(grant) or Interface(), vf_of(grant) or VfProperties()
    name = asked.name or next(iter(interface_names(device)), "")
    hardware_address = asked.hardware_address or vf.mac or str(device.attributes.get("mac", ""))
    found = {"interfaceName": name, "ips": list(asked.addresses), "hardwareAddress": hardware_address}
    return {key: value for key, value in found.items() if value} if name else {}
