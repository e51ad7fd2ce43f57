"""What gRPC puts into HTTP/2: methods' paths, the frame around a message, deadlines and the text of a status.

Source: doc/PROTOCOL-HTTP2.md of github.com/grpc/grpc.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from nodeagent.kube.rpc.status import AbortedError, Code, RpcError

CONTENT_TYPE = b"application/grpc"
PREFIX_BYTES = 5
"""Before each message: whether it is compressed (1 byte), and its length (4 bytes, big endian)."""
LONGEST_STATUS_BYTES = 7 << 10
"""Of the text of a status as its header holds it. A list of headers has some 200 bytes more, and peers may refuse one
of more than 8 KiB: grpc's C core does, by default, at random above that and always above 16 KiB
(GRPC_ARG_MAX_METADATA_SIZE)."""

_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_PLAIN = bytes(one for one in range(0x20, 0x7F) if one != ord("%")).decode()
_MOST_MS = 99_999_999
_CUT = "…"
"""At the end of a text of which the rest is not sent."""


class Method(NamedTuple):
    """One call of a service."""

    path: bytes
    name: str
    request: type[Message]
    answer: type[Message]
    streams: bool
    """Whether it has any number of answers."""


def methods_of(file: FileDescriptor, service: str) -> Iterator[Method]:
    """Return the calls of a service as the generated code describes it."""
    described: MethodDescriptor
    for described in file.services_by_name[service].methods:
        yield Method(
            path=f"/{described.containing_service.full_name}/{described.name}".encode(),
            name=described.name,
            request=GetMessageClass(described.input_type),
            answer=GetMessageClass(described.output_type),
            streams=described.server_streaming,
        )


def method_of(file: FileDescriptor, service: str, name: str) -> Method:
    """Return one call of a service."""
    return next(one for one in methods_of(file, service) if one.name == name)


def framed(message: Any) -> bytes:
    """Return a message as it is sent."""
    body: bytes = message.SerializeToString()
    return b"\0" + len(body).to_bytes(4, "big") + body


class Inbox:
    """Collects the one message that a peer sends, up to a limit."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        """Add what came. Raise AbortedError (RESOURCE_EXHAUSTED) if the message is too long, before it is complete."""
        self._data += data
        stated = int.from_bytes(self._data[1:PREFIX_BYTES], "big") if len(self._data) >= PREFIX_BYTES else 0
        found = max(stated, len(self._data) - PREFIX_BYTES)
        if found > self._most_bytes:
            text = f"message has {found} bytes, the limit is {self._most_bytes}"
            raise AbortedError(Code.RESOURCE_EXHAUSTED, text)

    def message(self) -> bytes:
        """Return the message once everything came, and forget it. Raise AbortedError if it is not exactly one."""
        data, self._data = self._data, bytearray()
        if data[:1] == b"\1":
            raise AbortedError(Code.UNIMPLEMENTED, "compressed messages are not supported")
        if len(data) < PREFIX_BYTES or int.from_bytes(data[1:PREFIX_BYTES], "big") != len(data) - PREFIX_BYTES:
            raise AbortedError(Code.INTERNAL, f"{len(data)} bytes are not exactly one message")
        return bytes(memoryview(data)[PREFIX_BYTES:])


def timeout_s(text: bytes) -> float:
    """Return the seconds that a grpc-timeout header states. Raise AbortedError if it is malformed."""
    found = _TIMEOUT.fullmatch(text)
    if found is None:
        raise AbortedError(Code.INTERNAL, "malformed grpc-timeout header")
    return int(found[1]) * _UNITS_S[found[2]]


def timeout_text(seconds: float) -> bytes:
    """Return a grpc-timeout header, rounded up to milliseconds."""
    return b"%dm" % min(_MOST_MS, max(1, -int(-seconds * 1000 // 1)))


def status_text(details: str) -> bytes:
    """Return the text of a status as its header holds it, cut if that were longer than LONGEST_STATUS_BYTES."""
    text = _escaped(details)
    if len(text) > LONGEST_STATUS_BYTES:
        lengths = range(LONGEST_STATUS_BYTES)
        too_long = bisect.bisect(lengths, LONGEST_STATUS_BYTES, key=lambda size: len(_escaped(details[:size] + _CUT)))
        text = _escaped(details[: too_long - 1] + _CUT)
    return text.encode()


def _escaped(details: str) -> str:
    """Return printable ASCII. Spaces at the ends, which headers do not keep, are escaped too."""
    text = quote_from_bytes(details.encode(errors="backslashreplace"), safe=_PLAIN)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" ")) if inner else len(text)
    return "%20" * before + inner + "%20" * (len(text) - before - len(inner))


def status_of(headers: dict[bytes, bytes]) -> tuple[Code, str]:
    """Return the status in the headers that end a call."""
    try:
        code = Code(int(headers[b"grpc-status"]))
    except (KeyError, ValueError):
        return Code.UNKNOWN, f"the answer has no valid status: {headers.get(b'grpc-status')!r}"
    return code, unquote_to_bytes(headers.get(b"grpc-message", b"")).decode(errors="replace")


def checked_response(headers: dict[bytes, bytes]) -> None:
    """Raise RpcError if the headers of a response are not gRPC's."""
    status, kind = headers.get(b":status", b""), headers.get(b"content-type", b"")
    if status != b"200" or not kind.startswith(CONTENT_TYPE):
        raise RpcError(Code.UNKNOWN, f"the answer is not gRPC: HTTP status {status!r}, content type {kind!r}")
