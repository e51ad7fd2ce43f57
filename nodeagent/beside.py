"""Beside kubelet: which CPUs are the system's own, and which kinds kubelet's own managers give away themselves, so that
the agent must not. Read anew each time it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog

from nodeagent.config import Config
from nodeagent.core.cpuset import EMPTY, CpuSet
from nodeagent.core.machine import machine_of
from nodeagent.core.model import Inventory
from nodeagent.errors import ConfigError, InputError
from nodeagent.kube import kubelet_state, memory_state
from nodeagent.offer import CPU, HUGEPAGES, MEMORY

FIRST = " (before that, `nodeagent import kubelet-state` takes over what running pods have)"
log = structlog.get_logger()


# ---------------------------------------------------------------- the system's own CPUs


def reserved(config: Config, kubelet_dir: Path, inventory: Inventory) -> CpuSet:
    """The CPUs that are never granted: as configured, or kubelet's, or the first core. One that is offline stays so."""
    if config.reserved_cpus is not None:
        return _configured(config.reserved_cpus) & (inventory.cpus_possible | inventory.cpus_online)
    try:
        found = kubelet_state.read(kubelet_dir).reserved
    except InputError as error:
        log.warning("kubelet-reserved-cpus-unknown", error=str(error))
        found = EMPTY
    return found or _first_core(inventory)


def _configured(text: str) -> CpuSet:
    try:
        return CpuSet.parse(text, source="reservedCpus")
    except InputError as error:
        raise ConfigError(str(error)) from None


def _first_core(inventory: Inventory) -> CpuSet:
    if not inventory.cpus:
        return EMPTY
    return CpuSet.of_mask(machine_of(inventory).cores[inventory.cpus[0].core])


# ---------------------------------------------------------------- what kubelet gives away itself


def managed_elsewhere(kubelet_dir: Path, inventory: Inventory, reserved: CpuSet) -> Mapping[str, str]:
    """Kinds that cannot be served beside kubelet's own managers, in either API, each with the reason."""
    cpus, memory = _cpus_managed(kubelet_dir, inventory, reserved), _memory_managed(kubelet_dir)
    every = {CPU: cpus, HUGEPAGES: memory, MEMORY: memory}
    return {kind: why for kind, why in every.items() if why}


def confines_all(kubelet_dir: Path) -> bool:
    """Whether kubelet's CPU manager writes the cpuset of every container itself, as the static one does; where that
    cannot be told it is left to it."""
    try:
        return kubelet_state.read(kubelet_dir).static
    except InputError:
        return True


def _cpus_managed(kubelet_dir: Path, inventory: Inventory, reserved: CpuSet) -> str:
    """Why CPUs cannot be served beside kubelet's CPU manager; "" where they can."""
    try:
        kubelet = kubelet_state.read(kubelet_dir)
    except InputError as error:
        return f"cannot tell whether kubelet manages CPUs itself: {error}"
    if not kubelet.static:
        return ""
    advice = f"set cpuManagerPolicy: none{FIRST}, or reservedCpus so that the two sets of CPUs have none in common"
    if kubelet.managed is None:
        return f"kubelet's CPU manager is static ({kubelet.policy_source}); {advice}"
    common = kubelet.managed & (inventory.cpus_online - reserved)
    return f"kubelet's static CPU manager has CPUs {common} too ({kubelet.policy_source}); {advice}" if common else ""


def _memory_managed(kubelet_dir: Path) -> str:
    """Why hugepages and memory cannot be served beside kubelet's memory manager; "" where they can."""
    try:
        kubelet = memory_state.read(kubelet_dir)
    except InputError as error:
        return f"cannot tell whether kubelet manages memory itself: {error}"
    if not kubelet.static:
        return ""
    return (
        f"kubelet's memory manager is {kubelet.policy} ({kubelet.policy_source}): it gives from the same pools; set "
        f"memoryManagerPolicy: None{FIRST}"
    )
