"""What a network interface is to be in a pod. Frozen values."""

from __future__ import annotations

import msgspec


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A route of the pod through the interface."""

    destination: str
    """A network, such as 10.1.0.0/16; 0.0.0.0/0 for all."""
    gateway: str = ""
    """An address, or "" for what is on the link itself."""


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """What an interface is in its pod. What is empty stays as it is on the host."""

    name: str = ""
    addresses: tuple[str, ...] = ()
    """With the length of their network, such as 10.0.0.5/24."""
    routes: tuple[Route, ...] = ()
    mtu: int | None = None
    hardware_address: str = ""
