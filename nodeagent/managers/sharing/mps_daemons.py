"""Starts, adopts, repairs and stops MPS daemons: exactly those that the ledger asks for, after kill -9 at any step.

A daemon is recorded before its folder is made and until its folder is gone. One that another agent started is adopted
if the recorded process, by pid and start time, still runs and is of that folder; a process that has its pid by now is
left alone. One that has ended is started again in the same folder: NVIDIA's clients do not survive their server
(Multi-Process Service, Memory Protection and Error Containment), and this is recorded and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
import structlog

from nodeagent.core.sharing.mps import DAEMONS, MpsSet
from nodeagent.errors import HostError
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.mps.control import Limits, MpsControl, reap
from nodeagent.host.mps.processes import ProcessId, pipes_below, process_id
from nodeagent.host.nvidia_smi import NvidiaSmi
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.sharing.journal import DAEMON, DaemonRecord, SharingJournal, Stage

PROHIBITED = "Prohibited"
"""The compute mode that allows no CUDA program (nvidia-smi, compute_mode)."""
log = structlog.get_logger()


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the daemons."""

    errors: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why a daemon does not run as it should, or is not stopped, by name."""
    restarted: tuple[str, ...] = ()
    """Daemons that had ended although their clients may have used them."""


class MpsDaemons:
    """All daemons of a node. Every call blocks; one agent at a time may call it (managers/sharing/manager.py)."""

    def __init__(self, journal: SharingJournal, runtime_dir: Path, search: DriverSearch, smi: NvidiaSmi) -> None:
        """search: where NVIDIA's program is looked for."""
        self.folder = runtime_dir / DAEMONS
        self._journal = journal
        self._search = search
        self._smi = smi
        self._children: set[int] = set()
        """Daemons that this agent started, by pid."""

    def keep(self, wanted: Mapping[str, MpsSet], *, ended: bool) -> Kept:
        """Make the wanted daemons run. ended: whether the others are to be stopped, because the ledger is complete."""
        self._reap()
        errors, restarted = dict[str, str](), list[str]()
        if ended:
            errors |= self.stop(self.left() - wanted.keys())
        for name, one in wanted.items():
            try:
                if self._keep_one(one, self._journal.daemons().get(name)):
                    restarted.append(name)
            except HostError as error:
                errors[name] = str(error)
        return Kept(errors=errors, restarted=tuple(restarted))

    def stop(self, names: set[str]) -> dict[str, str]:
        """Stop some daemons and remove what is left of them. Return why some are left, by name."""
        errors = dict[str, str]()
        for name in sorted(names):
            try:
                self._stop_one(name, self._journal.daemons().get(name))
            except HostError as error:
                errors[name] = str(error)
        return errors

    def records(self) -> dict[str, DaemonRecord]:
        """Return what is recorded, by name."""
        return self._journal.daemons()

    # ---------------------------------------------------------------- one daemon

    def _keep_one(self, one: MpsSet, record: DaemonRecord | None) -> bool:
        """Make one daemon run with its limits. Return whether it had ended and was started again."""
        control = self._control(one.name)
        ran = record is not None and record.stage is Stage.RUNNING
        lost = record is not None and ran and not control.is_whole(_process(record))
        if record is not None and ran and not lost and (one.fault or _serves(record, one)):
            self._limit(control, one, record)
            return False
        if one.fault:
            raise HostError(f"cannot start MPS for {', '.join(one.devices)}: {one.fault}")
        self._check_compute_mode(one)
        self._start(control, one, record, restarts=(record.restarts if record is not None else 0) + lost)
        return lost

    def _start(self, control: MpsControl, one: MpsSet, before: DaemonRecord | None, restarts: int) -> None:
        record = DaemonRecord(
            name=one.name, stage=Stage.STARTING, uuids=one.uuids, shared=one.shared, restarts=restarts
        )
        self._journal.keep({record.key: record})
        control.stop(_process(before) if before is not None else None)
        pid = control.start(one.uuids, multi_user=one.shared)
        self._children.add(pid)
        found = process_id(pid) or ProcessId(pid, 0)
        record = msgspec.structs.replace(record, pid=found.pid, start_ticks=found.start_ticks)
        self._journal.keep({record.key: record})
        control.wait_ready(pid)
        self._limit(control, one, record)
        log.info("mps-started", daemon=one.name, devices=one.devices, uuids=one.uuids, pid=found.pid, restarts=restarts)

    def _limit(self, control: MpsControl, one: MpsSet, record: DaemonRecord) -> None:
        """Give a daemon its limits, and record that it runs with them."""
        if one.fault:
            return
        memory = dict(one.memory_mib)
        wanted = msgspec.structs.replace(
            record, stage=Stage.RUNNING, threads_percent=one.threads_percent, memory_mib=memory
        )
        if wanted != record:
            control.limit(Limits(threads_percent=one.threads_percent, memory_mib=memory))
            self._journal.keep({wanted.key: wanted})

    def _stop_one(self, name: str, record: DaemonRecord | None) -> None:
        control = self._control(name)
        if record is not None and record.stage is not Stage.STOPPING:
            self._journal.keep({record.key: msgspec.structs.replace(record, stage=Stage.STOPPING)})
        control.stop(_process(record) if record is not None else None)
        self._reap()
        control.remove()
        if record is not None:
            self._journal.forget((DAEMON, name))
        log.info("mps-stopped", daemon=name)

    def _check_compute_mode(self, one: MpsSet) -> None:
        """Raise HostError if the compute mode of a GPU allows no program. Without nvidia-smi it is not known."""
        for uuid in one.parents if self._smi.is_there() else ():
            if self._smi.compute_mode(uuid) == PROHIBITED:
                raise HostError(
                    f"cannot start MPS for {', '.join(one.devices)}: the compute mode of {uuid} is {PROHIBITED}, which "
                    f"allows no CUDA program (nvidia-smi -i {uuid} -c DEFAULT changes it)"
                )

    # ---------------------------------------------------------------- what is there

    def left(self) -> set[str]:
        """Return the daemons of which there is anything: a record, a folder, or a process."""
        folders = (one.name for one in files.entries(self.folder))
        return {*self._journal.daemons(), *folders, *self._running()}

    def _running(self) -> Iterator[str]:
        return (pipe.parent.name for pipe in pipes_below(self.folder) if pipe.parent.parent == self.folder)

    def _control(self, name: str) -> MpsControl:
        return MpsControl(self.folder / name, self._search)

    def _reap(self) -> None:
        self._children = {pid for pid in self._children if reap(pid) is None}


def _serves(record: DaemonRecord, one: MpsSet) -> bool:
    return (record.uuids, record.shared) == (one.uuids, one.shared)


def _process(record: DaemonRecord) -> ProcessId:
    return ProcessId(record.pid, record.start_ticks)
