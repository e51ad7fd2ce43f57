"""Frames of the NRI trunk and the ttrpc messages in them: bytes to values and back. No I/O.

A stream may be split anywhere. Every message that was complete before a fault is returned; after the fault nothing is.
What is buffered between two pieces is bounded: one unfinished message per known logical connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from nodeagent.errors import InputError, PeerError

REQUEST, RESPONSE, DATA = 1, 2, 3
"""Values of Message.type. Others are returned too; the reader must skip them."""
LARGEST_DATA_BYTES = 4 << 20
"""Limit for one message; ttrpc's own limit."""

_FRAME_HEADER = struct.Struct(">II")
_HEADER = struct.Struct(">IIBB")
LARGEST_FRAME_BYTES = _HEADER.size + LARGEST_DATA_BYTES
"""Payload limit for one frame of the trunk: the most that the runtime's own multiplexer writes."""
_FIRST_FRAME_BYTES = 4096
"""A runtime reads a message's beginning into a buffer of this size and fails if a frame does not fit into it. It reads
the rest into the message's own memory, so the rest is sent as one frame (it queues only 256 frames)."""


class FrameError(PeerError):
    """A stream that cannot be read further. `offset`: bytes from its beginning to the fault."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"cannot read stream at byte {offset}: {why}")
        self.offset = offset


class Message(NamedTuple):
    """One ttrpc message on one logical connection."""

    connection: int
    stream: int
    type: int
    flags: int = 0
    data: bytes = b""


class Oversized(NamedTuple):
    """A message announced with more data than is allowed; its data is skipped."""

    connection: int
    stream: int
    type: int
    data_bytes: int


class Stray(NamedTuple):
    """A frame for an unknown logical connection; its payload is skipped."""

    connection: int
    payload_bytes: int


Received: TypeAlias = Message | Oversized | Stray


def encode(message: Message) -> bytes:
    """Return a message as frames of the trunk. Raise InputError if it has too much data."""
    if len(message.data) > LARGEST_DATA_BYTES:
        raise InputError(
            f"cannot send message on stream {message.stream}: {len(message.data)} bytes, the limit is "
            f"{LARGEST_DATA_BYTES}"
        )
    header = _HEADER.pack(len(message.data), message.stream, message.type, message.flags)
    whole = header + message.data
    pieces = (whole[:_FIRST_FRAME_BYTES], whole[_FIRST_FRAME_BYTES:])
    return b"".join(_FRAME_HEADER.pack(message.connection, len(piece)) + piece for piece in pieces if piece)


class FrameParser:
    """Reads one direction of a trunk, piece by piece."""

    def __init__(self, connections: Iterable[int]) -> None:
        """`connections`: the ids of the logical connections to read."""
        self._messages = {one: _Assembler(one) for one in connections}
        self._offset = 0
        self._header = bytearray()
        self._current: _Assembler | None = None
        self._missing = 0
        self._fault: FrameError | None = None

    @property
    def held_bytes(self) -> int:
        """Return the number of bytes buffered of unfinished headers and messages."""
        return len(self._header) + sum(one.held_bytes for one in self._messages.values())

    def feed(self, data: bytes) -> Iterator[Received]:
        """Yield what `data` completes, in order, then raise FrameError if the stream is broken. Iterate to the end."""
        rest = memoryview(data)
        while rest and self._fault is None:
            if self._missing:
                piece, rest = rest[: self._missing], rest[self._missing :]
                yield from self._take(piece)
            else:
                rest = self._take_header(rest)
                yield from self._stray()
        if self._fault is not None:
            raise self._fault

    def end(self) -> None:
        """Note that the stream has ended. Raise FrameError if it ended within a message."""
        unfinished = self._missing or self._header or any(one.busy for one in self._messages.values())
        if self._fault is None and unfinished:
            self._fault = FrameError(self._offset, f"it ends within a message, {self.held_bytes} bytes of it were read")
        if self._fault is not None:
            raise self._fault

    def _take(self, piece: memoryview) -> Iterator[Received]:
        self._offset += len(piece)
        self._missing -= len(piece)
        if self._current is not None:
            yield from self._current.feed(piece)

    def _take_header(self, data: memoryview) -> memoryview:
        """Read (more of) a frame's header. Return the rest of the data."""
        wanted = _FRAME_HEADER.size - len(self._header)
        self._header += data[:wanted]
        self._offset += len(data[:wanted])
        if len(self._header) == _FRAME_HEADER.size:
            self._open_frame(*_FRAME_HEADER.unpack(self._header))
        return data[wanted:]

    def _open_frame(self, connection: int, payload_bytes: int) -> None:
        if payload_bytes > LARGEST_FRAME_BYTES:
            self._fault = FrameError(
                self._offset - _FRAME_HEADER.size,
                f"a frame of {payload_bytes} bytes for connection {connection}, the limit is {LARGEST_FRAME_BYTES}",
            )
        self._current = self._messages.get(connection)
        self._missing = payload_bytes

    def _stray(self) -> Iterator[Stray]:
        """Discard a complete header; yield a Stray if its frame is for an unknown connection."""
        if len(self._header) == _FRAME_HEADER.size:
            if self._current is None and self._fault is None:
                yield Stray(*_FRAME_HEADER.unpack(self._header))
            self._header.clear()


class _Assembler:
    """Assembles the messages of one logical connection."""

    def __init__(self, connection: int) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._skip = 0

    @property
    def held_bytes(self) -> int:
        return len(self._buffer)

    @property
    def busy(self) -> bool:
        return bool(self._buffer or self._skip)

    def feed(self, piece: memoryview) -> Iterator[Message | Oversized]:
        """Yield what the piece completes. The data of an oversized message is not kept."""
        while piece:
            taken = min(len(piece), self._skip or self._wanted())
            part, piece = piece[:taken], piece[taken:]
            if self._skip:
                self._skip -= taken
            else:
                self._buffer += part
                yield from self._complete()

    def _wanted(self) -> int:
        """Return how many bytes the header still needs, or, once it is complete, the message."""
        if len(self._buffer) < _HEADER.size:
            return _HEADER.size - len(self._buffer)
        data_bytes: int = _HEADER.unpack_from(self._buffer)[0]
        return _HEADER.size + data_bytes - len(self._buffer)

    def _complete(self) -> Iterator[Message | Oversized]:
        if len(self._buffer) < _HEADER.size:
            return
        data_bytes, stream, kind, flags = _HEADER.unpack_from(self._buffer)
        if data_bytes > LARGEST_DATA_BYTES:
            self._skip = data_bytes
            self._buffer.clear()
            yield Oversized(self._connection, stream, kind, data_bytes)
        elif len(self._buffer) == _HEADER.size + data_bytes:
            data = bytes(self._buffer[_HEADER.size :])
            self._buffer = bytearray()
            yield Message(self._connection, stream, kind, flags, data)
