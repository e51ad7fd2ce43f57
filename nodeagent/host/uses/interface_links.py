"""Which network interfaces are below which others: members of a bond or a bridge, the parent of a VLAN.

The kernel links every stacked interface with those below it (Documentation/ABI/testing/sysfs-class-net, upper_* and
lower_*).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from nodeagent.host.sysfs.lenient import Tolerant

NET = "sys/class/net"


def links(reader: Tolerant, names: Iterable[str]) -> Mapping[str, set[str]]:
    """Return the interfaces directly below each interface."""
    below: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for upper, lower in _pairs(reader, name, reader.names(f"{NET}/{name}")):
            below[upper].add(lower)
    for line in (reader.text("proc/1/net/vlan/config") or "").splitlines()[2:]:
        words = [word.strip() for word in line.split("|")]
        if len(words) > 1:
            below[words[0]].add(words[-1])
    return below


def _pairs(reader: Tolerant, name: str, files: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (upper, lower) for each relation that the folder of one interface shows."""
    path = f"{NET}/{name}"
    for file in files:
        kind, _, other = file.partition("_")
        if other and kind in ("lower", "upper"):
            yield (name, other) if kind == "lower" else (other, name)
    if "master" in files and (master := reader.link_name(f"{path}/master")):
        yield master, name
    if "bonding" in files:
        yield from ((name, slave) for slave in (reader.text(f"{path}/bonding/slaves") or "").split())
    if "brif" in files:
        yield from ((name, port) for port in reader.names(f"{path}/brif"))


def reachable(names: Iterable[str], below: Mapping[str, set[str]]) -> frozenset[str]:
    """Return some interfaces and all below them, at any depth; loops end."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(below.get(name, ()))
    return frozenset(found)
