"""Properties of virtual functions, read and set through the interface of their physical function, as
`ip link set PF vf N` does it.

The kernel has them in the physical function's driver: they are the same wherever the virtual function's own interface
is, and whatever driver it has. Every method blocks.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Protocol

from nodeagent.core.network.vf_checks import Property, VfPlace, text_of
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.errors import HostError, cause_of
from nodeagent.host.netlink.connection import Netlink
from nodeagent.host.netlink.messages import attributes, read_text, text
from nodeagent.host.netlink.vf_messages import decoded, encoded, with_functions

_GETLINK, _SETLINK = 18, 19
_LINK = struct.Struct("=BBHiII")
_NAME, _PARENT = 3, 56


class Exchange(Protocol):
    """What exchanges one message with the kernel; all that virtual functions need of it."""

    def get(self, what: str, kind: int, body: bytes) -> bytes | None:
        """Send a request of a kind and return the body of the answer, None if it has none. Raise NetlinkError, which
        begins with `what`."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def host_exchange() -> Exchange:
    """Return one with the kernel in this process's own network namespace, the host's: entering it would take more
    rights. Raise HostError."""
    try:
        return Netlink(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0))
    except OSError as error:
        raise HostError(f"cannot talk to the kernel through rtnetlink: {cause_of(error)}") from None


class PhysicalFunction:
    """One interface with virtual functions."""

    def __init__(self, exchange: Exchange, place: VfPlace) -> None:
        """place: of one of its virtual functions, as last seen."""
        self._exchange = exchange
        self._place = place

    def read(self) -> VfProperties | None:
        """Return the properties of the virtual function, or None if there is no such function. Raise HostError, also if
        the interface belongs to another adapter by now."""
        return self._read()[1]

    def set(self, wanted: VfProperties, which: Property) -> None:
        """Set one property. Raise HostError with the kernel's own words."""
        what = f"cannot set {text_of(wanted, which)} of VF {self._place.index} of {self._place.interface}"
        interface, _ = self._read()
        head = _LINK.pack(socket.AF_UNSPEC, 0, 0, interface, 0, 0)
        self._exchange.get(what, _SETLINK, head + encoded(self._place.index, wanted, which))

    def _read(self) -> tuple[int, VfProperties | None]:
        """Return the number of the interface too."""
        place = self._place
        what = f"cannot read VF {place.index} of {place.interface}"
        head = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0)
        answer = self._exchange.get(what, _GETLINK, head + text(_NAME, place.interface) + with_functions())
        if answer is None:
            raise HostError(f"{what}: the kernel answers with nothing")
        found = attributes(answer[_LINK.size :])
        if ":" in (parent := read_text(found.get(_PARENT))) and parent != place.pf:
            raise HostError(f"{what}: it is the interface of {parent} by now, not of {place.pf}")
        return _LINK.unpack_from(answer)[3], decoded(found).get(place.index)


@contextlib.contextmanager
def opened(exchange: Exchange, place: VfPlace) -> Iterator[PhysicalFunction]:
    """Yield a physical function and end the exchange afterwards."""
    try:
        yield PhysicalFunction(exchange, place)
    finally:
        exchange.close()
