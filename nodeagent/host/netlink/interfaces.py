"""The interfaces of one network namespace: what they are, and changing them.

Source: include/uapi/linux/{if_link,if_addr,rtnetlink}.h, net/core/rtnetlink.c. Every method blocks; each change raises
NetlinkError with the kernel's own words.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import msgspec

from nodeagent.host.netlink.connection import CREATE, EXCLUSIVE, Netlink, NetlinkError
from nodeagent.host.netlink.messages import attribute, attributes, each, number, read_number, read_text, text
from nodeagent.host.netlink.namespaces import NetNamespace

_NEWLINK, _GETLINK, _NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE = 16, 18, 20, 22, 24, 26
_LINK, _ADDRESS, _ROUTE = struct.Struct("=BBHiII"), struct.Struct("=BBBBI"), struct.Struct("=BBBBBBBBI")
_HARDWARE, _NAME, _MTU, _LOWER, _MASTER, _INFO, _ALIAS, _NAMESPACE = 1, 3, 4, 5, 10, 18, 20, 28
_LOWER_ELSEWHERE, _PORT, _PROPERTIES, _PARENT = 37, 38, 52, 56
_ALTERNATIVE_NAME = 53
_INFO_KIND = 1
_UP = 1
_LOCAL, _OTHER_END, _FLAGS = 2, 1, 8
_NO_DETECTION, _PERMANENT = 0x02, 0x80
"""IFA_F_NODAD: a pod that starts can use its address at once; IFA_F_PERMANENT."""
_GLOBAL, _ON_LINK = 0, 253
_MAIN, _STATIC, _UNICAST = 254, 4, 1
_DESTINATION, _OUT, _GATEWAY = 1, 4, 5


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One interface."""

    index: int
    name: str
    hardware_address: str = ""
    mtu: int = 0
    up: bool = False
    """Whether an admin set it up."""
    alias: str = ""
    kind: str = ""
    """Of a virtual interface, such as veth or macvlan; "" for a device. Who may make interfaces cannot make one without
    a kind."""
    parent: str = ""
    """The device that it belongs to, such as a PCI address (Linux 5.14 and later), or ""."""
    port: str = ""
    """Which port of the device it is, or ""."""
    master: int = 0
    """Index of the bond or bridge that it belongs to, or 0."""
    lower: int = 0
    """Index of the interface that it is built on, of the same namespace, or 0; of a veth its other end."""


class Interfaces:
    """Interfaces of a namespace, through one connection."""

    def __init__(self, namespace: NetNamespace) -> None:
        """Connect. Raise HostError."""
        self._netlink = Netlink(namespace.socket())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._netlink.close()

    def links(self) -> list[Link]:
        """Return all interfaces, in order of their index."""
        return sorted(map(_read_link, self._dumped()), key=lambda link: link.index)

    def taken_names(self, link: Link | None = None) -> set[str]:
        """Return the names that no other interface can be given, or that one interface cannot be given: those of the
        others, and the alternative names of all."""
        return {name for data in self._dumped() for name in _read_names(data, link.index if link is not None else 0)}

    def _dumped(self) -> list[bytes]:
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0)
        return self._netlink.dump("cannot list network interfaces", _GETLINK, body)

    def link(self, name: str) -> Link | None:
        """Return the interface of a name, or None."""
        return next((one for one in self.links() if one.name == name), None)

    # ---------------------------------------------------------------- changing

    def move(self, link: Link, target: NetNamespace, name: str) -> None:
        """Move an interface to another namespace and give it a name there; the kernel sets it down and takes its
        addresses and routes away. If the name is taken there, it may have been moved all the same."""
        wanted = number(_NAMESPACE, target.fd) + text(_NAME, name)
        self._set(f"cannot move interface {link.name} to {target.path} as {name}", link, wanted)

    def rename(self, link: Link, name: str) -> None:
        """Rename an interface, which has to be down (before Linux 6.2)."""
        self._set(f"cannot rename interface {link.name} to {name}", link, text(_NAME, name))

    def set_alias(self, link: Link, alias: str) -> None:
        """Set the text that goes along with an interface; "" removes it."""
        self._set(f"cannot set the alias of interface {link.name}", link, attribute(_ALIAS, alias.encode()))

    def set_hardware_address(self, link: Link, address: str) -> None:
        """Set the address, such as 02:00:00:00:00:01."""
        what = f"cannot set the hardware address of interface {link.name} to {address}"
        self._set(what, link, attribute(_HARDWARE, bytes.fromhex(address.replace(":", ""))))

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the MTU, in bytes."""
        self._set(f"cannot set the MTU of interface {link.name} to {mtu}", link, number(_MTU, mtu))

    def set_up(self, link: Link, *, up: bool) -> None:
        """Set an interface up or down."""
        state = _UP if up else 0
        self._set(f"cannot set interface {link.name} {'up' if up else 'down'}", link, b"", state, _UP)

    def _set(self, what: str, link: Link, wanted: bytes, flags: int = 0, change: int = 0) -> None:
        head = _LINK.pack(socket.AF_UNSPEC, 0, 0, link.index, flags, change)
        self._netlink.change(what, _NEWLINK, head + wanted)

    # ---------------------------------------------------------------- addresses and routes

    def addresses(self, link: Link) -> list[str]:
        """Return the addresses of an interface that were given to it for good, such as "10.0.0.1/24", sorted; without
        those of the link itself."""
        body = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        found = self._netlink.dump(f"cannot list the addresses of interface {link.name}", _GETADDR, body)
        return sorted(one for one in (_read_address(data, link.index) for data in found) if one)

    def add_address(self, link: Link, address: str) -> None:
        """Add an address, unless it is there."""
        one = ipaddress.ip_interface(address)
        family = socket.AF_INET if one.version == 4 else socket.AF_INET6
        flags = _PERMANENT | (_NO_DETECTION if one.version == 6 else 0)
        body = _ADDRESS.pack(family, one.network.prefixlen, flags, _GLOBAL, link.index)
        body += attribute(_LOCAL, one.packed) + attribute(_OTHER_END, one.packed) + number(_FLAGS, flags)
        what = f"cannot add address {address} to interface {link.name}"
        try:
            self._netlink.change(what, _NEWADDR, body, CREATE | EXCLUSIVE)
        except NetlinkError as error:
            if error.code != errno.EEXIST or address not in self.addresses(link):
                raise

    def add_route(self, link: Link, destination: str, gateway: str) -> None:
        """Add a route to the main table, unless it is there. gateway: "" for what is on the link itself."""
        network = ipaddress.ip_network(destination)
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        scope = _GLOBAL if gateway or network.version == 6 else _ON_LINK
        body = _ROUTE.pack(family, network.prefixlen, 0, 0, _MAIN, _STATIC, scope, _UNICAST, 0)
        body += attribute(_DESTINATION, network.network_address.packed) + number(_OUT, link.index)
        body += attribute(_GATEWAY, ipaddress.ip_address(gateway).packed) if gateway else b""
        what = f"cannot add a route to {destination}{f' via {gateway}' if gateway else ''} on interface {link.name}"
        try:
            self._netlink.change(what, _NEWROUTE, body, CREATE | EXCLUSIVE)
        except NetlinkError as error:
            if error.code != errno.EEXIST or (destination, gateway) not in self.routes(link):
                raise

    def routes(self, link: Link) -> list[tuple[str, str]]:
        """Return the routes of the main table that lead through an interface, as (destination, gateway or "")."""
        body = _ROUTE.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)
        found = self._netlink.dump(f"cannot list the routes of interface {link.name}", _GETROUTE, body)
        return [one for one in (_read_route(data, link.index) for data in found) if one is not None]


def _read_link(data: bytes) -> Link:
    _, _, _, index, flags, _ = _LINK.unpack_from(data)
    found = attributes(data[_LINK.size :])
    return Link(
        index=index,
        name=read_text(found.get(_NAME)),
        hardware_address=found.get(_HARDWARE, b"").hex(":"),
        mtu=read_number(found.get(_MTU)),
        up=bool(flags & _UP),
        alias=read_text(found.get(_ALIAS)),
        kind=read_text(attributes(found.get(_INFO, b"")).get(_INFO_KIND)),
        parent=read_text(found.get(_PARENT)),
        port=read_text(found.get(_PORT)),
        master=read_number(found.get(_MASTER)),
        lower=0 if _LOWER_ELSEWHERE in found else read_number(found.get(_LOWER)),
    )


def _read_names(data: bytes, besides: int) -> Iterator[str]:
    """Yield the names of an interface; its alternative names alone if it has the index `besides`."""
    found = attributes(data[_LINK.size :])
    if _LINK.unpack_from(data)[3] != besides:
        yield read_text(found.get(_NAME))
    for kind, name in each(found.get(_PROPERTIES, b"")):
        if kind == _ALTERNATIVE_NAME:
            yield read_text(name)


def _read_address(data: bytes, of: int) -> str:
    """Return an address if it is one of an interface that stays, otherwise ""."""
    _, prefix, flags, scope, index = _ADDRESS.unpack_from(data)
    found = attributes(data[_ADDRESS.size :])
    lasting = read_number(found.get(_FLAGS)) or flags
    packed = found.get(_LOCAL) or found.get(_OTHER_END)
    if index != of or scope != _GLOBAL or not lasting & _PERMANENT or packed is None:
        return ""
    return f"{ipaddress.ip_address(packed)}/{prefix}"


def _read_route(data: bytes, of: int) -> tuple[str, str] | None:
    family, prefix, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(data)
    found = attributes(data[_ROUTE.size :])
    if read_number(found.get(_OUT)) != of or table != _MAIN or kind != _UNICAST:
        return None
    size = 4 if family == socket.AF_INET else 16
    address = ipaddress.ip_address(found.get(_DESTINATION, bytes(size)))
    gateway = str(ipaddress.ip_address(found[_GATEWAY])) if _GATEWAY in found else ""
    return f"{address}/{prefix}", gateway
