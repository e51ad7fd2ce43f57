"""What comes before a frame that is refused counts, wherever the bytes of a peer are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from h2.exceptions import FrameTooLargeError
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PingFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.kube.rpc.connection import Connection, Headers
from nodeagent.kube.rpc.frames import LARGEST_FRAME_BYTES, Frames
from tests.support.http2 import REFUSED, RawClient, framed, headers


class Sink(asyncio.Transport):
    """A transport that takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False

    def write(self, data: Any) -> None:
        assert not self.closing

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    close = abort

    def pause_reading(self) -> None:
        """Nothing is read here."""

    resume_reading = pause_reading


class Noting(Connection):
    """A server's end that notes what is reported to it."""

    def __init__(self) -> None:
        super().__init__(Path("/s"), client=False)
        self.noted: list[tuple[Any, ...]] = []
        self.sink = Sink()
        self.connection_made(self.sink)

    def on_greeted(self) -> None:
        self.noted.append(("greeted",))

    def on_headers(self, stream: int, headers: Headers) -> None:
        self.noted.append(("headers", stream, dict(headers)[b":path"]))

    def on_data(self, stream: int, data: bytes) -> None:
        self.noted.append(("data", stream, bytes(data)))

    def on_end(self, stream: int) -> None:
        self.noted.append(("end", stream))

    def on_reset(self, stream: int, code: int) -> None:
        self.noted.append(("reset", stream, code))


def calls(count: int) -> list[bytes]:
    """What an orderly client sends, frame by frame; the first also has the preface."""
    raw = RawClient(None, None)  # type: ignore[arg-type]
    found = [raw.http.data_to_send()]
    for stream in range(1, 2 * count, 2):
        raw.http.send_headers(stream, headers())
        found.append(raw.http.data_to_send())
        raw.http.send_data(stream, framed(b""), end_stream=True)
        found.append(raw.http.data_to_send())
    raw.http.reset_stream(1)
    return [*found, raw.http.data_to_send()]


async def noted_of(pieces: Iterable[bytes]) -> tuple[list[tuple[Any, ...]], list[str]]:
    """What is reported of these reads, and what is logged."""
    one = Noting()
    with capture_logs() as logs:
        for piece in pieces:
            if not one.sink.closing:
                one.data_received(piece)
    one.connection_lost(None)
    return one.noted, [line["event"] for line in logs]


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(one % (len(data) + 1) for one in at)})
    return [data[start:end] for start, end in pairwise(ends)]


@given(st.data())
@settings(deadline=None)
def test_what_comes_before_a_refused_frame_counts_however_it_is_read(data: st.DataObject) -> None:
    frames = calls(data.draw(st.integers(1, 3)))
    good = frames[: data.draw(st.integers(1, len(frames)))]
    bad = data.draw(st.sampled_from([*REFUSED.values()]))
    at = data.draw(st.lists(st.integers(0, 400), max_size=6))
    expected, quiet = asyncio.run(noted_of(good))
    assert expected[0] == ("greeted",) and not quiet
    assert asyncio.run(noted_of(cut(b"".join((*good, bad)), at))) == (expected, ["connection-dropped"])


@given(st.lists(st.integers(0, 40), min_size=1), st.booleans(), st.lists(st.integers(0, 999), max_size=9))
def test_bytes_are_cut_after_each_frame_and_none_is_lost(sizes: list[int], preface: bool, at: list[int]) -> None:
    sent = [DataFrame(1, data=bytes(size)).serialize() for size in sizes]
    if preface:
        sent.insert(0, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    frames, found, whole = Frames(preface=preface), b"", 0
    for piece in cut(b"".join(sent), at):
        for part in frames.cut(piece):
            found += part
            ends = len(b"".join(sent[: whole + 1]))
            assert len(found) <= ends, "no part reaches beyond a frame"
            whole += len(found) == ends
            assert (frames.ended, frames.midway) == (whole, len(found) != len(b"".join(sent[:whole])))
    assert (found, whole, frames.midway) == (b"".join(sent), len(sent), False)


def test_a_list_of_headers_ends_with_its_last_frame() -> None:
    frames = Frames(preface=False)
    for one, midway in (
        (HeadersFrame(1, data=b"a"), True),
        (ContinuationFrame(1, data=b"b"), True),
        (ContinuationFrame(1, data=b"c", flags=["END_HEADERS"]), False),
        (PingFrame(0, opaque_data=b"12345678"), False),
    ):
        assert [bytes(part) for part in frames.cut(one.serialize())] == [one.serialize()]
        assert frames.midway is midway
    assert frames.ended == 2


@pytest.mark.parametrize("more", [0, 1])
def test_a_frame_is_refused_for_its_size_before_it_comes(more: int) -> None:
    header = DataFrame(1, data=bytes(LARGEST_FRAME_BYTES + more)).serialize()[:9]
    ping = PingFrame(0, opaque_data=b"12345678").serialize()
    found = Frames(preface=False).cut(ping + header)
    assert bytes(next(found)) == ping
    if more:
        with pytest.raises(FrameTooLargeError, match=f"^a frame has {LARGEST_FRAME_BYTES + 1} bytes, the limit is"):
            next(found)
    else:
        assert bytes(next(found)) == header


async def test_a_peer_that_goes_on_has_the_whole_time_for_each_frame() -> None:
    """Reads seldom end where frames do."""
    one, (first, *_) = Noting(), calls(1)
    one.data_received(first)
    assert one._rest is None
    ping = PingFrame(0, opaque_data=b"12345678").serialize()
    one.data_received(ping[:5])
    before = one._rest
    one.data_received(ping[5:8])
    assert before is not None and one._rest is before
    one.data_received(ping[8:] + ping[:3])
    assert before.cancelled() and one._rest is not None and not one._rest.cancelled()
    one.pause_writing()  # this end does not read: nothing can come
    assert one._rest is None
    one.resume_writing()
    assert one._rest is not None
    one.data_received(ping[3:])
    assert one._rest is None
    one.connection_lost(None)
