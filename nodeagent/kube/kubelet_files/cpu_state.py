"""Which CPUs kubelet manages itself, from its configuration and its CPU manager's state.

A function of configuration and state at one moment. A missing file is no evidence; one that cannot be parsed is an
error. Sources: kubelet.config.k8s.io/v1beta1 (cpuManagerPolicy, reservedSystemCPUs); kubelet's checkpoint
cpu_manager_state: by container id (its first form), by pod and container (second), with whole pods in addition (third),
the same and what containers had when they were admitted as text under "data" (fourth, Kubernetes 1.37).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.kube.kubelet_files import checkpoints as kubelet_files
from nodeagent.kube.kubelet_files.config import KubeletConfig

STATIC, NONE = "static", "none"
STATE_FILE = "cpu_manager_state"
POLICY, RESERVED = "cpuManagerPolicy", "reservedSystemCPUs"
"""Configuration keys."""


class KubeletState(msgspec.Struct, frozen=True, kw_only=True):
    """How kubelet manages CPUs."""

    policy: str = NONE
    """cpuManagerPolicy; "static" if either configuration or state says so, because kubelet refuses to start while they
    differ."""
    policy_source: str = ""
    """The file or flag that sets it, or "" if none does."""
    policy_conflict: str = ""
    """How configuration and state contradict each other, or "" if they agree."""
    reserved: CpuSet = EMPTY
    """reservedSystemCPUs."""
    reserved_source: str = ""
    """The file or flag that sets it."""
    shared: CpuSet | None = None
    """The default set of the static policy, from which it takes exclusive CPUs, or None if the file does not name
    it."""
    assigned: Mapping[tuple[str, str], CpuSet] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Exclusive CPUs by pod UID and container name."""
    pods: Mapping[str, CpuSet] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Exclusive CPUs of whole pods, by UID; they include those of their containers."""
    unnamed: Mapping[str, CpuSet] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Exclusive CPUs by container id, from the oldest form, which does not name the pod."""

    @property
    def static(self) -> bool:
        """Return whether kubelet's CPU manager policy is static."""
        return self.policy == STATIC

    @property
    def confined(self) -> CpuSet | None:
        """Return all CPUs that the static CPU manager lets containers run on, shared or exclusive, or None if unknown
        (treat as all)."""
        if not self.static:
            return EMPTY
        if self.shared is None:
            return None
        return union((self.shared, *self.assigned.values(), *self.pods.values(), *self.unnamed.values()))

    @property
    def managed(self) -> CpuSet | None:
        """Return all CPUs that the static CPU manager assigns or may assign, or None if unknown (treat as all)."""
        return None if self.confined is None else self.confined - self.reserved


class _Pod(msgspec.Struct):
    cpus: str = msgspec.field(name="cpuSet", default="")


class _Baseline(msgspec.Struct):
    cpus: str = msgspec.field(name="baseline")


class _Checkpoint(msgspec.Struct):
    policy: str = msgspec.field(name="policyName")
    default: str = msgspec.field(name="defaultCpuSet", default="")
    entries: dict[str, str | dict[str, str]] = {}
    pods: dict[str, _Pod] = msgspec.field(name="podEntries", default_factory=dict)
    baselines: dict[str, dict[str, _Baseline]] = {}
    """The CPUs at admission, before any resize. A container runs on its entry, and kubelet never takes these from it
    (InPlacePodVerticalScalingExclusiveCPUs)."""


def read(kubelet_dir: Path, config: KubeletConfig) -> KubeletState:
    """Read the state from kubelet's folder (/var/lib/kubelet). Raise InputError with the file or flag, the value and
    the fault."""
    path = kubelet_dir / STATE_FILE
    found = kubelet_files.checkpoint(path, _Checkpoint)
    policy = kubelet_files.policy(config, POLICY, path, found.policy if found else "", managing=STATIC, none=NONE)
    known = KubeletState(
        policy=policy.name,
        policy_source=policy.source,
        policy_conflict=policy.conflict,
        reserved=config.cpus(RESERVED),
        reserved_source=config.places.get(RESERVED, ""),
    )
    if found is None:
        return known
    return replace(
        known,
        shared=_cpus(found.default, path) if found.default else None,
        assigned=_assigned(found, path),
        pods=MappingProxyType({uid: _cpus(pod.cpus, path) for uid, pod in sorted(found.pods.items())}),
        unnamed=_unnamed(found, path),
    )


def _assigned(found: _Checkpoint, path: Path) -> Mapping[tuple[str, str], CpuSet]:
    """Return the CPUs that containers have, or were promised when they were admitted."""
    pods = [(uid, containers) for uid, containers in sorted(found.entries.items()) if isinstance(containers, dict)]
    return MappingProxyType(
        {
            (uid, name): _cpus(text, path) | _promised(found, uid, name, path)
            for uid, containers in pods
            for name, text in sorted(containers.items())
        }
    )


def _promised(found: _Checkpoint, uid: str, container: str, path: Path) -> CpuSet:
    one = found.baselines.get(uid, {}).get(container)
    return _cpus(one.cpus, path) if one is not None else EMPTY


def _unnamed(found: _Checkpoint, path: Path) -> Mapping[str, CpuSet]:
    entries = [(one, text) for one, text in sorted(found.entries.items()) if isinstance(text, str)]
    return MappingProxyType({container: _cpus(text, path) for container, text in entries})


def _cpus(text: str, path: Path) -> CpuSet:
    return CpuSet.parse(text, source=str(path)) if text else EMPTY
