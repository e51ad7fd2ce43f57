"""Attributes of netlink messages, encoded and decoded. Pure.

Source: include/uapi/linux/netlink.h. Numbers are in the machine's own byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nodeagent.errors import HostError

_KIND = 0x3FFF
"""The bits of an attribute's type without its flags."""
_HEAD = struct.Struct("=HH")


def attribute(kind: int, data: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    return _HEAD.pack(_HEAD.size + len(data), kind) + data + bytes(-len(data) % 4)


def number(kind: int, value: int) -> bytes:
    """Return an attribute with a number of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    """Return an attribute with a text that ends in NUL."""
    return attribute(kind, value.encode() + b"\0")


def each(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the attributes in a message, as (type, data). Raise HostError if they do not fit into it."""
    at = 0
    while at < len(data):
        length, kind = _HEAD.unpack_from(data, at) if at + _HEAD.size <= len(data) else (0, 0)
        if not _HEAD.size <= length <= len(data) - at:
            raise HostError(f"cannot read a netlink message: an attribute of {length} bytes at {at} of {len(data)}")
        yield kind & _KIND, data[at + _HEAD.size : at + length]
        at += length + (-length % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in a message by type; of several with one type, the last."""
    return dict(each(data))


def read_text(data: bytes | None) -> str:
    """Return the text in an attribute, "" if there is none."""
    return (data or b"").split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def read_number(data: bytes | None) -> int:
    """Return the number of 32 bits in an attribute, 0 if there is none."""
    return int(struct.unpack_from("=I", data)[0]) if data is not None and len(data) >= 4 else 0
