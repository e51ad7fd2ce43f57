"""Addresses, networks and routes as users write them, checked and written in one way. Pure."""

from __future__ import annotations

import ipaddress

from nodeagent.core.network.interface import Interface, Route
from nodeagent.errors import InputError

MOST_ADDRESSES, MOST_ROUTES = 16, 64
"""Kubernetes takes 16 addresses in the status of a device (resource.k8s.io/v1, NetworkDeviceData.ips)."""


def checked(asked: Interface) -> Interface:
    """Return an interface with its addresses and routes in canonical form. Raise InputError with the path and the value
    that is wrong."""
    for key, found, most in (("addresses", asked.addresses, MOST_ADDRESSES), ("routes", asked.routes, MOST_ROUTES)):
        if len(found) > most:
            raise InputError(f"{len(found)} entries at $.interface.{key}, expected at most {most}")
    addresses = tuple(_address(one, f"$.interface.addresses[{i}]") for i, one in enumerate(asked.addresses))
    if len({*addresses}) < len(addresses):
        raise InputError("an address stands twice at $.interface.addresses")
    routes = tuple(_route(one, f"$.interface.routes[{i}]") for i, one in enumerate(asked.routes))
    hardware = asked.hardware_address.lower()
    return Interface(name=asked.name, addresses=addresses, routes=routes, mtu=asked.mtu, hardware_address=hardware)


def _address(value: str, at: str) -> str:
    """Return an address with the length of its network."""
    try:
        found = ipaddress.ip_interface(value)
    except ValueError:
        found = None
    if found is None or "/" not in value or "%" in value or _is_odd(found.ip):
        raise InputError(f"{value!r} at {at}, expected an address with its network's length, such as 10.0.0.5/24")
    return found.with_prefixlen


def _is_odd(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether no interface can have it, each has it already, or Kubernetes takes it for none."""
    if address.version == 6 and (address.ipv4_mapped is not None or address.is_site_local):
        return True
    return address.is_multicast or address.is_unspecified or address.is_loopback or address.is_link_local


def _route(asked: Route, at: str) -> Route:
    try:
        network = ipaddress.ip_network(asked.destination)
    except ValueError:
        network = None
    if network is None or "/" not in asked.destination:
        raise InputError(f"{asked.destination!r} at {at}.destination, expected a network, such as 10.1.0.0/16")
    if not asked.gateway:
        return Route(destination=str(network))
    try:
        gateway = ipaddress.ip_address(asked.gateway)
    except ValueError:
        gateway = None
    if gateway is None or "%" in asked.gateway or gateway.version != network.version:
        raise InputError(f"{asked.gateway!r} at {at}.gateway, expected an address of IPv{network.version}")
    return Route(destination=str(network), gateway=str(gateway))
