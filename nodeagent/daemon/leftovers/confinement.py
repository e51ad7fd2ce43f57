"""How containers and the host are confined, and what the kernel divides among them: what is left of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.daemon.leftovers.leftover import Host, Leftover, Line, kept_going, step
from nodeagent.host.blockio.keeper import IoKeeper
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.line_journal import CgroupLine
from nodeagent.host.cgroup.line_keeper import LineKeeper
from nodeagent.host.cgroup.read import hierarchy
from nodeagent.host.cgroup.widen import CPUS, MEMS, Widener
from nodeagent.host.irq.interrupts import Mover
from nodeagent.host.irq.journal import load
from nodeagent.host.resctrl.journal import load as load_resctrl
from nodeagent.host.resctrl.read import folder as group_folder
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs
from nodeagent.host.systemd.slice_drop_ins import SliceDropins
from nodeagent.host.systemd.units import SOCKET, Systemd, is_slice
from nodeagent.host.tuning.journal import load as load_tuned
from nodeagent.host.tuning.tuner import Tuner
from nodeagent.host.uclamp.keeper import UclampKeeper
from nodeagent.managers.hugepages.journal import Grown, GrowthJournal
from nodeagent.managers.isolation.manager import MOVED
from nodeagent.managers.kubelet import look
from nodeagent.managers.kubelet_conflicts import confines_all
from nodeagent.managers.pinning.manager import UNITS
from nodeagent.managers.resctrl.rounds import ResctrlRounds
from nodeagent.managers.state_files import IO, RESCTRL, TUNING, UCLAMP

_KUBELETS = "kubelet's own manager writes it, or is not known"


def drop_ins(host: Host) -> Leftover:
    """Return the drop-ins of systemd's slices."""
    folder = Path(host.where.sysfs.path(UNITS))
    every = [SliceDropins(folder, one) for one in layouts(host.config.pinning.cgroup_root)]
    found = dict.fromkeys(path for one in every for path in one.written())

    def undo() -> Iterator[str]:
        for one in every:
            with kept_going() as errors:
                one.keep(None, {})
            yield from errors

    lines = [Line(str(path)) for path in found]
    return Leftover(lines, undo, ["systemd forgets drop-ins at its next `systemctl daemon-reload`"] if lines else [])


def cgroups(host: Host) -> Leftover:
    """Return the control groups that are narrower than they have to be without an agent."""
    where, found = host.where, hierarchy(host.where.sysfs)
    if found.unsupported:
        return Leftover()
    kubelet = look(where.sysfs, where.kubelet_dir, host.config.kubelet_config)
    cpus, mems = not confines_all(kubelet), kubelet.memory is not None and not kubelet.memory.static
    widener = Widener(found.mount, host.config.pinning.cgroup_root, cpus=cpus, mems=mems)
    plan = widener.plan()
    slices = {one.path: CpuSet.parse(one.wanted) for one in plan if one.file == CPUS and is_slice(one.path)}

    def undo() -> Iterator[str]:
        yield from widener.undo()
        yield from _tell_systemd(host, slices)

    lines = [Line(f"{found.mount}/{one.path}/{one.file}", one.found, one.wanted) for one in plan]
    theirs = [file for file, ours in ((CPUS, cpus), (MEMS, mems)) if not ours]
    return Leftover(lines, undo, [f"{file} of containers stays as it is: {_KUBELETS}" for file in theirs])


def _tell_systemd(host: Host, slices: dict[str, CpuSet]) -> Iterator[str]:
    """Replace what systemd was told of slices, which it would write again at its next reload."""
    if not slices or not host.where.sysfs.exists(SOCKET):
        return
    with kept_going() as errors, contextlib.closing(Systemd(host.where.sysfs)) as systemd:
        for path, cpus in slices.items():
            systemd.allow(path.rpartition("/")[2], cpus)  # a refusal means that it does not know the slice
    yield from errors


def interrupts(host: Host) -> Leftover:
    """Return the interrupts that were moved."""
    sysfs, memory = host.where.sysfs, host.where.state_dir / MOVED
    moved, unread = load(sysfs, memory)
    lines = [
        Line(sysfs.path(f"proc/irq/{irq}/smp_affinity_list"), str(one.seen), str(one.before))
        for irq, one in sorted(moved.items())
    ]
    return Leftover(lines, step(lambda: Mover(sysfs, memory).move(EMPTY, EMPTY, ()).why), unread=unread)


def tuning(host: Host) -> Leftover:
    """Return the kernel's files that were set for exclusive CPUs."""
    sysfs, memory = host.where.sysfs, host.where.state_dir / TUNING
    tuned, unread = load_tuned(sysfs, memory)
    lines = [Line(sysfs.path(path), one.seen or one.wanted, one.before) for path, one in tuned.items()]
    return Leftover(lines, step(lambda: Tuner(sysfs, memory).tune({}).why), unread=unread)


def resctrl(host: Host) -> Leftover:
    """Return the groups of resctrl that were made, and the ways that the default group gave up."""
    sysfs, memory = host.where.sysfs, host.where.state_dir / RESCTRL
    journal, unread = load_resctrl(sysfs, memory)
    lines = [Line(sysfs.path(group_folder(name))) for name in sorted(journal.groups)]
    given = {domain: mask for some in journal.before.values() for domain, mask in some.items()}
    lines += [
        Line(f"ways of L3 {domain} of the default group", f"{mask & ~journal.aside.get(domain, 0):#x}", f"{mask:#x}")
        for domain, mask in sorted(given.items())
    ]

    def undo() -> Iterator[str]:
        report = ResctrlRounds(sysfs, memory).keep(None, (), {}, ended=True)
        yield from [report.error] if report.error else report.kept.errors.values()

    return Leftover(lines, undo, unread=unread)


def io(host: Host) -> Leftover:
    """Return the limits of I/O that were set."""
    return _lines(host, IoKeeper, IO)


def uclamp(host: Host) -> Leftover:
    """Return the utilization clamps that were set."""
    return _lines(host, UclampKeeper, UCLAMP)


def _lines(host: Host, kind: type[LineKeeper], record: str) -> Leftover:
    """Return the lines of control groups that a record has."""
    found = hierarchy(host.where.sysfs)
    if found.unsupported:
        return Leftover()
    where = layouts(host.config.pinning.cgroup_root)
    keeper = kind(host.where.sysfs, found.mount, where, host.where.state_dir / record)
    held, unread = keeper.held()
    lines = [_line(found.mount, keeper, one) for one in held]
    return Leftover(lines, step(lambda: keeper.keep({}).errors), unread=unread)


def _line(mount: str, keeper: LineKeeper, one: CgroupLine) -> Line:
    path = f"{mount}/{one.path}/{one.file}"
    if one.number:
        return Line(f"{path} of {one.number}", one.wanted, one.before)
    return Line(path, one.wanted, one.before or keeper.removed(one.file))


def hugepages(host: Host) -> Leftover:
    """Return notes on the pools of hugepages that were grown for claims."""
    sysfs = host.where.sysfs
    grown = GrowthJournal(host.where.state_dir, sysfs.text(BOOT_ID, "")).read().values()
    return Leftover(notes=[_pool(sysfs, one) for one in grown])


def _pool(sysfs: SysFs, one: Grown) -> str:
    folder = f"sys/devices/system/node/node{one.node}/hugepages/hugepages-{one.page_bytes >> 10}kB"
    path = sysfs.path(f"{folder}/nr_hugepages")
    return f"{path} stays as it is: grown from {one.base_pages} to {one.grown_pages} pages for claims"
