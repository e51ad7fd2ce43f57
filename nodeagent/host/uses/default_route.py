"""Which network interfaces carry the node's default routes: those named by a route, and all interfaces below them.

A route names a bond, a bridge, a VLAN or Hyper-V's synthetic interface as often as an adapter. The kernel links every
stacked interface with those below it (Documentation/ABI/testing/sysfs-class-net, upper_* and lower_*); what it does not
link (Open vSwitch) is taken from other evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from nodeagent.host import pci
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.uses.interface_links import NET, links, reachable

_OPEN_VSWITCH = "ovs-system"
"""The datapath, master of all ports except the bridges' own interfaces (net/openvswitch/vport-netdev.c)."""
_WIDE_MASKS, _WIDE_PREFIXES = frozenset({"00000000", "00000080"}), frozenset({"00", "01", "02", "03"})
"""Masks as in proc/net/route, in the byte order of the network; lengths of prefixes as in proc/net/ipv6_route."""
_VRF_FLAGS = 0x480
"""IFF_MASTER and IFF_NOARP: no other interface has both (drivers/net/vrf.c)."""


def routed_interfaces(reader: Tolerant) -> frozenset[str]:
    """Return the interfaces with a default route in the network namespace of process 1, and all that are below them."""
    adapters = {name: address is not None for name, _, address, _ in pci.members(reader, NET)}
    below = links(reader, adapters)
    routes = _routes(reader)
    named = {*(one.interface for one in routes if one.is_default), *_routed_vrfs(reader, below)}
    found = reachable([*named, *_unlinked(reader, adapters, below, named)], below)
    there = found & adapters.keys()
    if there and not any(adapters[one] or _is_hardware(reader, one) for one in there):
        found |= reachable(_below_tunnels(adapters, below, routes), below)
    return found


class _Route(NamedTuple):
    interface: str
    is_default: bool
    """Whether it leads to so much that it is a default route: a half of all addresses (0.0.0.0/1, as VPNs set them),
    or all that are global (2000::/3)."""


def _routes(reader: Tolerant) -> list[_Route]:
    """Return all routes but those of the loopback interface. The file for IPv4 has only the main table, that for IPv6
    all."""
    four = (line.split() for line in (reader.text("proc/1/net/route") or "").splitlines()[1:])
    six = (line.split() for line in (reader.text("proc/1/net/ipv6_route") or "").splitlines())
    found = [_Route(words[0], words[7] in _WIDE_MASKS) for words in four if len(words) > 7]
    found += [_Route(words[9], words[1] in _WIDE_PREFIXES) for words in six if len(words) > 9]
    return [one for one in found if one.interface != "lo"]


def _routed_vrfs(reader: Tolerant, names: Iterable[str]) -> list[str]:
    """Return the VRFs if a table other than the main one may have a default route: nothing shows whose table it is."""
    vrfs = [name for name in names if (reader.number(f"{NET}/{name}/flags") or 0) & _VRF_FLAGS == _VRF_FLAGS]
    return vrfs if vrfs and _other_table_has_default(reader) else []


def _other_table_has_default(reader: Tolerant) -> bool:
    """Return whether a table other than main and local has a default route; True if the tables cannot be read.

    Tables start with "Main:", "Local:" or "Id N:" (net/ipv4/fib_trie.c, fib_trie_seq_show); a default route is the line
    "/0 universe UNICAST" below the leaf 0.0.0.0.
    """
    text = reader.text("proc/1/net/fib_trie")
    if text is None:
        return True
    table, leaf = "", ""
    for words in filter(None, map(str.split, text.splitlines())):
        if words[-1].endswith(":"):
            table = words[0]
        elif words[0] == "|--" and len(words) > 1:
            leaf = words[1]
        elif table == "Id" and leaf == "0.0.0.0" and words[0] == "/0" and words[-1] == "UNICAST":  # noqa: S104
            return True
    return False


# ---------------------------------------------------------------- what is below what


def _is_hardware(reader: Tolerant, name: str) -> bool:
    return not reader.sysfs.entry(NET, name).startswith("sys/devices/virtual/")


def _below_tunnels(adapters: Mapping[str, bool], below: Mapping[str, set[str]], routes: Iterable[_Route]) -> list[str]:
    """Return the interfaces that may carry the node's network where its default routes lead into tunnels alone
    (WireGuard, PPP, a dummy interface): those with any route that lead to an adapter, or else all adapters."""
    routed = {one.interface for one in routes}
    may = [one for one in routed if any(adapters.get(lower) for lower in reachable([one], below))]
    return may or [one for one, is_adapter in adapters.items() if is_adapter]


def _unlinked(
    reader: Tolerant, adapters: Mapping[str, bool], below: Mapping[str, set[str]], named: Iterable[str]
) -> Iterator[str]:
    """Yield what is below those routed interfaces that no link leads to an adapter from.

    The kernel does not link an Open vSwitch bridge with its ports, and old kernels do not link Hyper-V's synthetic
    interface with the virtual function. So all ports of the datapath count, and adapters with the same MAC address.
    """
    for name in named:
        if any(adapters.get(one) for one in reachable([name], below)):
            continue
        address = reader.text(f"{NET}/{name}/address")
        yield _OPEN_VSWITCH
        if address is not None:
            yield from (one for one in adapters if adapters[one] and reader.text(f"{NET}/{one}/address") == address)
