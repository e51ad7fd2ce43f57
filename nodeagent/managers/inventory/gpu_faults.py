"""What NVML said last against each GPU, in a file that outlives the agent.

NVML falls silent on memory rows once a GPU is divided into MIG instances. An agent that starts then would take a GPU
for well that is not. What was said counts until NVML says otherwise, a reboot, or the driver is bound again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from nodeagent.core.model.health import UNHEALTHY, UNKNOWN, DeviceState, Evidence, Health, Remedy
from nodeagent.errors import HostError
from nodeagent.host.sysfs.record_file import RecordFile, UnreadableError
from nodeagent.telemetry.once import Once

FILE = "gpu-faults.json"
"""In the state folder."""
LASTING = ("ecc", "rows", "sram", "recovery")
"""Sources whose evidence does not end by itself."""


class _Fault(msgspec.Struct, frozen=True):
    device: str
    source: str
    state: DeviceState
    reason: str
    remedy: Remedy
    binding: str


class _Document(msgspec.Struct, frozen=True):
    boot_id: str
    faults: tuple[_Fault, ...] = ()
    version: int = 1


class FaultMemory:
    """The faults in their file. Everything blocks. Two agents of a node write the same of the same GPUs."""

    def __init__(self, path: Path, boot_id: str, binding: Callable[[str], str]) -> None:
        """binding: returns what identifies the binding of a device's driver; "" if the device has none."""
        self._file = RecordFile(path, _Document)
        self._boot_id = boot_id
        self._binding = binding
        self._written: Sequence[_Fault] | None = None
        self._bad = Once("gpu-faults-not-kept")

    def standing(self) -> list[Evidence]:
        """Return what an earlier agent was told on this boot by the drivers that are still bound."""
        self._written = self._read()
        return [
            Evidence(device=one.device, source=one.source, state=one.state, reason=one.reason, remedy=one.remedy)
            for one in self._written
            if one.binding == self._binding(one.device)
        ]

    def keep(self, health: Health, gpus: Iterable[str]) -> None:
        """Remember what is known against some GPUs, and forget all else, if that differs from what is written."""
        faults = tuple(
            _Fault(gpu, source, said.state, said.reason, said.remedy, self._binding(gpu))
            for gpu in sorted(gpus)
            if gpu in health
            for source, said in sorted(health[gpu].seen.items())
            if source in LASTING and said.state in (UNHEALTHY, UNKNOWN) and not said.latched
        )
        if faults != self._written:
            self._write(faults)

    def _read(self) -> tuple[_Fault, ...]:
        try:
            document = self._file.load()
        except UnreadableError as error:
            self._bad.report(str(error))
            return ()
        return document.faults if document is not None and document.boot_id == self._boot_id else ()

    def _write(self, faults: tuple[_Fault, ...]) -> None:
        try:
            self._file.save(_Document(boot_id=self._boot_id, faults=faults))
            self._written = faults
            self._bad.clear()
        except HostError as error:
            self._bad.report(str(error))
