"""Which interrupts were moved and their previous affinity, in a file that survives the agent but not the boot: after a
reboot the kernel renumbers interrupts and has lost their affinity.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import InputError
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs

VERSION = 1
_MODE = 0o600


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """An interrupt that the agent has moved."""

    irq: int
    name: str
    """The names of its actions: the same number may later belong to another device."""
    before: CpuSet
    """smp_affinity_list before the move."""
    wanted: CpuSet
    """What was written last."""
    seen: CpuSet
    """What the kernel made of it."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    irq: int
    name: str
    before: str
    wanted: str
    seen: str


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = VERSION  # type: ignore[assignment]
    boot_id: str = ""
    moved: list[_Line] = []


def load(sysfs: SysFs, path: Path) -> tuple[dict[int, Moved], str]:
    """Return what was moved since boot, by number, and why that is unknown; empty if it is known."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
        if found.boot_id != _boot_id(sysfs):
            return {}, ""
        return {line.irq: _moved(line, path) for line in found.moved}, ""
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        cause = error.strerror or str(error)
    except (msgspec.MsgspecError, UnicodeDecodeError, InputError) as error:
        cause = str(error)
    return {}, f"cannot load {path}: {cause}; interrupts that were moved before stay where they are"


def save(sysfs: SysFs, path: Path, moved: Iterable[Moved]) -> None:
    """Record exactly these moves; the file exists only if there are any. Raise HostError with the cause."""
    lines = [_line(one) for one in sorted(moved, key=lambda one: one.irq)]
    if not lines:
        files.remove(path)
        return
    content = msgspec.json.encode(_File(boot_id=_boot_id(sysfs), moved=lines))
    files.replace(path, msgspec.json.format(content, indent=1) + b"\n", mode=_MODE)


def _boot_id(sysfs: SysFs) -> str:
    return sysfs.text(BOOT_ID, "")


def _moved(line: _Line, path: Path) -> Moved:
    before, wanted, seen = (CpuSet.parse(one, source=str(path)) for one in (line.before, line.wanted, line.seen))
    return Moved(irq=line.irq, name=line.name, before=before, wanted=wanted, seen=seen)


def _line(one: Moved) -> _Line:
    return _Line(irq=one.irq, name=one.name, before=str(one.before), wanted=str(one.wanted), seen=str(one.seen))
