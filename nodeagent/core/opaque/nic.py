"""The form of configurations of network adapters."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nodeagent.core.network.interface import Interface, Route
from nodeagent.core.network.vf_properties import VfForm, with_address
from nodeagent.core.opaque.form import Form, Interrupts, VfioDriver
from nodeagent.core.opaque.settings import OpaqueConfig
from nodeagent.errors import InputError

_NO_INTERFACES = ("lo", "all", "default")
"""The loopback interface, and two folders below /proc/sys/net that stand for every interface."""
_InterfaceName = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,14})?$")]
_Mtu = Annotated[int, msgspec.Meta(ge=68, le=65535)]
"""RFC 791 for IPv4; 16 bits in the headers. The driver knows its own limits."""
_HardwareAddress = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5})?$")]
"""Of one adapter: the lowest bit of the first byte is that of groups."""


class _Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    destination: str
    gateway: str = ""


class _Interface(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    name: _InterfaceName = ""
    addresses: tuple[str, ...] = ()
    routes: tuple[_Route, ...] = ()
    mtu: _Mtu | None = None
    hardware_address: _HardwareAddress = ""

    def asked(self) -> Interface:
        """Return it in canonical form."""
        from nodeagent.core.network.addresses import checked

        if self.name in _NO_INTERFACES:
            raise InputError(f"{self.name!r} at $.interface.name stands for others in every namespace")
        routes = tuple(Route(destination=one.destination, gateway=one.gateway) for one in self.routes)
        return checked(
            Interface(
                name=self.name,
                addresses=self.addresses,
                routes=routes,
                mtu=self.mtu,
                hardware_address=self.hardware_address,
            )
        )


class NicForm(Form, frozen=True):
    """Network adapters: the driver, or RDMA and the interface in the pod; properties of the virtual function, and
    interrupts."""

    driver: VfioDriver = ""
    interrupts: Interrupts = ""
    rdma: bool | None = None
    interface: _Interface | None = None
    vf: VfForm | None = None

    def settings(self) -> OpaqueConfig:
        for key, found in (("rdma", self.rdma), ("interface", self.interface)):
            if self.driver and found is not None:
                raise InputError(f"$.driver and $.{key} exclude each other")
        interface = self.interface.asked() if self.interface is not None else None
        vf = self.vf.asked() if self.vf is not None else None
        if interface is not None and vf is not None:
            interface = with_address(interface, vf)
        return OpaqueConfig(rdma=self.rdma, driver=self.driver, interrupts=self.interrupts, interface=interface, vf=vf)
