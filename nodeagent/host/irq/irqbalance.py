"""What irqbalance leaves alone, as it says itself over its socket, which shows settings from its environment, its
command line and irqbalance-ui alike. Bans by its policy script are not shown.

It answers root only, one caller at a time, and waits for what a caller sends: so that is sent at once.
Source: sock_handle and init_socket in irqbalance.c; the socket is in this folder since irqbalance 1.6.
"""

from __future__ import annotations

import os
import re
import socket
import struct

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, InputError
from nodeagent.host.processes import running
from nodeagent.host.sysfs.sysfs import SysFs

NAME = "irqbalance"
ANSWER_S = 1.0
_LARGEST_BYTES = 1 << 20
_ANSWER = re.compile(
    r"SLEEP [0-9]+ (?P<irqs>(?:IRQ [0-9]+ LOAD [0-9]+ DIFF [0-9]+ CLASS -?[0-9]+ )*)BANNED (?P<cpus>\S+)"
)
_IRQ = re.compile(r"IRQ ([0-9]+) ")


class Bans(msgspec.Struct, frozen=True, kw_only=True):
    """What irqbalance leaves alone."""

    cpus: CpuSet
    """CPUs to which it sends no interrupt."""
    irqs: frozenset[int]
    """Interrupts whose affinity it does not change."""


def bans(sysfs: SysFs) -> Bans | None:
    """Return what irqbalance leaves alone, or None if it does not run. Raise HostError if it does not say."""
    for one in running(sysfs, lambda name: name == NAME):
        return _parsed(_asked(sysfs.path(f"run/irqbalance/{NAME}{one.pid}.sock")))
    return None


def _asked(path: str) -> str:
    """Return the answer to "setup". Raise HostError."""
    credentials = struct.pack("3i", os.getpid(), os.geteuid(), os.getegid())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(ANSWER_S)
            peer.connect(path)
            peer.sendmsg([b"setup"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
            answer = b""
            while len(answer) < _LARGEST_BYTES and (piece := peer.recv(1 << 16)):
                answer += piece
    except OSError as error:
        raise HostError(f"cannot ask irqbalance at {path}: {error.strerror or error}") from None
    return answer.decode("ascii", "backslashreplace").rstrip("\0")


def _parsed(answer: str) -> Bans:
    found = _ANSWER.fullmatch(answer)
    if found is None:
        raise HostError(f"cannot read what irqbalance leaves alone: its answer is {answer[:80]!r}")
    try:
        cpus = CpuSet.parse_mask(found["cpus"], source="irqbalance's answer")
    except InputError as error:
        raise HostError(str(error)) from None
    return Bans(cpus=cpus, irqs=frozenset(int(one) for one in _IRQ.findall(found["irqs"])))
