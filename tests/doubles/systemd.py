"""systemd's private socket, as far as slices are told through it: SASL and D-Bus messages on a real socket."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_FIXED = struct.Struct("<cBBBIII")


class FakeSystemd:
    """An async context manager. `told` has each slice's CPUs as (unit, CPUs), in order; `messages` the raw bytes."""

    def __init__(self, path: Path) -> None:
        self.told: list[tuple[str, set[int]]] = []
        self.messages: list[bytes] = []
        self.refusal = ""
        """What every SetUnitProperties is answered; "": it is done."""
        self.greeting = b"OK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n"
        self.silent = False
        self.news = asyncio.Event()
        self._path = path

    async def __aenter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.close()

    async def until_told(self, unit: str, cpus: set[int]) -> None:
        while (unit, cpus) not in self.told:
            self.news.clear()
            await self.news.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            assert (await reader.readline()).startswith(b"\0AUTH EXTERNAL ")
            assert await reader.readline() == b"NEGOTIATE_UNIX_FD\r\n"
            assert await reader.readline() == b"BEGIN\r\n"
            writer.write(self.greeting)
            while not self.silent:
                head = await reader.readexactly(_FIXED.size)
                _, _, _, _, body_bytes, serial, fields_bytes = _FIXED.unpack(head)
                fields = await reader.readexactly(fields_bytes + -fields_bytes % 8)
                body = await reader.readexactly(body_bytes)
                self.messages.append(head + fields + body)
                writer.write(_signal() + self._answer(serial, fields, body))
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, serial: int, fields: bytes, body: bytes) -> bytes:
        if b"SetUnitProperties\0" not in fields:
            return _message(2, serial)
        self.news.set()
        if self.refusal:
            return _message(3, serial, struct.pack("<I", len(self.refusal)) + self.refusal.encode() + b"\0")
        self.told.append(_read(body))
        return _message(2, serial)


def _read(body: bytes) -> tuple[str, set[int]]:
    """Unit and CPUs of a call; the array of bytes is the last in it."""
    (length,) = struct.unpack_from("<I", body)
    after = body.index(b"\x02ay\0", body.index(b"AllowedCPUs\0")) + 4
    start = after + -after % 4
    (count,) = struct.unpack_from("<I", body, start)
    bits = int.from_bytes(body[start + 4 : start + 4 + count], "little")
    assert start + 4 + count == len(body)
    return body[4 : 4 + length].decode(), {bit for bit in range(bits.bit_length()) if bits >> bit & 1}


def _message(kind: int, replies_to: int, body: bytes = b"") -> bytes:
    fields = b"\x05\x01u\0" + struct.pack("<I", replies_to)
    return _FIXED.pack(b"l", kind, 1, 1, len(body), 7, len(fields)) + fields + body


def _signal() -> bytes:
    """What systemd says of other units to everybody who is connected: no answer to anything."""
    return _FIXED.pack(b"l", 4, 1, 1, 0, 8, 0)
