"""Properties of virtual functions in the rtnetlink messages of their physical function's interface, encoded and
decoded. Pure.

Source: include/uapi/linux/if_link.h; net/core/rtnetlink.c, do_setvfinfo (what is sent) and rtnl_fill_vfinfo (what comes
back). IFLA_VFINFO_LIST has one IFLA_VF_INFO for each function, which has one attribute for each property; each begins
with the index of the function, u32 `vf`:

    IFLA_VF_MAC         ifla_vf_mac         u32 vf, u8 mac[32]
    IFLA_VF_SPOOFCHK    ifla_vf_spoofchk    u32 vf, u32 setting; all bits set if the driver does not report it
    IFLA_VF_LINK_STATE  ifla_vf_link_state  u32 vf, u32 link_state
    IFLA_VF_RATE        ifla_vf_rate        u32 vf, u32 min_tx_rate, u32 max_tx_rate, in Mbit/s
    IFLA_VF_TRUST       ifla_vf_trust       u32 vf, u32 setting; missing if the driver does not report it
    IFLA_VF_VLAN_LIST   has one IFLA_VF_VLAN_INFO:
                        ifla_vf_vlan_info   u32 vf, u32 vlan, u32 qos, be16 vlan_proto, and 2 bytes that C adds

A function that the driver knows nothing of is missing from the list.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType

from nodeagent.core.network.vf_checks import Property
from nodeagent.core.network.vf_properties import DEFAULT_PROTOCOL, VfProperties
from nodeagent.errors import HostError
from nodeagent.host.netlink.messages import attribute, attributes, each, number

_VFINFO_LIST, _EXT_MASK = 22, 29
_VF_INFO, _VLAN_INFO = 1, 1
_MAC, _SPOOF_CHECK, _LINK_STATE, _RATE, _TRUST, _VLAN_LIST = 1, 4, 5, 6, 9, 12
_FILTER_VF, _SKIP_STATS = 1, 8
"""RTEXT_FILTER_VF: with the virtual functions. RTEXT_FILTER_SKIP_STATS: without what each has sent and received, with
which the 256 functions of one adapter do not fit into an attribute."""
_ADDRESS, _SETTING, _LIMITS, _VLAN = struct.Struct("=I32s"), struct.Struct("=II"), struct.Struct("=III"), "=III"
_UNKNOWN = 0xFFFFFFFF
_MAC_BYTES = 6
_PROTOCOLS: Mapping[str, int] = MappingProxyType({"802.1Q": 0x8100, "802.1ad": 0x88A8})
"""ETH_P_8021Q and ETH_P_8021AD (include/uapi/linux/if_ether.h)."""
_PROTOCOL_NAMES: Mapping[int, str] = MappingProxyType({code: name for name, code in _PROTOCOLS.items()})
_LINK_STATES = ("auto", "enable", "disable")


def with_functions() -> bytes:
    """Return the attribute that asks for virtual functions along with an interface."""
    return number(_EXT_MASK, _FILTER_VF | _SKIP_STATS)


def encoded(index: int, wanted: VfProperties, which: Property) -> bytes:
    """Return the attribute that sets one property of one virtual function."""
    return attribute(_VFINFO_LIST, attribute(_VF_INFO, _property(index, wanted, which)))


def _property(index: int, wanted: VfProperties, which: Property) -> bytes:
    match which:
        case Property.MAC:
            return attribute(_MAC, _ADDRESS.pack(index, bytes.fromhex(wanted.mac.replace(":", ""))))
        case Property.VLAN:
            vlan = struct.pack(_VLAN, index, wanted.vlan or 0, wanted.vlan_qos)
            vlan += struct.pack(">H", _PROTOCOLS[wanted.vlan_protocol]) + bytes(2)
            return attribute(_VLAN_LIST, attribute(_VLAN_INFO, vlan))
        case Property.TX_RATE:
            return attribute(_RATE, _LIMITS.pack(index, wanted.min_tx_rate_mbps, wanted.max_tx_rate_mbps or 0))
        case Property.SPOOF_CHECK:
            return attribute(_SPOOF_CHECK, _SETTING.pack(index, bool(wanted.spoof_check)))
        case Property.LINK_STATE:
            return attribute(_LINK_STATE, _SETTING.pack(index, _LINK_STATES.index(wanted.link_state)))
        case Property.TRUST:
            return attribute(_TRUST, _SETTING.pack(index, bool(wanted.trust)))


def decoded(link: Mapping[int, bytes]) -> dict[int, VfProperties]:
    """Return the virtual functions in the attributes of an interface, by index. Raise HostError for what is no such
    message."""
    try:
        infos = [attributes(data) for kind, data in each(link.get(_VFINFO_LIST, b"")) if kind == _VF_INFO]
        return dict(_function(one) for one in infos)
    except (struct.error, KeyError) as error:
        raise HostError(f"cannot read the virtual functions in a netlink message: {error!r}") from None


def _function(found: Mapping[int, bytes]) -> tuple[int, VfProperties]:
    """Return one function with its index. Raise struct.error, KeyError."""
    index, address = _ADDRESS.unpack_from(found[_MAC])
    _, least, most = _LIMITS.unpack_from(found[_RATE])
    vlan, priority, protocol = _vlan(found[_VLAN_LIST])
    state = _setting(found.get(_LINK_STATE))
    return index, VfProperties(
        mac=address[:_MAC_BYTES].hex(":"),
        vlan=vlan,
        vlan_qos=priority,
        vlan_protocol=protocol,
        min_tx_rate_mbps=least,
        max_tx_rate_mbps=most,
        spoof_check=_on(found.get(_SPOOF_CHECK)),
        trust=_on(found.get(_TRUST)),
        link_state=_LINK_STATES[state] if state is not None and state < len(_LINK_STATES) else "",
    )


def _vlan(data: bytes) -> tuple[int, int, str]:
    """Return (VLAN, priority, protocol); some drivers report no protocol for functions without a VLAN."""
    info = attributes(data)[_VLAN_INFO]
    _, vlan, priority = struct.unpack_from(_VLAN, info)
    (protocol,) = struct.unpack_from(">H", info, struct.calcsize(_VLAN))
    return vlan, priority, _PROTOCOL_NAMES.get(protocol, DEFAULT_PROTOCOL)


def _setting(data: bytes | None) -> int | None:
    if data is None:
        return None
    value = int(_SETTING.unpack_from(data)[1])
    return None if value == _UNKNOWN else value


def _on(data: bytes | None) -> bool | None:
    value = _setting(data)
    return None if value is None else bool(value)
