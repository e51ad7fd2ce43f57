"""Properties that a virtual function has on its physical one, and how claims ask for them. Pure.

Source: include/uapi/linux/if_link.h (ifla_vf_mac and what follows it).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec.structs import replace

from nodeagent.core.network.interface import Interface
from nodeagent.errors import InputError

NO_MAC = "00:00:00:00:00:00"
"""Of a function without an address from its physical one: it has its own."""
DEFAULT_PROTOCOL = "802.1Q"
_Mac = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5})?$")]
"""Of one adapter: the lowest bit of the first byte is that of groups."""
_Vlan = Annotated[int, msgspec.Meta(ge=0, le=4094)]
"""IEEE 802.1Q reserves 4095."""
_Priority = Annotated[int, msgspec.Meta(ge=0, le=7)]
_Mbps = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]


class VfProperties(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Properties of one virtual function. What is empty is not asked for, or not reported by the driver."""

    mac: str = ""
    vlan: int | None = None
    """0: none, the function sends and receives as it likes."""
    vlan_qos: int = 0
    """Priority of IEEE 802.1p."""
    vlan_protocol: str = DEFAULT_PROTOCOL
    min_tx_rate_mbps: int = 0
    """In 10^6 bits per second; 0: nothing is guaranteed."""
    max_tx_rate_mbps: int | None = None
    """In 10^6 bits per second; 0: no limit. Never empty if the minimum is not 0."""
    spoof_check: bool | None = None
    trust: bool | None = None
    link_state: str = ""
    """auto, enable or disable."""


class VfForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The part `vf` of a claim's configuration."""

    mac: _Mac = ""
    vlan: _Vlan | None = None
    vlan_qos: _Priority | None = msgspec.field(default=None, name="vlanQoS")
    vlan_protocol: Literal["802.1Q", "802.1ad"] | None = None
    min_tx_rate_mbps: _Mbps | None = None
    max_tx_rate_mbps: _Mbps | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    link_state: Literal["auto", "enable", "disable", ""] = ""

    def asked(self) -> VfProperties:
        """Return what is asked for. Raise InputError with the path and the value that is wrong."""
        least, most = self.min_tx_rate_mbps or 0, self.max_tx_rate_mbps
        for key, found in (("vlanQoS", self.vlan_qos), ("vlanProtocol", self.vlan_protocol)):
            if found is not None and not self.vlan:
                raise InputError(f"$.vf.{key} needs a VLAN at $.vf.vlan")
        if most and least > most:
            raise InputError(f"{least} at $.vf.minTxRateMbps is more than {most} at $.vf.maxTxRateMbps")
        if self.mac == NO_MAC:
            raise InputError(f"{self.mac!r} at $.vf.mac, expected the address of one adapter")
        return VfProperties(
            mac=self.mac.lower(),
            vlan=self.vlan,
            vlan_qos=self.vlan_qos or 0,
            vlan_protocol=self.vlan_protocol or DEFAULT_PROTOCOL,
            min_tx_rate_mbps=least,
            max_tx_rate_mbps=0 if most is None and self.min_tx_rate_mbps is not None else most,
            spoof_check=self.spoof_check,
            trust=self.trust,
            link_state=self.link_state,
        )


def with_address(interface: Interface, vf: VfProperties) -> Interface:
    """Return an interface with the address that its physical function gives it: it may send from no other. Raise
    InputError if another one is asked for."""
    if not vf.mac:
        return interface
    if interface.hardware_address not in ("", vf.mac):
        raise InputError(f"{interface.hardware_address} at $.interface.hardwareAddress is not {vf.mac} at $.vf.mac")
    return replace(interface, hardware_address=vf.mac)
