"""One HTTP/2 connection on a socket, either end: h2's state machine with a transport, flow control and bounds.

Bounds on what a peer can make this end hold: messages by their readers' limits; header lists by h2 (64 KiB, 64
CONTINUATION frames); streams by MOST_STREAMS; answers by the transport's high-water mark, because a peer that does not
read is not read from; a connection without HTTP/2 on it by GREETING_S; a frame or list of headers that does not end by
REST_S.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import h2.events
import structlog
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import H2Error, StreamClosedError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from nodeagent.kube.rpc.frames import Frames

MOST_STREAMS = 1000
"""Calls in progress on one connection; a peer waits with more. Kubelet runs a few hundred pods at most."""
LONGEST_HEADERS_BYTES = 1 << 16
WINDOW_BYTES = 1 << 20
"""What a peer may send before it is acknowledged, per stream and in all."""
GREETING_S = 20.0
"""How long a peer may take to begin HTTP/2; as grpc's clients allow."""
REST_S = 20.0
"""How long a peer may take to end what it has begun to send: a frame, a list of headers, a request."""

_FIRST_WINDOW_BYTES = 65_535
"""Of a connection, which settings cannot change (RFC 9113, 6.9.2)."""
log = structlog.get_logger()
Headers = list[tuple[bytes, bytes]]


class _Http(H2Connection):
    MAX_CLOSED_STREAMS = 2 * MOST_STREAMS
    """How many streams that have ended are remembered; h2 would keep 65,536, 11 MiB of them."""


class Connection(asyncio.Protocol):
    """One connection. Subclasses override the methods that begin with `on_`."""

    def __init__(self, path: Path, *, client: bool) -> None:
        self._path = path
        self._http = _Http(
            H2Configuration(
                client_side=client,
                header_encoding=None,
                # Calls check the headers that they use. kubelet does not escape spaces at the ends of a status, for
                # which h2 would drop the connection, and all that HTTP/2 forbids would cost each call 50 µs to find.
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._http.local_settings = Settings(
            client=client,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: MOST_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: LONGEST_HEADERS_BYTES,
                SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
            },
        )
        self._frames = Frames(preface=not client)
        self._transport: asyncio.Transport | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._greeting: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._paused = False

    # ---------------------------------------------------------------- for subclasses

    def on_greeted(self) -> None:
        """The peer has sent its first settings."""

    def on_headers(self, stream: int, headers: Headers) -> None:
        """Headers came: a request, a response or trailers."""

    def on_data(self, stream: int, data: bytes) -> None:
        """A part of a message came; it is acknowledged already."""

    def on_end(self, stream: int) -> None:
        """The peer sends nothing more on the stream."""

    def on_reset(self, stream: int, code: int) -> None:
        """The peer has given the stream up."""

    def on_goaway(self, last: int) -> None:
        """The peer is leaving and has not seen streams above `last`. h2 takes nothing more from it."""

    def on_turn(self, *, is_read: bool) -> None:
        """The peer is read again, or no longer, as it does not read."""

    def on_lost(self) -> None:
        """The connection has ended."""

    # ---------------------------------------------------------------- sending

    def send_headers(self, stream: int, headers: Headers, *, end: bool = False) -> None:
        """Queue headers. Raise H2Error if the stream has ended."""
        self._http.send_headers(stream, headers, end_stream=end)

    async def send_data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Queue data, as fast as the peer takes it. Raise H2Error if the stream has ended."""
        sent = 0
        while sent < len(data):
            if self._transport is None:
                raise StreamClosedError(stream)
            size = 0 if self._paused else self._http.local_flow_control_window(stream)
            if size <= 0:
                self._room.clear()
                self.flush()
                await self._room.wait()
                continue
            size = min(size, self._http.max_outbound_frame_size, len(data) - sent)
            self._http.send_data(stream, data[sent : sent + size], end_stream=end and sent + size == len(data))
            sent += size
            if sent < len(data):
                self.flush()

    def reset(self, stream: int, code: ErrorCodes) -> None:
        """Queue that this end gives the stream up, unless it has ended."""
        try:
            self._http.reset_stream(stream, code)
        except H2Error:
            pass

    def flush(self) -> None:
        """Send what is queued, in one write."""
        data = self._http.data_to_send()
        if data and self._transport is not None and self._is_open:
            self._transport.write(data)

    def send_goaway(self) -> None:
        """Announce that no more streams are taken. h2's own way would end those in progress, too."""
        last = self._http.highest_inbound_stream_id
        self.flush()
        if self._transport is not None and self._is_open:
            self._transport.write(GoAwayFrame(0, last_stream_id=last, error_code=ErrorCodes.NO_ERROR).serialize())

    def close(self) -> None:
        """Send what is queued and end the connection once that is sent."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the peer; it has GREETING_S to do the same."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._greeting = asyncio.get_running_loop().call_later(GREETING_S, self.abort)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(WINDOW_BYTES - _FIRST_WINDOW_BYTES)
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Report what came, frame by frame, and send what HTTP/2 wants sent for it; drop a peer that breaks the
        protocol. What came before the frame that breaks it counts."""
        before = self._frames.ended
        try:
            for piece in self._frames.cut(data):
                if not self._is_open:
                    return
                for event in self._http.receive_data(piece):
                    self._dispatch(event)
        except Exception as error:
            # Of h2, hpack and hyperframe, which do not promise to raise nothing else for what a peer sends.
            self._drop_peer(str(error) or type(error).__name__)
            return
        self._wait_for_rest(progress=self._frames.ended != before)
        self.flush()

    def _wait_for_rest(self, *, progress: bool) -> None:
        """Give the peer REST_S to end what it has begun. progress: whether it has ended something since the last
        call."""
        if self._rest is not None and (progress or not self._frames.midway):
            self._rest.cancel()
            self._rest = None
        if self._rest is None and self._frames.midway and not self._paused:
            why = f"what it has begun to send has not ended within {REST_S:g} s"
            self._rest = asyncio.get_running_loop().call_later(REST_S, self._drop_peer, why)

    def _drop_peer(self, why: str) -> None:
        log.warning("connection-dropped", socket=str(self._path), error=why)
        self.flush()
        self.abort()

    def pause_writing(self) -> None:
        """Read no more from a peer that does not read."""
        self._paused = True
        if self._rest is not None:  # it is not read, whether or not it comes
            self._rest.cancel()
            self._rest = None
        if self._transport is not None:
            self._transport.pause_reading()
        self.on_turn(is_read=False)

    def resume_writing(self) -> None:
        """Go on: the peer reads again."""
        self._paused = False
        self._room.set()
        if self._transport is not None:
            self._transport.resume_reading()
            self._wait_for_rest(progress=False)
        self.on_turn(is_read=True)

    @property
    def is_read(self) -> bool:
        """Return whether this end reads what the peer sends."""
        return not self._paused

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake what waits to send, and report the end."""
        for timer in (self._greeting, self._rest):
            if timer is not None:
                timer.cancel()
        self._transport = None
        self._room.set()
        self.on_lost()

    @property
    def _is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def _dispatch(self, event: Any) -> None:
        match event:
            case h2.events.DataReceived():
                self._http.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
                self.on_data(event.stream_id, event.data or b"")
            case h2.events.RequestReceived() | h2.events.ResponseReceived() | h2.events.TrailersReceived():
                self.on_headers(event.stream_id, event.headers)
            case h2.events.StreamEnded():
                self.on_end(event.stream_id)
            case h2.events.WindowUpdated():
                self._room.set()
            case h2.events.StreamReset():
                self._room.set()
                self.on_reset(event.stream_id, event.error_code)
            case h2.events.RemoteSettingsChanged():
                self._room.set()
                if self._greeting is not None:
                    self._greeting.cancel()
                    self._greeting = None
                    self.on_greeted()
            case h2.events.ConnectionTerminated():
                self.on_goaway(event.last_stream_id or 0)
