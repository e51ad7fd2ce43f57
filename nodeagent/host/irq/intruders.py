"""Host threads and interrupts on exclusive CPUs: found and reported; interrupts can also be moved away.

A host thread is one whose process is in no pod's cgroup. Kernel threads that serve a single CPU (migration/3,
ksoftirqd/3, kworker/3:1) belong to that CPU and are left out. An interrupt is delivered to the CPUs in its effective
affinity or, if the kernel shows none, in the configured one. What ends meanwhile is skipped.
Sources: proc(5), Documentation/core-api/irq/irq-affinity.rst, include/linux/sched.h (PF_*).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from nodeagent.core.model.cpuset import EMPTY, MAX_ID, CpuSet
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.layout import is_pods
from nodeagent.host.cgroup.write import put
from nodeagent.host.sysfs.sysfs import SysFs

T = TypeVar("T")
_IRQS = "sys/kernel/irq"
_KERNEL_THREAD, _CANNOT_MOVE = 0x00200000, 0x04000000
"""PF_KTHREAD, PF_NO_SETAFFINITY."""
_FLAGS_FIELD = 6
"""In /proc/PID/stat, counted after the name, which may contain anything."""
_STATUS = re.compile(r"Name:\t(?P<name>[^\n]*)\n.*\nCpus_allowed_list:\t(?P<cpus>[0-9,-]*)", re.DOTALL)
_TRIGGER = r"(?:\s+[0-9]+)?(?:\s+(?:Edge|Level))?(?:\s*-\S+)?(?:\s{2,}(?P<name>\S.*))?"
"""What follows the chip's name in /proc/interrupts, each part optional: number, level, handler, and the actions after
at least two spaces (kernel/irq/proc.c, show_interrupts)."""
_AFTER_CHIP, _AFTER_COUNTS = re.compile(_TRIGGER), re.compile(rf"\S+(?: \S+)*?{_TRIGGER}")
_MANAGED = "; the kernel or the device's driver manages this interrupt"
_HINT = {
    "Input/output error": _MANAGED,
    "Operation not permitted": _MANAGED,  # the same in newer kernels
    "No space left on device": "; these CPUs have no free vectors",
    "Read-only file system": "; systemd/nodeagent-interrupts.conf opens it, in a pod `privileged`",
}


class Thread(msgspec.Struct, frozen=True, kw_only=True):
    """A host thread that may run on an exclusive CPU."""

    pid: int
    """Pid of its process."""
    tid: int
    comm: str
    """The thread's own name."""
    cpus: CpuSet
    """All CPUs that it may run on."""
    hits: CpuSet
    """The exclusive CPUs among them."""
    cgroup: str
    kernel: bool
    movable: bool
    """Whether sched_setaffinity(2) may change its CPUs."""


class Irq(msgspec.Struct, frozen=True, kw_only=True):
    """An interrupt that is delivered to an exclusive CPU, or of which it was asked where it is delivered."""

    irq: int
    name: str
    """The names of its actions; empty if no driver has requested it."""
    cpus: CpuSet
    """Effective affinity."""
    asked: CpuSet
    """Configured affinity, smp_affinity_list."""
    hits: CpuSet
    """The exclusive CPUs among `cpus`."""


def threads(sysfs: SysFs, exclusive: CpuSet, warnings: list[str]) -> tuple[Thread, ...]:
    """Return the host threads that may run on one of these CPUs, in order of process and thread.

    Reads every process and the status of every host thread, about 50 microseconds each. What cannot
    be read is named in `warnings`.
    """
    found = (one for pid, folder in sysfs.numbered("proc", "") for one in _of_process(sysfs, pid, folder, exclusive))
    return tuple(_tolerated(found, warnings)) if exclusive else ()


def sees_host(sysfs: SysFs) -> bool:
    """Return whether /proc shows the host's processes: kthreadd has number 2 in the first PID namespace alone
    (pid_namespaces(7)). A container without hostPID sees its own processes only."""
    try:
        return bool((_flags(sysfs, "proc/2") or 0) & _KERNEL_THREAD)
    except HostError:
        return False


def irqs(sysfs: SysFs, exclusive: CpuSet, warnings: list[str], also: Collection[int] = ()) -> tuple[Irq, ...]:
    """Return the interrupts delivered to one of these CPUs, by number, and some others wherever they are delivered.
    What cannot be read is named in `warnings`."""
    if not exclusive:
        return ()
    names = interrupt_names(sysfs)
    found = (
        _irq(sysfs, irq, folder, names, exclusive, always=irq in also) for irq, folder in sysfs.numbered("proc/irq", "")
    )
    return tuple(_tolerated(found, warnings))


def move_irq(sysfs: SysFs, irq: int, cpus: CpuSet) -> CpuSet:
    """Restrict an interrupt to these CPUs. Return where it is delivered then.

    Raise HostError with cause and value if the kernel refuses: EIO, EPERM or a read-only file for
    interrupts managed by the kernel or a driver, ENOSPC if the CPUs have no vector left, ENOENT if the interrupt is
    gone. Raise InputError if `cpus` is empty.
    """
    if not cpus:
        raise InputError(f"cannot move interrupt {irq}: no CPUs are left for it")
    path = sysfs.path(f"proc/irq/{irq}/smp_affinity_list")
    try:
        put(path, str(cpus))
    except HostError as error:
        why = next((hint for cause, hint in _HINT.items() if cause in str(error)), "")
        raise HostError(f"{error}{why or _read_only(path)}") from None
    return _delivered(sysfs, f"proc/irq/{irq}") or cpus


def _read_only(path: str) -> str:
    """Return the hint for a read-only file, or "" for another: Linux 6.12 makes those of the interrupts that it manages
    read-only, and refuses to open them for writing without CAP_DAC_OVERRIDE."""
    try:
        return "" if Path(path).stat().st_mode & stat.S_IWUSR else _MANAGED
    except OSError:
        return ""


def interrupt_names(sysfs: SysFs) -> Mapping[int, str]:
    """Return the names of interrupts, several of one joined by ", "; unnumbered ones are left out.

    They are in /sys/kernel/irq/N/actions (Documentation/ABI/testing/sysfs-kernel-irq). Interrupts without that file
    are looked up in /proc/interrupts.
    """
    named = {irq: _actions(sysfs, folder) for irq, folder in sysfs.numbered(_IRQS, "")}
    found = {irq: name for irq, name in named.items() if name is not None}
    return found if found and len(found) == len(named) else {**_names_in_proc(sysfs), **found}


def _actions(sysfs: SysFs, folder: str) -> str | None:
    """Return the names of an interrupt's actions, empty if no driver has requested it, or None if unknown."""
    try:
        text = sysfs.text(f"{folder}/actions", None)
    except HostError:
        return None
    return text if text is None else ", ".join(one.strip() for one in text.split(","))


def _names_in_proc(sysfs: SysFs) -> dict[int, str]:
    lines = sysfs.text("proc/interrupts", "").splitlines()
    columns = lines[0].count("CPU") if lines else 0
    counted = re.compile(rf"\s*(?P<irq>[0-9]+):(?:\s+[0-9]+){{1,{columns or MAX_ID}}}\s+(?P<rest>.*?)\s*")
    found = (counted.fullmatch(line) for line in lines)
    return {int(one["irq"]): _action(one["rest"], _chip(sysfs, one["irq"])) for one in found if one is not None}


def _chip(sysfs: SysFs, irq: str) -> str:
    """Return the name of an interrupt's chip, or "" if the kernel does not report it."""
    try:
        return sysfs.text(f"{_IRQS}/{irq}/chip_name", "")
    except HostError:
        return ""


def _action(rest: str, chip: str) -> str:
    """Return what follows chip, number and trigger ("PCI-MSI 524288-edge      nvme0q1"); empty if there is nothing.

    Without the name of the chip, which may have several words ("Hyper-V PCIe MSI"), its words are those with single
    spaces between them.
    """
    named = _AFTER_CHIP.fullmatch(rest[len(chip) :]) if chip and rest.startswith(chip) else None
    named = named or _AFTER_COUNTS.fullmatch(rest)
    return named["name"] or "" if named is not None else ""


def _of_process(sysfs: SysFs, pid: int, folder: str, exclusive: CpuSet) -> Iterator[Thread | str]:
    try:
        cgroup = _cgroup(sysfs, folder)
    except HostError as error:
        yield str(error)
        return
    tasks = () if is_pods(cgroup) else sysfs.numbered(f"{folder}/task", "")
    for tid, task in tasks:
        try:
            if (thread := _thread(sysfs, pid, tid, task, cgroup, exclusive)) is not None:
                yield thread
        except HostError as error:
            yield str(error)


def _thread(sysfs: SysFs, pid: int, tid: int, task: str, cgroup: str, exclusive: CpuSet) -> Thread | None:
    comm, cpus = _affinity(sysfs, task)
    flags = None if cpus.isdisjoint(exclusive) else _flags(sysfs, task)
    if flags is None or (flags & _KERNEL_THREAD and len(cpus) == 1):
        return None
    return Thread(
        pid=pid,
        tid=tid,
        comm=comm,
        cpus=cpus,
        hits=cpus & exclusive,
        cgroup=cgroup,
        kernel=bool(flags & _KERNEL_THREAD),
        movable=not flags & _CANNOT_MOVE,
    )


def _affinity(sysfs: SysFs, task: str) -> tuple[str, CpuSet]:
    """Return name and CPUs of a thread; no CPUs if it has ended."""
    if not (text := _gone_is_none(sysfs, f"{task}/status")):
        return "", EMPTY
    if (found := _STATUS.match(text)) is None:
        raise HostError(f"cannot read {sysfs.path(task)}/status: it has no Name and Cpus_allowed_list")
    try:
        return found["name"], CpuSet.parse(found["cpus"], source=sysfs.path(f"{task}/status"))
    except InputError as error:
        raise HostError(str(error)) from None


def _cgroup(sysfs: SysFs, folder: str) -> str:
    """Return a process's cgroup in the unified hierarchy, or, if it is a pod's, in any hierarchy."""
    lines = (_gone_is_none(sysfs, f"{folder}/cgroup") or "").splitlines()
    paths = {line.split(":", 2)[0]: line.split(":", 2)[-1] for line in lines}
    return next((path for path in paths.values() if is_pods(path)), paths.get("0", ""))


def _flags(sysfs: SysFs, task: str) -> int | None:
    if not (text := _gone_is_none(sysfs, f"{task}/stat")):
        return None
    fields = text.rpartition(")")[2].split()
    if len(fields) <= _FLAGS_FIELD or not fields[_FLAGS_FIELD].isdigit():
        raise HostError(f"cannot read {sysfs.path(task)}/stat: {text[:80]!r} has no flags")
    return int(fields[_FLAGS_FIELD])


def _irq(
    sysfs: SysFs, irq: int, folder: str, names: Mapping[int, str], exclusive: CpuSet, *, always: bool
) -> Irq | str | None:
    try:
        cpus = _delivered(sysfs, folder)
        asked = sysfs.cpus(f"{folder}/smp_affinity_list")
    except HostError as error:
        return str(error)
    if cpus is None or (cpus.isdisjoint(exclusive) and not always):
        return None
    return Irq(irq=irq, name=names.get(irq, ""), cpus=cpus, asked=asked or cpus, hits=cpus & exclusive)


def _delivered(sysfs: SysFs, folder: str) -> CpuSet | None:
    """Return where an interrupt is delivered; empty before it is first enabled, None if it is gone."""
    effective = sysfs.cpus(f"{folder}/effective_affinity_list")
    return sysfs.cpus(f"{folder}/smp_affinity_list") if effective is None else effective


def _gone_is_none(sysfs: SysFs, path: str) -> str | None:
    """Return a file of a process, or None if it has ended; ESRCH means that it ended after the file was opened."""
    try:
        return sysfs.text(path, None)
    except HostError as error:
        if isinstance(error.__context__, ProcessLookupError):
            return None
        raise


def _tolerated(found: Iterator[T | str | None], warnings: list[str]) -> Iterator[T]:
    for one in found:
        if isinstance(one, str):
            warnings.append(one)
        elif one is not None:
            yield one
