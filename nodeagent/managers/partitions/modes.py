"""Puts GPUs into MIG mode as configured, and takes out of it those that it put there. Never a GPU that is in use, and
never one that an admin put into that mode.

The agent resets no GPU: where the mode changes at a reset only (A100, A30), the notes say that one is needed.
"""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import structlog

from nodeagent.config.schema import Config
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.host.nvml.values import Completed, Failure, NvGpu, RefusedByDriver, SetMode, Snapshot
from nodeagent.host.sysfs.atomic_file import READABLE
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.state_files import MIG_MODES
from nodeagent.state.agent import Agent

log = structlog.get_logger()


class ModeDriver(Protocol):
    """NVML, as host/nvml/client.py asks it."""

    async def set_mode(self, one: SetMode) -> Completed | RefusedByDriver | Failure: ...


class Shown(Protocol):
    """What NVML shows."""

    @property
    def nvml(self) -> Snapshot | Failure | None:
        """Its last answer, or None before the first."""
        ...

    async def ask_nvml(self) -> None:
        """Ask it, and report the machine as it is now."""
        ...


class SwitchedGpus:
    """The UUIDs of the GPUs that the agent put into MIG mode, in a file. Its methods block, and raise HostError if it
    cannot be read or written."""

    def __init__(self, state_dir: Path) -> None:
        self._file = RecordFile(state_dir / MIG_MODES, list[str], mode=READABLE)

    def read(self) -> frozenset[str]:
        """Return the UUIDs."""
        return frozenset(self._file.load() or ())

    def note(self, gpu: str, *, switched: bool) -> None:
        """Record that a GPU is about to be put into MIG mode, or has left it."""
        with self._file.alone() as save:
            before = self.read()
            after = before | {gpu} if switched else before - {gpu}
            save(sorted(after) or None)


class MigModes:
    """Compares the GPUs with the configuration, one at a time."""

    def __init__(
        self,
        agent: Agent,
        shown: Shown,
        driver: ModeDriver,
        state_dir: Path,
        config: Callable[[], Config],
        reserve: Callable[[str], None],
    ) -> None:
        """reserve: has nothing of a GPU (a PCI address) granted until it is called with ""."""
        self._agent = agent
        self._driver = driver
        self._switched = SwitchedGpus(state_dir)
        self._config = config
        self._shown = shown
        self._reserve = reserve
        self.waiting: dict[str, str] = {}
        """Why GPUs are not in the mode that is configured, by PCI address."""

    async def step(self) -> None:
        """Switch what can be switched now. Raise HostError if it cannot be recorded."""
        nvml = self._shown.nvml
        if not isinstance(nvml, Snapshot):
            return
        mine, waiting = await asyncio.to_thread(self._switched.read), dict[str, str]()
        for gpu in nvml.gpus:
            enable = self._named(gpu)
            if gpu.mig_enabled is None or (not enable and gpu.uuid not in mine):
                continue
            if gpu.mig_enabled == enable:
                if not enable:
                    await asyncio.to_thread(self._switched.note, gpu.uuid, switched=False)
                continue
            if why := await self._switch(gpu, enable=enable):
                waiting[gpu.pci_address] = why
        self.waiting = waiting

    def notes(self) -> Iterator[str]:
        """Yield which GPUs are not in the mode that is configured, and why."""
        for gpu, why in sorted(self.waiting.items()):
            yield f"GPU {gpu} is not in the MIG mode that is configured: {why}"

    def _named(self, gpu: NvGpu) -> bool:
        patterns = (pattern for one in self._config().divided for pattern in one.mig.gpus)
        return any(fnmatch.fnmatchcase(gpu.pci_address, pattern) for pattern in patterns)

    async def _switch(self, gpu: NvGpu, *, enable: bool) -> str:
        """Switch one GPU. Return why that is not possible now, or ""."""
        if gpu.mig_pending == enable:
            return "it changes when the GPU is reset (nvidia-smi --gpu-reset) or the machine reboots"
        if gpu.processes is None:
            return "NVML does not say whether a process uses it"
        if gpu.processes:
            return f"{gpu.processes} processes use it"
        if gpu.instances is None or gpu.instances:
            return "it has MIG instances"
        self._reserve(gpu.pci_address)
        try:
            await self._agent.refresh()
            if self._is_held(gpu.pci_address):
                return "a pod holds it or a part of it"
            return await self._asked(gpu, enable=enable)
        finally:
            self._reserve("")

    def _is_held(self, gpu: str) -> bool:
        inventory, ledger = self._agent.inventory, self._agent.newest
        return not excluded_with(inventory, ledger, [gpu]).isdisjoint(ledger.devices_held)

    async def _asked(self, gpu: NvGpu, *, enable: bool) -> str:
        if enable:
            await asyncio.to_thread(self._switched.note, gpu.uuid, switched=True)
        answer = await self._driver.set_mode(SetMode(gpu=gpu.uuid, enabled=enable))
        await self._shown.ask_nvml()
        if not isinstance(answer, Completed):
            log.warning("mig-mode-not-set", gpu=gpu.pci_address, enabled=enable, error=answer.reason)
            return answer.reason
        log.info("mig-mode-set", gpu=gpu.pci_address, enabled=enable, at_reset=answer.pending)
        return "it changes when the GPU is reset" if answer.pending else ""
