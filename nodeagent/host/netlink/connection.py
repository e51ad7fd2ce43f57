"""One connection to the kernel's rtnetlink, and the errors that it answers.

Source: include/uapi/linux/netlink.h and Documentation/userspace-api/netlink/intro.rst. The kernel works on a request
while it is sent, and holds one lock for all of them: a driver that resets its adapter makes others wait.
"""

from __future__ import annotations

import os
import socket
import struct

from nodeagent.errors import HostError
from nodeagent.host.netlink.messages import attributes, read_text

DUMP, CREATE, EXCLUSIVE = 0x300, 0x400, 0x200
"""Flags of a request."""
ANSWER_S = 10.0
"""How long an answer may take after the kernel has taken the request."""
_REQUEST, _ACK, _INTERRUPTED, _TEXTS, _SHORT = 1, 4, 0x10, 0x200, 0x100
_ERROR, _DONE = 2, 3
_HEAD = struct.Struct("=IHHII")
_LARGEST_BYTES = 1 << 16
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_ATTR_MSG = 1
_TRIES = 5
"""How often a list is asked for that changes while it is read."""


class NetlinkError(HostError):
    """The kernel refused a request. code: its errno."""

    def __init__(self, what: str, code: int, said: str = "") -> None:
        super().__init__(f"{what}: {os.strerror(code)}" + (f" ({said})" if said else ""))
        self.code = code


class Netlink:
    """One connection, in the network namespace in which its socket was made. Not for several threads."""

    def __init__(self, made: socket.socket) -> None:
        """made: a netlink socket of the routing family; closed with this connection."""
        self._socket = made
        self._socket.settimeout(ANSWER_S)
        self._sequence = 0
        for option in (_EXT_ACK, _CAP_ACK):
            made.setsockopt(_SOL_NETLINK, option, 1)

    def close(self) -> None:
        self._socket.close()

    def change(self, what: str, kind: int, body: bytes, flags: int = 0) -> None:
        """Have the kernel change something. Raise NetlinkError, which begins with `what`: "cannot move eth1"."""
        self._answers(what, kind, body, _REQUEST | _ACK | flags)

    def dump(self, what: str, kind: int, body: bytes) -> list[bytes]:
        """Return every object of a kind, as the bodies of messages. Raise NetlinkError."""
        for _ in range(_TRIES):
            found, whole = self._answers(what, kind, body, _REQUEST | DUMP)
            if whole:
                return found
        raise HostError(f"{what}: the list changes again and again while it is read")

    def get(self, what: str, kind: int, body: bytes) -> bytes | None:
        """Return one object, or None if the kernel answers with none. Raise NetlinkError."""
        found, _ = self._answers(what, kind, body, _REQUEST | _ACK)
        return found[0] if found else None

    def _answers(self, what: str, kind: int, body: bytes, flags: int) -> tuple[list[bytes], bool]:
        """Return the objects in an answer, and whether nothing has changed meanwhile."""
        self._sequence += 1
        request = _HEAD.pack(_HEAD.size + len(body), kind, flags, self._sequence, 0) + body
        found: list[bytes] = []
        whole = True
        try:
            self._socket.send(request)
            while True:
                for kind_found, flags_found, data in self._messages():
                    whole = whole and not flags_found & _INTERRUPTED
                    if kind_found in (_ERROR, _DONE):
                        _raise_error(what, data, flags_found)
                        return found, whole
                    found.append(data)
        except TimeoutError:
            raise HostError(f"{what}: the kernel did not answer within {ANSWER_S:g} s") from None
        except OSError as error:
            raise HostError(f"{what}: {error.strerror or error}") from None

    def _messages(self) -> list[tuple[int, int, bytes]]:
        """Return the messages in one datagram that answer the last request, as (type, flags, body)."""
        data, at, found = self._socket.recv(_LARGEST_BYTES), 0, []
        while at + _HEAD.size <= len(data):
            length, kind, flags, sequence, _ = _HEAD.unpack_from(data, at)
            if not _HEAD.size <= length <= len(data) - at:
                raise HostError(f"cannot read a netlink message: {length} bytes at {at} of {len(data)}")
            if sequence == self._sequence:
                found.append((kind, flags, data[at + _HEAD.size : at + length]))
            at += length + (-length % 4)
        return found


def _raise_error(what: str, data: bytes, flags: int) -> None:
    """Raise NetlinkError if the last message of an answer has one."""
    code = -struct.unpack_from("=i", data)[0] if len(data) >= 4 else 0
    if not code:
        return
    texts = attributes(data[4 + _HEAD.size :]) if flags & _TEXTS and flags & _SHORT else {}
    raise NetlinkError(what, code, read_text(texts.get(_ATTR_MSG)).rstrip("."))
