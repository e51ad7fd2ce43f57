"""What the header of a shared library shows: for which word size it is, and under which name programs ask for it.

Source: elf(5). Only 64-bit little-endian files are read further. Reading is bounded, whatever the file contains.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("<4sBB10xHHIQQQIHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_ENTRY = struct.Struct("<qQ")
_LOAD, _DYNAMIC = 1, 2
_STRING_TABLE, _SONAME, _END = 5, 14, 0
_MOST_SEGMENTS, _MOST_ENTRIES, _LONGEST_NAME = 64, 1024, 256
_MAGIC, _64_BIT, _LITTLE_ENDIAN = b"\x7fELF", 2, 1


class Library(NamedTuple):
    """bits: 32 or 64. soname: "" if the file does not say."""

    bits: int
    soname: str = ""


class _Segment(NamedTuple):
    type: int
    offset: int
    address: int
    size: int


def read(path: str) -> Library | None:
    """Return what a file says of itself, or None if it is no ELF file or cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _library(handle)
    except (OSError, OverflowError, struct.error):  # offsets beyond the end, or beyond any file
        return None
    finally:
        os.close(handle)


def _library(handle: int) -> Library | None:
    magic, word, order, *_, table, _, _, _, size, count = _HEADER.unpack(os.pread(handle, _HEADER.size, 0))
    if magic != _MAGIC:
        return None
    if (word, order) != (_64_BIT, _LITTLE_ENDIAN):
        return Library(32 if word != _64_BIT else 64)
    segments = list(_segments(handle, table, size, min(count, _MOST_SEGMENTS)))
    return Library(64, _soname(handle, segments))


def _segments(handle: int, table: int, size: int, count: int) -> Iterator[_Segment]:
    for index in range(count):
        data = os.pread(handle, _SEGMENT.size, table + index * size)
        type_, _, offset, address, _, length, _, _ = _SEGMENT.unpack(data)
        yield _Segment(type_, offset, address, length)


def _soname(handle: int, segments: list[_Segment]) -> str:
    dynamic = next((one for one in segments if one.type == _DYNAMIC), None)
    if dynamic is None:
        return ""
    entries = dict(_entries(os.pread(handle, min(dynamic.size, _MOST_ENTRIES * _ENTRY.size), dynamic.offset)))
    if _SONAME not in entries or _STRING_TABLE not in entries:
        return ""
    address = entries[_STRING_TABLE] + entries[_SONAME]
    for one in segments:
        if one.type == _LOAD and one.address <= address < one.address + one.size:
            text = os.pread(handle, _LONGEST_NAME, one.offset + address - one.address).partition(b"\0")[0]
            return text.decode("ascii", "replace") if b"/" not in text else ""
    return ""


def _entries(data: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in _ENTRY.iter_unpack(data[: len(data) - len(data) % _ENTRY.size]):
        if tag == _END:
            return
        yield tag, value
