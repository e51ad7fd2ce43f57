"""What only the running machine can answer: its disks, its clock, its programs, its API server.

Every call has a deadline and changes nothing; the time of an fsync is measured on a file without a name.
"""

from __future__ import annotations

import ctypes
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nodeagent.errors import HostError, cause_of

PROGRAM_S = 10.0
CONNECT_S = 1.0
SYNCS = 7
_UNSYNCHRONISED, _TIMEX_BYTES, _STATUS = 0x40, 208, 40
"""STA_UNSYNC, the size of struct timex, and where its status is (adjtimex(2), 64-bit)."""
_PIECE = bytes(4096)


class DiskSpace(NamedTuple):
    """A file system with a folder in it."""

    path: str
    """The folder, or the nearest one above it that exists."""
    kind: str
    free_bytes: int
    free_files: int
    """Inodes; 0 where the file system has no limit."""
    total_files: int


class Probes:
    """Questions to the running machine."""

    def space(self, folder: Path) -> DiskSpace:
        """Return the file system that has, or will have, a folder."""
        import psutil  # type: ignore[import-untyped, unused-ignore]

        there = next(one for one in (folder, *folder.parents) if one.exists())
        files = os.statvfs(there)
        mounts = [one for one in psutil.disk_partitions(all=True) if there.is_relative_to(one.mountpoint)]
        kind = max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""
        return DiskSpace(str(there), kind, psutil.disk_usage(str(there)).free, files.f_favail, files.f_files)

    def sync_s(self, folder: Path) -> float:
        """Return how long a write of 4 KiB takes until it is on disk: a median, in seconds. Raise OSError."""
        handle = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            return statistics.median(_synced(handle) for _ in range(SYNCS))
        finally:
            os.close(handle)

    def clock_is_synchronised(self) -> bool:
        """Return whether the kernel's clock follows another clock (adjtimex(2), STA_UNSYNC). Raise HostError."""
        found = ctypes.create_string_buffer(_TIMEX_BYTES)
        if ctypes.CDLL(None, use_errno=True).adjtimex(found) < 0:
            raise HostError(f"cannot read the kernel's clock: {os.strerror(ctypes.get_errno())}")
        return not int.from_bytes(found.raw[_STATUS : _STATUS + 4], "little") & _UNSYNCHRONISED

    def output(self, *words: str) -> str:
        """Return what a program prints. Raise HostError if it fails or takes longer than PROGRAM_S."""
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=PROGRAM_S, check=False, errors="replace"
            )
        except OSError as error:
            raise HostError(f"cannot run {words[0]}: {cause_of(error)}") from None
        except subprocess.TimeoutExpired:
            raise HostError(f"cannot run {words[0]}: it does not end within {PROGRAM_S:g} s") from None
        if done.returncode:
            raise HostError(f"cannot run {' '.join(words)}: {done.stderr.strip()[:200] or f'exit {done.returncode}'}")
        return done.stdout

    def answers(self, host: str, port: int) -> bool:
        """Return whether a process listens on a TCP port."""
        try:
            with socket.create_connection((host, port), CONNECT_S):
                return True
        except OSError:
            return False

    def library_error(self) -> str:
        """Return why NVIDIA's management library cannot be loaded, or "". In a process of its own: it may hang."""
        source = "from nodeagent.host.nvml.library import load; f = load(); print(f.reason if f else '')"
        return self.output(*_python(source)).strip()


def _python(source: str) -> Sequence[str]:
    import sys

    return sys.executable, "-c", source


def _synced(handle: int) -> float:
    began = time.perf_counter()
    os.pwrite(handle, _PIECE, 0)
    os.fsync(handle)
    return time.perf_counter() - began
