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
from nodeagent.host.sysfs.record_file import INDENTED, RecordFile, since_boot
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs

VERSION = 1


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """An interrupt that the agent has moved."""

    irq: int
    name: str
    """The names of its actions: the same number may later belong to another device."""
    device: str = ""
    """PCI address of the function that has it, if that is known: names change with those of interfaces."""
    before: CpuSet
    """smp_affinity_list before the move."""
    wanted: CpuSet
    """What was written last."""
    seen: CpuSet
    """What the kernel made of it."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    irq: int
    name: str
    before: str
    wanted: str
    seen: str
    device: str = ""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = VERSION  # type: ignore[assignment]
    boot_id: str = ""
    moved: list[_Line] = []


def load(sysfs: SysFs, path: Path) -> tuple[dict[int, Moved], str]:
    """Return what was moved since boot, by number, and why that is unknown; empty if it is known."""
    left = "interrupts that were moved before stay where they are"
    found, why = since_boot(_file(path), sysfs, left)
    try:
        return {line.irq: _moved(line, path) for line in found.moved} if found is not None else {}, why
    except InputError as error:
        return {}, f"cannot load {path}: {error}; {left}"


def save(sysfs: SysFs, path: Path, moved: Iterable[Moved]) -> None:
    """Record exactly these moves; the file exists only if there are any. Raise HostError with the cause."""
    lines = [_line(one) for one in sorted(moved, key=lambda one: one.irq)]
    _file(path).save(_File(boot_id=sysfs.text(BOOT_ID, ""), moved=lines) if lines else None)


def _file(path: Path) -> RecordFile[_File]:
    return RecordFile(path, _File, indent=INDENTED)


def _moved(line: _Line, path: Path) -> Moved:
    before, wanted, seen = (CpuSet.parse(one, source=str(path)) for one in (line.before, line.wanted, line.seen))
    return Moved(irq=line.irq, name=line.name, device=line.device, before=before, wanted=wanted, seen=seen)


def _line(one: Moved) -> _Line:
    before, wanted, seen = str(one.before), str(one.wanted), str(one.seen)
    return _Line(irq=one.irq, name=one.name, device=one.device, before=before, wanted=wanted, seen=seen)
