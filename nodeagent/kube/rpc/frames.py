"""Where frames of HTTP/2 end in what a peer sends, so that each can be handed to h2 by itself.

h2 takes any number of bytes at once, but reports nothing of what they say if it refuses one of their frames, and it
collects a frame of up to 16 MiB before it refuses it for its size. Source: RFC 9113, 3.4, 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from h2.exceptions import FrameTooLargeError

LARGEST_FRAME_BYTES = 1 << 14
"""Without its header; no settings of this end allow more."""
_HEADER_BYTES = 9
_PREFACE_BYTES = 24
_HEADERS, _CONTINUATION, _END_HEADERS = 0x1, 0x9, 0x4
"""Types of frames, and the flag of the last frame of a list of headers."""


class Frames:
    """What has come of one connection, in order."""

    def __init__(self, *, preface: bool) -> None:
        """preface: whether the peer sends the preface of a client before its first frame."""
        self._left_bytes = _PREFACE_BYTES if preface else 0
        """Until the end of the frame whose header is known."""
        self._header = bytearray()
        self._in_headers = False
        """Whether a list of headers has begun and goes on in the next frame."""
        self.ended = 0
        """How many frames have ended, a list of headers with all its frames counted once."""

    @property
    def midway(self) -> bool:
        """Whether a frame or a list of headers has begun and not ended."""
        return bool(self._left_bytes or self._header or self._in_headers)

    def cut(self, data: bytes) -> Iterator[memoryview]:
        """Yield what has come, cut after each frame. Raise FrameTooLargeError once the header of a frame says that it
        is too large; what came before it has been yielded then."""
        view, start, at = memoryview(data), 0, 0
        while at < len(view):
            if self._left_bytes:
                size = min(self._left_bytes, len(view) - at)
                self._left_bytes -= size
            else:
                size = min(_HEADER_BYTES - len(self._header), len(view) - at)
                self._header += view[at : at + size]
                self._begin()
            at += size
            if not self._left_bytes and not self._header:
                self.ended += not self._in_headers
                yield view[start:at]
                start = at
        if start < len(view):
            yield view[start:]

    def _begin(self) -> None:
        """Begin a frame if its header is complete."""
        if len(self._header) < _HEADER_BYTES:
            return
        size, kind, flags = int.from_bytes(self._header[:3], "big"), self._header[3], self._header[4]
        if size > LARGEST_FRAME_BYTES:
            raise FrameTooLargeError(f"a frame has {size} bytes, the limit is {LARGEST_FRAME_BYTES}")
        if kind in (_HEADERS, _CONTINUATION):
            self._in_headers = not flags & _END_HEADERS
        self._left_bytes = size
        self._header.clear()
