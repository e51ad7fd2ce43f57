"""Frames of the NRI trunk and messages of ttrpc in them: bytes to values and back. No I/O.

A stream may be cut anywhere. Every message that was complete before a fault is given out; after the fault nothing is.
What is kept between two pieces is bounded: one unfinished message for each logical connection that is known.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from nodeagent.errors import InputError, PeerError

REQUEST, RESPONSE, DATA = 1, 2, 3
"""Message.type. Others are given out too: they are for the reader to pass over."""
LARGEST_DATA_BYTES = 4 << 20
"""Of one message; ttrpc's own limit."""

_FRAME_HEADER = struct.Struct(">II")
_HEADER = struct.Struct(">IIBB")
LARGEST_FRAME_BYTES = _HEADER.size + LARGEST_DATA_BYTES
"""Payload of one frame of the trunk: the most that the runtime's own multiplexer writes."""
_FIRST_FRAME_BYTES = 4096
"""A runtime reads a message's beginning into a buffer of this size and fails where a frame does not fit into it; what
remains it reads into the message's own memory, so that comes in one frame (it keeps only 256 frames)."""


class FrameError(PeerError):
    """A stream that cannot be read any further. `offset`: bytes from its beginning to the fault."""

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
    """A message that was announced with more data than is allowed; its data is passed over."""

    connection: int
    stream: int
    type: int
    data_bytes: int


class Stray(NamedTuple):
    """A frame for a logical connection that is not known; its payload is passed over."""

    connection: int
    payload_bytes: int


Received: TypeAlias = Message | Oversized | Stray


def encode(message: Message) -> bytes:
    """The message as frames of the trunk; InputError where it has too much data."""
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
        """`connections`: the ids of the logical connections that are read."""
        self._messages = {one: _Assembler(one) for one in connections}
        self._offset = 0
        self._header = bytearray()
        self._current: _Assembler | None = None
        self._missing = 0
        self._fault: FrameError | None = None

    @property
    def held_bytes(self) -> int:
        """What is kept of unfinished headers and messages."""
        return len(self._header) + sum(one.held_bytes for one in self._messages.values())

    def feed(self, data: bytes) -> Iterator[Received]:
        """What `data` completes, in order; FrameError after it where the stream is broken. To be read to its end."""
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
        """Say that the stream has ended; FrameError where that is in the middle of a message."""
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
        """Read (more of) a frame's header; what is left of the data."""
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
        """Forget a header that is complete; report it if its frame is for no connection."""
        if len(self._header) == _FRAME_HEADER.size:
            if self._current is None and self._fault is None:
                yield Stray(*_FRAME_HEADER.unpack(self._header))
            self._header.clear()


class _Assembler:
    """Puts the messages of one logical connection together."""

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
        """What the piece completes. Nothing of a refused message is kept."""
        while piece:
            taken = min(len(piece), self._skip or self._wanted())
            part, piece = piece[:taken], piece[taken:]
            if self._skip:
                self._skip -= taken
            else:
                self._buffer += part
                yield from self._complete()

    def _wanted(self) -> int:
        """How many more bytes the header needs, or the message whose header is there."""
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
