"""Passes the cpusets of slices to systemd, so that systemd does not undo them.

systemd owns a slice's cpuset: it rewrites the file whenever it realizes the slice, that is, when the first container in
it starts and at `daemon-reload`, and resets what it does not know. Once it knows the CPUs, it writes the same values as
the agent. Only transient properties are set: nothing outlives a reboot or the slice.
Calls one method over D-Bus on systemd's private socket; each call blocks for at most CALL_S.
Sources: org.freedesktop.systemd1(5), the D-Bus specification (message protocol, SASL), systemd.resource-control(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, cause_of
from nodeagent.host.sysfs.sysfs import SysFs

SOCKET = "run/systemd/private"
CALL_S = 0.5
"""Cgroups wait for a call, and with them the runtime, which drops a plugin that is silent for 2 s. systemd may be
silent for longer, as during a reload; then the call is repeated later."""
_MANAGER, _PATH = "org.freedesktop.systemd1.Manager", "/org/freedesktop/systemd1"
_PEER = "org.freedesktop.DBus.Peer"
_CALL, _RETURN, _ERROR = 1, 2, 3
"""Message types."""
_AT_PATH, _INTERFACE, _MEMBER, _REPLY_TO, _SIGNATURE = 1, 2, 3, 5, 8
"""Header fields."""
_FIXED = struct.Struct("<cBBBIII")
_LARGEST_BYTES = 1 << 16


def is_slice(path: str) -> bool:
    """Return whether a cgroup is one of systemd's slices."""
    return path.endswith(".slice")


class Systemd:
    """One connection for a few calls in a row; `close` ends it."""

    def __init__(self, sysfs: SysFs) -> None:
        """Connect. Raise HostError if there is no systemd or it rejects the connection."""
        self._address = sysfs.path(SOCKET)
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(CALL_S)
        try:
            with self._said("reach"):
                self._socket.connect(self._address)
                self._introduce()
        except HostError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def allow(self, unit: str, cpus: CpuSet) -> str:
        """Have systemd set these CPUs for a slice, now and at each later write. Return why it refuses; empty if it
        agrees. Raise HostError if it does not answer; the connection is then unusable."""
        with self._said(f"confine {unit} through"):
            refusal = self._call(_MANAGER, "SetUnitProperties", b"sba(sv)", _properties(unit, cpus))
            # systemd writes after this answer and before the next one: after the Ping no write is outstanding.
            self._call(_PEER, "Ping")
        return refusal

    def _call(self, interface: str, member: str, signature: bytes = b"", body: bytes = b"") -> str:
        """Return the error message of a call; empty if it succeeded."""
        self._serial += 1
        self._socket.sendall(_message(self._serial, interface, member, signature, body))
        while (answer := self._answered()) is None:
            pass
        return answer

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, struct.error) as error:
            why = cause_of(error)
            raise HostError(f"cannot {what} {self._address}: {why}") from None

    def _introduce(self) -> None:
        """Authenticate with SASL; the kernel provides our identity. Send everything at once, as systemd's own library
        does: data after a BEGIN sent on its own is not read."""
        user = str(os.geteuid()).encode().hex().encode()
        self._socket.sendall(b"\0AUTH EXTERNAL " + user + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
        for wanted in (b"OK ", b"AGREE_UNIX_FD"):
            answer = b""
            while not answer.endswith(b"\r\n"):
                answer += self._read(1)
            if not answer.startswith(wanted):
                raise ValueError(f"it answers {answer[:80]!r}")

    def _answered(self) -> str | None:
        """Read one message. Return the error message of the call, empty if it succeeded, or
        None for an unrelated message."""
        _, kind, _, _, body_bytes, _, fields_bytes = _FIXED.unpack(self._read(_FIXED.size))
        if max(body_bytes, fields_bytes) > _LARGEST_BYTES:
            raise ValueError(f"it answers with {body_bytes} and {fields_bytes} bytes")
        fields = self._read(fields_bytes + -fields_bytes % 8)
        body = self._read(body_bytes)
        if kind not in (_RETURN, _ERROR) or _field(_REPLY_TO, "u", struct.pack("<I", self._serial)) not in fields:
            return None
        words = body[4:].partition(b"\0")[0].decode(errors="replace")
        return (words or "an error without words") if kind == _ERROR else ""

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = self._socket.recv(count - len(found))
            if not piece:
                raise ValueError("it hung up")
            found += piece
        return found


def _properties(unit: str, cpus: CpuSet) -> bytes:
    """Return the arguments of SetUnitProperties: unit, runtime (not persistent), and one
    property, a byte array of bits."""
    mask = cpus.mask
    bits = mask.to_bytes(max(1, (mask.bit_length() + 7) // 8), "little")
    head = _string(unit)
    head += bytes(-len(head) % 4) + struct.pack("<I", 1)
    property_ = _string("AllowedCPUs") + b"\x02ay\0"
    property_ += bytes(-len(property_) % 4) + struct.pack("<I", len(bits)) + bits
    length = struct.pack("<I", len(property_))
    return head + length + bytes(-(len(head) + 4) % 8) + property_


def _message(serial: int, interface: str, member: str, signature: bytes, body: bytes) -> bytes:
    some = [
        _field(_AT_PATH, "o", _string(_PATH)),
        _field(_INTERFACE, "s", _string(interface)),
        _field(_MEMBER, "s", _string(member)),
    ]
    if signature:
        some.append(_field(_SIGNATURE, "g", bytes((len(signature),)) + signature + b"\0"))
    fields = b""
    for one in some:
        fields += bytes(-len(fields) % 8) + one
    head = _FIXED.pack(b"l", _CALL, 0, 1, len(body), serial, len(fields))
    return head + fields + bytes(-len(fields) % 8) + body


def _field(code: int, form: str, value: bytes) -> bytes:
    return bytes((code, 1)) + form.encode() + b"\0" + value


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\0"
