"""Which network interfaces lead to the disks and file systems that the node has over the network: mounts of NFS, SMB
and Ceph, sessions of iSCSI, controllers of NVMe over Fabrics.

An adapter that only reaches storage has no default route, and what is mounted through it hangs without it. The address
of the peer is known, not the adapter: it is the one of the most specific routes to that address. Of Ceph the monitors
count, as the kernel does not show the other servers; whatever FUSE, RBD, NBD and DRBD reach shows no address at all.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.uses.interface_links import NET, links, reachable

_FABRICS, _ISCSI = "sys/class/nvme-fabrics/ctl", "sys/class/iscsi_connection"
_HEX_32, _HEX_128 = re.compile("[0-9A-Fa-f]{8}"), re.compile("[0-9A-Fa-f]{32}")
_PREFIX = re.compile("[0-7][0-9A-Fa-f]|80")
_PORT = re.compile(r"(?<=[0-9\]]):[0-9]+$")


def storage_interfaces(reader: Tolerant, mounted: Iterable[str]) -> frozenset[str]:
    """Return the interfaces with the most specific routes to the node's storage in the network namespace of process 1,
    and all that are below them.

    mounted: IP addresses of the servers of mounted file systems, with or without a port.
    """
    named = {name for name in _bound(reader) if name}
    peers = {one for text in (*mounted, *_peers(reader)) if (one := _address(text))}
    if not peers and not named:
        return frozenset()
    routes = list(_routes(reader))
    for peer in peers:
        named.update(_leading_to(peer, routes))
    named.discard("lo")
    return reachable(named, links(reader, reader.names(NET))) if named else frozenset()


def _controllers(reader: Tolerant) -> Iterator[dict[str, str]]:
    """Yield the address of each controller over Fabrics, by name of its part (nvmf_get_address in
    drivers/nvme/host/fabrics.c)."""
    for name in reader.names(_FABRICS):
        if name.startswith("nvme"):
            text = reader.text(f"{_FABRICS}/{name}/address") or ""
            yield dict(part.split("=", 1) for part in text.strip().split(",") if "=" in part)


def _bound(reader: Tolerant) -> Iterator[str]:
    """Yield the interfaces that connections are bound to."""
    yield from (one.get("host_iface", "") for one in _controllers(reader))


def _peers(reader: Tolerant) -> Iterator[str]:
    """Yield the addresses of the peers of connections."""
    yield from (one.get("traddr", "") for one in _controllers(reader))
    for name in reader.names(_ISCSI):
        yield reader.text(f"{_ISCSI}/{name}/address") or reader.text(f"{_ISCSI}/{name}/persistent_address") or ""


# ---------------------------------------------------------------- routes


class _Route(NamedTuple):
    interface: str
    family: socket.AddressFamily
    network: int
    prefix_bits: int
    """How many of the highest bits of an address have to be those of the network."""


class _Address(NamedTuple):
    family: socket.AddressFamily
    value: int


_BITS = {socket.AF_INET: 32, socket.AF_INET6: 128}


def _address(text: str) -> _Address | None:
    """Return an IP address, without the port that may follow, or None for anything else, such as a port of Fibre
    Channel."""
    plain = _PORT.sub("", text.strip()) if text.count(":") == 1 or "[" in text else text.strip()
    plain = plain.strip("[]").partition("%")[0]
    for family in _BITS:
        try:
            return _Address(family, int.from_bytes(socket.inet_pton(family, plain), "big"))
        except OSError:
            continue
    return None


def _routes(reader: Tolerant) -> Iterator[_Route]:
    """Yield the routes of the main table for IPv4, of all tables for IPv6 (net/ipv4/fib_trie.c, net/ipv6/route.c)."""
    for line in (reader.text("proc/1/net/route") or "").splitlines():
        words = line.split()
        if len(words) > 7 and _HEX_32.fullmatch(words[1]) and _HEX_32.fullmatch(words[7]):
            network, mask = (int.from_bytes(bytes.fromhex(words[at]), "little") for at in (1, 7))
            yield _Route(words[0], socket.AF_INET, network, mask.bit_count())
    for line in (reader.text("proc/1/net/ipv6_route") or "").splitlines():
        words = line.split()
        if len(words) > 9 and _HEX_128.fullmatch(words[0]) and _PREFIX.fullmatch(words[1]):
            yield _Route(words[9], socket.AF_INET6, int(words[0], 16), int(words[1], 16))


def _leading_to(peer: _Address, routes: Iterable[_Route]) -> set[str]:
    """Return the interfaces of the most specific routes to an address. If there is none, another table has it: then
    all interfaces with a route of that family."""
    alike = [one for one in routes if one.family == peer.family]
    bits = _BITS[peer.family]
    fit = [one for one in alike if (peer.value ^ one.network) >> (bits - one.prefix_bits) == 0]
    most = max((one.prefix_bits for one in fit), default=-1)
    return {one.interface for one in fit if one.prefix_bits == most} or {one.interface for one in alike}
