"""Framing and calls against a peer that cuts, mangles, floods, hangs up and breaks every rule."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.errors import InputError, PeerError, Refused
from nodeagent.nri import frames
from nodeagent.nri.frames import LARGEST_DATA_BYTES, FrameError, FrameParser, Message, Oversized, Stray
from nodeagent.nri.ttrpc import MOST_SERVED, Code, RpcError, ServedCall, Services, TtrpcConnection
from nodeagent.pb import ttrpc_pb2 as pb
from tests.doubles.runtime import DATA, PLUGIN, REQUEST, RESPONSE, RUNTIME, Packet, Wire, packed

# Frames


class Decoded(NamedTuple):
    """What a whole stream says, worked out at once."""

    found: list[frames.Received]
    fault: int | None
    """Offset of the frame that is too long."""


def oracle(stream: bytes) -> Decoded:
    found: list[frames.Received] = []
    logical = {PLUGIN: b"", RUNTIME: b""}
    at = 0
    while len(stream) - at >= 8:
        connection, length = struct.unpack_from(">II", stream, at)
        if length > LARGEST_DATA_BYTES + 10:
            return Decoded(found, at)
        payload, at = stream[at + 8 : at + 8 + length], at + 8 + length
        if connection not in logical:
            found.append(Stray(connection, length))
            continue
        rest = logical[connection] + payload
        while len(rest) >= 10:
            size, number, kind, flags = struct.unpack_from(">IIBB", rest)
            if size > LARGEST_DATA_BYTES:
                found.append(Oversized(connection, number, kind, size))
                # What is passed over is as if it were there: it is counted off by a prefix that cannot be complete.
                skipped = rest[10 : 10 + size]
                if len(skipped) < size:
                    return Decoded([*found, Stray(-1, size - len(skipped))], None)
                rest = rest[10 + size :]
            elif len(rest) >= 10 + size:
                found.append(Message(connection, number, kind, flags, rest[10 : 10 + size]))
                rest = rest[10 + size :]
            else:
                break
        logical[connection] = rest
    return Decoded(found, None)


def parsed(pieces: list[bytes]) -> tuple[list[frames.Received], int | None, FrameParser]:
    parser, found = FrameParser((PLUGIN, RUNTIME)), list[frames.Received]()
    try:
        for piece in pieces:
            for one in parser.feed(piece):
                found.append(one)
            assert parser.held_bytes <= min(8 + 2 * (10 + LARGEST_DATA_BYTES), sum(len(one) for one in pieces))
    except FrameError as error:
        return found, error.offset, parser
    return found, None, parser


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(stream) + 1) for place in places} | {len(stream)})
    return [stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


NUMBERS = st.one_of(st.integers(0, 9), st.integers(0, 0xFFFFFFFF))
MESSAGES = st.builds(
    Message,
    st.sampled_from((PLUGIN, RUNTIME)),
    NUMBERS,
    st.sampled_from((REQUEST, RESPONSE, DATA, 0, 4, 255)),
    st.integers(0, 255),
    st.binary(max_size=40),
)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=6)
GARBAGE = st.one_of(
    st.binary(max_size=120), st.lists(NUMBERS, max_size=12).map(lambda n: struct.pack(f">{len(n)}I", *n))
)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from("=+-"), st.integers(0, 255)), max_size=4)


def edited(stream: bytes, edits: list[tuple[int, str, int]]) -> bytes:
    """Bytes replaced, put in and taken out."""
    changed = bytearray(stream)
    for place, how, byte in edits:
        at = place % (len(changed) + 1)
        changed[at : at + (how != "+")] = b"" if how == "-" else bytes((byte,))
    return bytes(changed)


@settings(max_examples=10_000)
@given(st.lists(MESSAGES, max_size=5), EDITS, GARBAGE, CUTS)
def test_any_stream_gives_its_good_messages_then_at_most_one_kind_of_error(
    messages: list[Message], edits: list[tuple[int, str, int]], garbage: bytes, cuts: list[int]
) -> None:
    """10,000 streams, good, mangled or random, cut anywhere: what is found is what reading all at once finds."""
    stream = edited(b"".join(frames.encode(one) for one in messages), edits) + garbage
    expected = oracle(stream)
    found, fault, parser = parsed(cut(stream, cuts))
    if expected.found and expected.found[-1][0] == -1:
        # The rest is passed over, but for frames of the other connection, which the oracle does not follow.
        assert found[: len(expected.found) - 1] == expected.found[:-1]
    else:
        assert (found, fault) == expected
    with contextlib.suppress(FrameError):
        parser.end()


@given(st.lists(MESSAGES, min_size=1, max_size=6), st.lists(st.integers(1, 30), min_size=1, max_size=20), CUTS)
def test_messages_may_be_spread_over_frames_and_mixed_with_others(
    messages: list[Message], sizes: list[int], cuts: list[int]
) -> None:
    """Each logical connection is a stream of its own; the other one's frames may come in between."""
    streams = {
        one: b"".join(packed(m[0], m[1], m[2], m[4], m[3])[8:] for m in messages if m[0] == one) for one in (1, 2)
    }
    stream, turn = b"", 0
    while any(streams.values()):
        for one in (1, 2):
            size = sizes[turn % len(sizes)]
            turn += 1
            piece, streams[one] = streams[one][:size], streams[one][size:]
            stream += struct.pack(">II", one, len(piece)) + piece
    found, fault, parser = parsed(cut(stream, cuts))
    parser.end()
    assert fault is None
    assert [m for m in found if m[0] == 1] == [m for m in messages if m[0] == 1]
    assert [m for m in found if m[0] == 2] == [m for m in messages if m[0] == 2]


def test_a_frame_that_is_too_long_ends_the_stream_with_its_place_and_size() -> None:
    """What came before is given out, and the error stays."""
    good = packed(PLUGIN, 1, REQUEST, b"abc")
    parser = FrameParser((PLUGIN,))
    with pytest.raises(FrameError, match=f"byte {len(good)}: a frame of 4194315 bytes for connection 1, the limit"):
        for one in parser.feed(good + struct.pack(">II", 1, LARGEST_DATA_BYTES + 11)):
            assert one == Message(PLUGIN, 1, REQUEST, 0, b"abc")
    with pytest.raises(FrameError, match=f"byte {len(good)}"):
        list(parser.feed(good))
    with pytest.raises(FrameError, match=f"byte {len(good)}"):
        parser.end()


@pytest.mark.parametrize("cut_at", [3, 8, 12, 18, 20])
def test_an_end_within_a_message_is_an_error(cut_at: int) -> None:
    parser = FrameParser((PLUGIN,))
    assert list(parser.feed(packed(PLUGIN, 1, REQUEST, b"abc")[:cut_at])) == []
    with pytest.raises(FrameError, match=f"byte {cut_at}: it ends within a message"):
        parser.end()


def test_a_message_that_is_too_large_is_passed_over_without_being_kept() -> None:
    """Its announcement is given out at once, and what follows it is read."""
    parser, size = FrameParser((PLUGIN,)), 3 * LARGEST_DATA_BYTES
    header = struct.pack(">IIBB", size, 7, REQUEST, 0)
    assert list(parser.feed(struct.pack(">II", PLUGIN, 10) + header)) == [Oversized(PLUGIN, 7, REQUEST, size)]
    for _ in range(3):
        assert list(parser.feed(struct.pack(">II", PLUGIN, LARGEST_DATA_BYTES) + bytes(LARGEST_DATA_BYTES))) == []
        assert parser.held_bytes == 0
    assert list(parser.feed(packed(PLUGIN, 9, REQUEST))) == [Message(PLUGIN, 9, REQUEST)]


@pytest.mark.parametrize("size", [0, 1, 4085, 4086, 4087, 8182, 8183, LARGEST_DATA_BYTES])
async def test_what_is_encoded_fits_into_the_runtime_s_buffers(size: int) -> None:
    """The first frame into 4,096 bytes, the second into the message's own; also right after another message."""
    here, there = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=here)
    wire = Wire(*await asyncio.open_connection(sock=there))
    for stream in (1, 3):
        writer.write(frames.encode(Message(RUNTIME, stream, REQUEST, 0, bytes(size))))
    for stream in (1, 3):
        assert await wire.receive(RUNTIME) == (stream, REQUEST, 0, bytes(size))
    assert wire.broken is None
    writer.transport.abort()
    await wire.close()


async def test_one_frame_for_a_large_message_would_not_fit() -> None:
    """The reader of these tests is as strict as it says."""
    here, there = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=here)
    wire = Wire(*await asyncio.open_connection(sock=there))
    writer.write(packed(RUNTIME, 1, REQUEST, bytes(4087)))
    with pytest.raises(EOFError):
        await wire.receive(RUNTIME)
    assert str(wire.broken) == "cannot allocate memory: 4097 bytes, room for 4096"
    writer.transport.abort()
    await wire.close()


def test_a_message_over_the_limit_is_not_encoded() -> None:
    with pytest.raises(InputError, match="stream 5: 4194305 bytes, the limit is 4194304"):
        frames.encode(Message(1, 5, REQUEST, 0, bytes(LARGEST_DATA_BYTES + 1)))


# Calls


@contextlib.asynccontextmanager
async def peer(services: Services, **more: Any) -> AsyncIterator[tuple[Wire, TtrpcConnection]]:
    """A connection that serves and calls, and the other end of its stream."""
    here, there = socket.socketpair()
    stream = await asyncio.open_connection(sock=here)
    connection = TtrpcConnection(stream, services, serves=PLUGIN, calls=RUNTIME, **more)
    running = asyncio.create_task(connection.run())
    wire = Wire(*await asyncio.open_connection(sock=there))
    try:
        yield wire, connection
    finally:
        await wire.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def echo(payload: bytes, _: float | None) -> bytes:
    return payload


async def never(_: bytes, __: float | None) -> bytes:
    await asyncio.Event().wait()
    return b""


def ask(
    wire: Wire, stream: int, method: str = "echo", payload: bytes = b"", *, service: str = "s", nano: int = 0
) -> None:
    request = pb.Request(service=service, method=method, payload=payload, timeout_nano=nano)
    wire.send(PLUGIN, stream, REQUEST, request.SerializeToString())


def answer(packet: Packet) -> tuple[int, int, str, bytes]:
    assert (packet.type, packet.flags) == (RESPONSE, 0)
    response = pb.Response.FromString(packet.data)
    return packet.stream, response.status.code, response.status.message, response.payload


async def answered(wire: Wire) -> tuple[int, int, str, bytes]:
    return answer(await wire.receive(PLUGIN))


async def still_serves(wire: Wire, stream: int = 9999) -> None:
    ask(wire, stream, payload=b"still here")
    assert await answered(wire) == (stream, 0, "", b"still here")


async def test_a_call_is_served_and_a_call_is_made_on_one_stream() -> None:
    async with peer({"s": {"echo": echo}}) as (wire, connection):
        ask(wire, 1, payload=b"ping")
        call = asyncio.create_task(connection.call("there", "do", b"what", timeout_s=1.5))
        assert await answered(wire) == (1, 0, "", b"ping")
        packet = await wire.receive(RUNTIME)
        request = pb.Request.FromString(packet.data)
        assert (packet.stream, packet.type, packet.flags) == (1, REQUEST, 0)
        assert (request.service, request.method, request.payload) == ("there", "do", b"what")
        assert request.timeout_nano == 1_500_000_000
        wire.send(RUNTIME, 1, RESPONSE, pb.Response(payload=b"done").SerializeToString())
        assert await call == b"done"


async def test_answers_go_out_as_they_are_ready() -> None:
    """A call that takes long holds up no other."""
    gate = asyncio.Event()

    async def slow(payload: bytes, _: float | None) -> bytes:
        await gate.wait()
        return payload

    async with peer({"s": {"slow": slow, "echo": echo}}) as (wire, _):
        ask(wire, 1, "slow", b"first")
        for stream in range(3, 23, 2):
            ask(wire, stream, payload=b"%d" % stream)
        assert [(await answered(wire))[0] for _ in range(10)] == list(range(3, 23, 2))
        gate.set()
        assert await answered(wire) == (1, 0, "", b"first")


async def test_answers_may_come_in_any_order() -> None:
    async with peer({}) as (wire, connection):
        calls = [asyncio.create_task(connection.call("s", str(n), b"", timeout_s=20)) for n in range(5)]
        packets = [await wire.receive(RUNTIME) for _ in calls]
        for packet in reversed(packets):
            name = pb.Request.FromString(packet.data).method
            wire.send(RUNTIME, packet.stream, RESPONSE, pb.Response(payload=name.encode()).SerializeToString())
        assert await asyncio.gather(*calls) == [b"0", b"1", b"2", b"3", b"4"]
        assert [packet.stream for packet in packets] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("service", "method", "text"),
    [("other", "echo", "there is no service other"), ("s", "other", "there is no method s/other")],
)
async def test_what_is_not_served_is_unimplemented(service: str, method: str, text: str) -> None:
    async with peer({"s": {"echo": echo}}) as (wire, _):
        ask(wire, 1, method, service=service)
        assert await answered(wire) == (1, Code.UNIMPLEMENTED, f"cannot serve call: {text}", b"")
        await still_serves(wire)


def raising(error: Exception) -> Callable[[bytes, float | None], Awaitable[bytes]]:
    async def method(_: bytes, __: float | None) -> bytes:
        raise error

    return method


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RpcError(7, "not for you"), 7, "not for you"),
        (
            Refused("no CPU is free", want=2, free=0, unit="CPUs", would_admit="ask for 0"),
            2,
            "no CPU is free; ask for 0",
        ),
        (KeyError("x"), 2, "KeyError: 'x'"),
        (TimeoutError("of its own"), 2, "TimeoutError: of its own"),
    ],
    ids=["status", "refused", "unforeseen", "time-out"],
)
async def test_an_error_is_the_answer_to_its_own_call(error: Exception, code: int, text: str) -> None:
    async with peer({"s": {"bad": raising(error), "echo": echo}}) as (wire, _):
        ask(wire, 1, "bad", nano=10**12)
        assert await answered(wire) == (1, code, text, b"")
        await still_serves(wire)


async def test_the_caller_s_deadline_ends_a_call() -> None:
    async with peer({"s": {"never": never, "echo": echo}}) as (wire, _):
        ask(wire, 1, "never", nano=20_000_000)
        stream, code, text, _ = await answered(wire)
        assert (stream, code, text) == (1, Code.DEADLINE_EXCEEDED, "cannot serve s/never: not done within 0.02 s")
        await still_serves(wire)


async def test_the_own_deadline_ends_a_call_and_a_late_answer_harms_nobody() -> None:
    async with peer({"s": {"echo": echo}}) as (wire, connection):
        with pytest.raises(RpcError, match=r"cannot call s/m: DEADLINE_EXCEEDED: no answer within 0\.02 s"):
            await connection.call("s", "m", b"", timeout_s=0.02)
        wire.send(RUNTIME, (await wire.receive(RUNTIME)).stream, RESPONSE)
        await still_serves(wire)


async def test_a_cancelled_call_leaves_the_others_alone() -> None:
    async with peer({}) as (wire, connection):
        gone = asyncio.create_task(connection.call("s", "a", b"", timeout_s=20))
        stays = asyncio.create_task(connection.call("s", "b", b"", timeout_s=20))
        streams = [(await wire.receive(RUNTIME)).stream for _ in range(2)]
        gone.cancel()
        for stream in streams:
            wire.send(RUNTIME, stream, RESPONSE, pb.Response(payload=b"x").SerializeToString())
        assert await stays == b"x"
        assert gone.cancelled()


@pytest.mark.parametrize("stream", [0, 2, 5, 3])
async def test_a_stream_that_may_not_be_opened_is_refused(stream: int) -> None:
    """Even, or not larger than the last one."""
    async with peer({"s": {"echo": echo}}) as (wire, _):
        ask(wire, 5)
        await answered(wire)
        ask(wire, stream)
        number, code, text, _ = await answered(wire)
        assert (number, code) == (stream, Code.INVALID_ARGUMENT)
        assert f"stream {stream} is not odd and larger than 5" in text
        await still_serves(wire)


async def test_messages_of_wrong_types_are_refused_or_passed_over() -> None:
    async with peer({"s": {"echo": echo}}) as (wire, _):
        wire.send(PLUGIN, 1, DATA, b"stray")
        assert (await answered(wire))[:2] == (1, Code.INVALID_ARGUMENT)
        wire.send(PLUGIN, 3, RESPONSE)
        wire.send(PLUGIN, 3, 77)
        wire.send(RUNTIME, 99, RESPONSE)
        wire.send(RUNTIME, 99, REQUEST)
        wire.writer.write(struct.pack(">II", 7, 3) + b"abc")
        await still_serves(wire)


async def test_a_request_that_is_no_request_is_refused() -> None:
    async with peer({"s": {"echo": echo}}) as (wire, _):
        wire.send(PLUGIN, 1, REQUEST, b"\xff\xff\xff")
        stream, code, text, _ = await answered(wire)
        assert (stream, code) == (1, Code.INVALID_ARGUMENT)
        assert text.startswith("cannot read request on stream 1: ")
        await still_serves(wire)


async def test_too_much_data_fails_its_own_call_only() -> None:
    """Of a request, of an answer, of a call, of a call's answer."""

    async def large(_: bytes, __: float | None) -> bytes:
        return bytes(LARGEST_DATA_BYTES)

    async with peer({"s": {"large": large, "echo": echo}}) as (wire, connection):
        size = LARGEST_DATA_BYTES + 1
        oversized = struct.pack(">IIBB", size, 1, REQUEST, 0) + bytes(size)
        for piece in (oversized[:4096], oversized[4096:]):
            wire.writer.write(struct.pack(">II", PLUGIN, len(piece)) + piece)
        assert (await answered(wire))[:2] == (1, Code.RESOURCE_EXHAUSTED)
        ask(wire, 3, "large")
        assert (await answered(wire))[:2] == (3, Code.RESOURCE_EXHAUSTED)
        with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED: 4194312 bytes in one message, the limit is 4194304"):
            await connection.call("s", "m", bytes(LARGEST_DATA_BYTES - 9), timeout_s=20)
        call = asyncio.create_task(connection.call("s", "m", b"", timeout_s=20))
        stream = (await wire.receive(RUNTIME)).stream
        wire.writer.write(struct.pack(">IIIIBB", RUNTIME, 10, size, stream, RESPONSE, 0))
        with pytest.raises(RpcError, match="RESOURCE_EXHAUSTED: 4194305 bytes"):
            await call
        await still_serves(wire)


@pytest.mark.parametrize(
    ("kind", "data", "why"),
    [(DATA, b"", "INTERNAL: a message of type 3"), (RESPONSE, b"\xff\xff\xff", "INTERNAL: "), (
        RESPONSE, pb.Response(status=pb.Status(code=5, message="no such thing")).SerializeToString(),
        "status 5: no such thing",
    )],
)  # fmt: skip
async def test_an_answer_that_is_none_or_an_error_is_raised(kind: int, data: bytes, why: str) -> None:
    async with peer({}) as (wire, connection):
        call = asyncio.create_task(connection.call("s", "m", b"", timeout_s=20))
        wire.send(RUNTIME, (await wire.receive(RUNTIME)).stream, kind, data)
        with pytest.raises(RpcError, match=f"cannot call s/m: {why}"):
            await call


async def test_a_peer_that_closes_ends_every_call() -> None:
    """Those that wait for it, and those that it waits for."""
    ended = asyncio.Event()

    async def hangs(_: bytes, __: float | None) -> bytes:
        try:
            return await never(b"", None)
        finally:
            ended.set()

    async with peer({"s": {"hangs": hangs}}) as (wire, connection):
        ask(wire, 1, "hangs")
        call = asyncio.create_task(connection.call("s", "m", b"", timeout_s=20))
        await wire.receive(RUNTIME)
        await wire.close()
        with pytest.raises(RpcError, match="UNAVAILABLE: the connection ended"):
            await call
        await asyncio.wait_for(ended.wait(), 20)
        with pytest.raises(RpcError, match="UNAVAILABLE: the connection has ended"):
            await connection.call("s", "m", b"", timeout_s=20)


async def test_how_long_a_call_took_is_reported_also_of_one_that_the_peer_hung_up_on() -> None:
    """From the arrival of its request; what the peer says of its patience comes with it."""
    now_s, calls, hung_up = 100.0, list[ServedCall](), asyncio.Event()

    async def slow(_: bytes, __: float | None) -> bytes:
        nonlocal now_s
        now_s += 3.0
        return b""

    def reported(one: ServedCall) -> None:
        calls.append(one)
        if not one.answered:
            hung_up.set()

    services = {"s": {"slow": slow, "never": never, "echo": echo}}
    async with peer(services, on_served=reported, clock=lambda: now_s) as (wire, _):
        ask(wire, 1, "slow", nano=2_000_000_000)
        await answered(wire)
        ask(wire, 3, "never")
        await still_serves(wire, 5)
        now_s += 7.0
        await wire.close()
        await asyncio.wait_for(hung_up.wait(), 20)
    assert calls == [
        ServedCall("s", "slow", 3.0, 2.0, True),
        ServedCall("s", "echo", 0.0, None, True),
        ServedCall("s", "never", 7.0, None, False),
    ]


@pytest.mark.parametrize("cut_at", [5, 12, 25])
async def test_a_peer_that_closes_in_the_middle_of_an_answer_is_an_error(cut_at: int) -> None:
    here, there = socket.socketpair()
    connection = TtrpcConnection(await asyncio.open_connection(sock=here), {}, serves=PLUGIN, calls=RUNTIME)
    running = asyncio.create_task(connection.run())
    call = asyncio.create_task(connection.call("s", "m", b"", timeout_s=20))
    reader, writer = await asyncio.open_connection(sock=there)
    await reader.readexactly(8)
    writer.write(packed(RUNTIME, 1, RESPONSE, pb.Response(payload=b"half an answer").SerializeToString())[:cut_at])
    writer.close()
    with pytest.raises(PeerError, match=f"cannot read stream at byte {cut_at}: it ends within a message"):
        await running
    with pytest.raises(RpcError, match="UNAVAILABLE"):
        await call


async def test_more_calls_at_once_than_are_served_are_refused() -> None:
    async with peer({"s": {"never": never, "echo": echo}}) as (wire, _):
        for number in range(MOST_SERVED + 3):
            ask(wire, 2 * number + 1, "never")
        refused = [await answered(wire) for _ in range(3)]
        assert [one[0] for one in refused] == [2 * (MOST_SERVED + n) + 1 for n in range(3)]
        assert {one[1] for one in refused} == {Code.RESOURCE_EXHAUSTED}


async def test_a_peer_that_asks_without_reading_is_not_read_any_further() -> None:
    """What waits to be sent is bounded; all of it comes once the peer reads."""
    here, there = socket.socketpair()
    stream = await asyncio.open_connection(sock=here)
    served = 0

    async def large(_: bytes, __: float | None) -> bytes:
        nonlocal served
        served += 1
        return bytes(1 << 20)

    connection = TtrpcConnection(stream, {"s": {"large": large}}, serves=PLUGIN, calls=RUNTIME)
    running = asyncio.create_task(connection.run())
    reader, writer = await asyncio.open_connection(sock=there)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    request = pb.Request(service="s", method="large").SerializeToString()
    calls = 20 * MOST_SERVED
    writer.write(b"".join(packed(PLUGIN, 2 * n + 1, REQUEST, request) for n in range(calls)))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(running), 0.3)
    assert served <= 2 * MOST_SERVED
    assert len(connection._serving) <= 2 * MOST_SERVED
    writer.transport.abort()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
