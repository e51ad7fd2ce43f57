"""Coexistence with kubelet: the CPUs reserved for the system, the kinds that kubelet's own managers assign, so that the
agent must not serve them, and where the two contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from nodeagent.config.schema import Config
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import KUBELET, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.placement.index import machine_of
from nodeagent.errors import ConfigError, InputError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet_files.flags import HOSTNAME, KEYS
from nodeagent.managers.dra.manager import node_name
from nodeagent.managers.dra.other_cpus import registered_cpu_drivers
from nodeagent.managers.kubelet import Kubelet, look
from nodeagent.resources.offer import CPU, HUGEPAGES, MEMORY

FIRST = " (before that, `nodeagent import kubelet-state` takes over what running pods have)"
CGROUP_ROOT = "cgroupRoot"
TOPOLOGY_MANAGER = {"topologyManagerPolicy": "none", "topologyManagerScope": "container"}
"""Keys of kubelet's topology manager with their defaults (pkg/kubelet/apis/config/v1beta1/defaults.go)."""
RESERVED_KEY = "$.reservedCpus"
log = structlog.get_logger()


class KubeletConflicts:
    """This node's kubelet as of the last look. Changes are logged once."""

    def __init__(self, sysfs: SysFs, kubelet_dir: Path) -> None:
        """Store where to look; nothing is read yet."""
        self.kubelet = Kubelet()
        self.contradictions: list[str] = []
        """Where kubelet contradicts itself or the agent."""
        self.notes: list[str] = []
        """These, and what cannot be determined about kubelet."""
        self._sysfs = sysfs
        self._kubelet_dir = kubelet_dir
        self._said: Mapping[str, Any] = {}
        self._unprotected = ""

    def look(self, config: Config) -> Kubelet:
        """Inspect kubelet's process, its files and its managers' states again."""
        known = self.kubelet = look(self._sysfs, self._kubelet_dir, config.kubelet_config, self.kubelet.started)
        self.contradictions = [one for one in contradictions(known, config) if one]
        notes = [*([known.unseen] if known.unseen else []), *self.contradictions, *self._other_cpu_drivers(config)]
        if (said := self.document()) != self._said:
            (log.warning if known.cpus is None else log.info)("kubelet-configuration", **said)
        for note in (one for one in notes if one not in self.notes):
            log.warning("kubelet-contradiction", note=note)
        self._said, self.notes = said, notes
        return known

    def _other_cpu_drivers(self, config: Config) -> Iterator[str]:
        """Yield which DRA drivers of kubelet's registry hand out CPUs too: without an API server nothing else shows
        it."""
        ours = ", ".join(one.name for one in config.served if one.kind == CPU)
        for driver in registered_cpu_drivers(self._kubelet_dir) if ours else ():
            yield (
                f"the DRA driver {driver} is registered with kubelet and hands out CPUs too, as {ours} does: remove "
                "one of the two, unless their reserved CPUs make them disjoint"
            )

    def names(self) -> frozenset[str]:
        """Return the node name given on the kubelet command line, or none if it gives none."""
        started = self.kubelet.started
        found = started.flags.last(HOSTNAME).strip().lower() if started is not None else ""
        return frozenset({found} - {""})

    def topology_manager(self) -> dict[str, str]:
        """Return the policy and the scope of kubelet's topology manager, or nothing while its configuration is
        unknown."""
        config = self.kubelet.config
        known = {key: str(config.values.get(key) or default) for key, default in TOPOLOGY_MANAGER.items()}
        return known if config.known else {}

    def recovered(self, config: Config) -> bool:
        """Return whether kubelet's configuration and states have become readable again. Looks only if they were not."""
        if not self._failed():
            return False
        self.look(config)
        return not self._failed()

    def _failed(self) -> bool:
        return bool(self.kubelet.cpus_error or self.kubelet.memory_error)

    def watch(self, ledger: Ledger) -> str:
        """Return why granted CPUs are not exclusive now, or "". Logged when it changes."""
        found = unprotected(self.kubelet, ledger)
        if found and found != self._unprotected:
            log.error("cpus-not-exclusive", reason=found)
        self._unprotected = found
        return found

    def document(self) -> dict[str, Any]:
        """Return kubelet's configuration in plain types."""
        known = self.kubelet
        return {
            "pid": known.started.pid if known.started is not None else None,
            "sources": list(known.config.sources),
            "settings": {key: value for key, value in sorted(known.config.values.items()) if key in KEYS},
            "error": known.cpus_error or known.memory_error,
        }


# ---------------------------------------------------------------- CPUs reserved for the system


def reserved_cpus(config: Config, kubelet: Kubelet, inventory: Inventory) -> CpuSet:
    """Return the CPUs that are never granted: as configured, else kubelet's, else the first core.

    Raise ConfigError as configured_cpus does.
    """
    if config.reserved_cpus is not None:
        return configured_cpus(config.reserved_cpus, inventory)
    return (kubelet.cpus.reserved if kubelet.cpus is not None else EMPTY) or _first_core(inventory)


def configured_cpus(text: str, inventory: Inventory) -> CpuSet:
    """Return the CPUs of a configured reservedCpus; one that is offline stays reserved. Raise ConfigError if the list
    cannot be parsed, or if it names CPUs that this machine cannot have."""
    configured, possible = _configured(text), inventory.cpus_possible | inventory.cpus_online
    if possible and (strange := configured - possible):
        why = f"cannot reserve CPUs {strange} of reservedCpus: this machine can have CPUs {possible}"
        raise ConfigError(why, key=RESERVED_KEY)
    return configured


def _configured(text: str) -> CpuSet:
    try:
        return CpuSet.parse(text, source="reservedCpus")
    except InputError as error:
        raise ConfigError(str(error), key=RESERVED_KEY) from None


def _first_core(inventory: Inventory) -> CpuSet:
    if not inventory.cpus:
        return EMPTY
    return CpuSet.of_mask(machine_of(inventory).cores[inventory.cpus[0].core])


# ---------------------------------------------------------------- what kubelet assigns itself


def managed_elsewhere(kubelet: Kubelet, inventory: Inventory, reserved: CpuSet) -> Mapping[str, str]:
    """Return the kinds that cannot be served, in either API, because of kubelet's own managers, with the reason."""
    cpus, memory = _cpus_managed(kubelet, inventory, reserved), _memory_managed(kubelet)
    every = {CPU: cpus, HUGEPAGES: memory, MEMORY: memory}
    return {kind: why for kind, why in every.items() if why}


def undetermined(kubelet: Kubelet, config: Config) -> list[str]:
    """Return why configured resources are refused because kubelet's configuration or states cannot be read, as
    "NAME: REASON"; empty if they can be."""
    cpus = _cpus_undetermined(kubelet) if kubelet.cpus is None else ""
    memory = _memory_undetermined(kubelet) if kubelet.memory is None else ""
    every = {CPU: cpus, HUGEPAGES: memory, MEMORY: memory}
    return [f"{one.name}: {why}" for one in config.served if (why := every.get(one.kind))]


def confines_all(kubelet: Kubelet) -> bool:
    """Return whether kubelet's CPU manager itself writes the cpuset of every container, as the static one does.

    If that is unknown, it is assumed.
    """
    return kubelet.cpus is None or kubelet.cpus.static


def confined_by(kubelet: Kubelet) -> CpuSet | None:
    """Return the CPUs on which kubelet's CPU manager lets containers run, empty if it confines none, or None if that is
    unknown."""
    return kubelet.cpus.confined if kubelet.cpus is not None else None


def unprotected(kubelet: Kubelet, ledger: Ledger) -> str:
    """Return why CPUs granted by the agent are not exclusive, or "" if they are.

    The text names the CPUs and their holders. This happens while kubelet's CPU manager confines all containers. Grants
    adopted from kubelet's manager are not affected: kubelet confines them anyway.
    """
    known = kubelet.cpus
    pool = known.confined if known is not None else None
    some = [one for one in ledger.grants.values() if one.cpus and one.holder.api != KUBELET]
    hit = [one for one in some if pool is None or not pool.isdisjoint(one.cpus)]
    if not hit or not confines_all(kubelet):
        return ""
    why = f"kubelet's CPU manager is static ({known.policy_source}) and confines all containers itself" if known else ""
    why = why or f"cannot determine whether kubelet confines all containers itself: {kubelet.cpus_error}"
    cpus = union(one.cpus for one in hit)
    return f"CPUs {cpus} of {_holders(hit)} are not exclusive: {why}; set cpuManagerPolicy: none, or drain these pods"


def _holders(grants: Iterable[Grant]) -> str:
    return ", ".join(sorted({str(one.holder) for one in grants}))


def _cpus_managed(kubelet: Kubelet, inventory: Inventory, reserved: CpuSet) -> str:
    """Return why CPUs cannot be served alongside kubelet's CPU manager, or "" if they can."""
    known = kubelet.cpus
    if known is None:
        return _cpus_undetermined(kubelet)
    if not known.static:
        return ""
    advice = f"set cpuManagerPolicy: none{FIRST}"
    if known.managed is None:
        return f"kubelet's CPU manager is static ({known.policy_source}); {advice}"
    if inventory.cpus_online - known.managed:
        advice += ", or reservedCpus so that the two sets of CPUs have none in common"
    common = known.managed & (inventory.cpus_online - reserved)
    return f"kubelet's static CPU manager has CPUs {common} too ({known.policy_source}); {advice}" if common else ""


def _memory_managed(kubelet: Kubelet) -> str:
    """Return why hugepages and memory cannot be served alongside kubelet's memory manager, or "" if they can."""
    known = kubelet.memory
    if known is None:
        return _memory_undetermined(kubelet)
    if not known.static:
        return ""
    return (
        f"kubelet's memory manager is {known.policy} ({known.policy_source}): it gives from the same pools; set "
        f"memoryManagerPolicy: None{FIRST}"
    )


def _cpus_undetermined(kubelet: Kubelet) -> str:
    return f"cannot determine whether kubelet manages CPUs itself: {kubelet.cpus_error}"


def _memory_undetermined(kubelet: Kubelet) -> str:
    return f"cannot determine whether kubelet manages memory itself: {kubelet.memory_error}"


# ---------------------------------------------------------------- contradictions


def contradictions(kubelet: Kubelet, config: Config) -> Iterator[str]:
    """Yield where kubelet's configuration contradicts its managers' states or the agent's configuration; "" for
    none."""
    if kubelet.cpus is not None:
        yield kubelet.cpus.policy_conflict
        yield _reserved_otherwise(kubelet.cpus.reserved, kubelet.cpus.reserved_source, config)
    if kubelet.memory is not None:
        yield kubelet.memory.policy_conflict
    yield _cgroups_elsewhere(kubelet, config)
    yield _named_otherwise(kubelet, config)


def _reserved_otherwise(theirs: CpuSet, source: str, config: Config) -> str:
    ours = _configured(config.reserved_cpus) if config.reserved_cpus is not None else theirs
    if not theirs or ours == theirs:
        return ""
    said = f"kubelet reserves CPUs {theirs} ({source}), reservedCpus says {ours or 'none'}"
    return f"{said}: CPUs {theirs - ours} may be granted" if theirs - ours else said


def _cgroups_elsewhere(kubelet: Kubelet, config: Config) -> str:
    theirs, ours = str(kubelet.config.values.get(CGROUP_ROOT) or "/"), config.pinning.cgroup_root
    if theirs.strip("/") == ours.strip("/") or not kubelet.config.known:
        return ""
    place = kubelet.config.places.get(CGROUP_ROOT, "its default")
    return f"kubelet's cgroupRoot is {theirs} ({place}), pinning.cgroupRoot says {ours}: containers are not found there"


def _named_otherwise(kubelet: Kubelet, config: Config) -> str:
    theirs = kubelet.started.flags.last(HOSTNAME).strip().lower() if kubelet.started is not None else ""
    ours = node_name(config)
    if not theirs or theirs == ours or not config.served_by_dra:
        return ""
    return f"kubelet's node is {theirs} (--{HOSTNAME} of {kubelet.started}), the agent's {ours}: set dra.nodeName"
