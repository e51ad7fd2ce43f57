"""Which CPUs kubelet manages itself, read from its files: its configuration and its CPU manager's state.

A pure function of the files at one moment. An absent file says nothing; one that cannot be understood is an error.
Sources: kubelet.config.k8s.io/v1beta1 (cpuManagerPolicy, reservedSystemCPUs); kubelet's checkpoint cpu_manager_state:
by container id (its first form), by pod and container (second), with whole pods beside them (third), the same as text
under "data" (fourth).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.core.cpuset import EMPTY, CpuSet, union
from nodeagent.kube import kubelet_files

STATIC, NONE = "static", "none"
STATE_FILE = "cpu_manager_state"


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeletState:
    """What kubelet does with CPUs."""

    policy: str = NONE
    """cpuManagerPolicy. "static" where either file says so: kubelet refuses to start while they differ."""
    policy_source: str = ""
    """The file that says so; "" where none does."""
    reserved: CpuSet = EMPTY
    """reservedSystemCPUs."""
    shared: CpuSet | None = None
    """The static policy's default set, from which it takes exclusive CPUs; None where the file does not say."""
    assigned: Mapping[tuple[str, str], CpuSet] = field(default_factory=lambda: MappingProxyType({}))
    """Exclusive CPUs by pod UID and container name."""
    pods: Mapping[str, CpuSet] = field(default_factory=lambda: MappingProxyType({}))
    """Exclusive CPUs of whole pods, by UID; those of their containers are among them."""
    unnamed: Mapping[str, CpuSet] = field(default_factory=lambda: MappingProxyType({}))
    """Exclusive CPUs by container id, in the oldest form: it does not say of which pod."""

    @property
    def static(self) -> bool:
        return self.policy == STATIC

    @property
    def managed(self) -> CpuSet | None:
        """All CPUs that the static CPU manager gives away or may give away; None where that cannot be known (all)."""
        if not self.static:
            return EMPTY
        if self.shared is None:
            return None
        given = union((*self.assigned.values(), *self.pods.values(), *self.unnamed.values()))
        return (self.shared | given) - self.reserved


class _Pod(msgspec.Struct):
    cpus: str = msgspec.field(name="cpuSet", default="")


class _Checkpoint(msgspec.Struct):
    policy: str = msgspec.field(name="policyName")
    default: str = msgspec.field(name="defaultCpuSet", default="")
    entries: dict[str, str | dict[str, str]] = {}
    pods: dict[str, _Pod] = msgspec.field(name="podEntries", default_factory=dict)


def read(kubelet_dir: Path) -> KubeletState:
    """Read kubelet's folder (/var/lib/kubelet); InputError names the file, the value and what is wrong with it."""
    path, config_path = kubelet_dir / STATE_FILE, kubelet_dir / kubelet_files.CONFIG_FILE
    config, found = kubelet_files.config(kubelet_dir), kubelet_files.checkpoint(path, _Checkpoint)
    said = {
        config_path: kubelet_files.text(config, "cpuManagerPolicy", kubelet_dir),
        path: found.policy if found else "",
    }
    policy, source = kubelet_files.policy(said, STATIC, NONE)
    reserved = _cpus(kubelet_files.text(config, "reservedSystemCPUs", kubelet_dir), config_path)
    if found is None:
        return KubeletState(policy=policy, policy_source=source, reserved=reserved)
    return KubeletState(
        policy=policy,
        policy_source=source,
        reserved=reserved,
        shared=_cpus(found.default, path) if found.default else None,
        assigned=_assigned(found, path),
        pods=MappingProxyType({uid: _cpus(pod.cpus, path) for uid, pod in sorted(found.pods.items())}),
        unnamed=_unnamed(found, path),
    )


def _assigned(found: _Checkpoint, path: Path) -> Mapping[tuple[str, str], CpuSet]:
    pods = [(uid, containers) for uid, containers in sorted(found.entries.items()) if isinstance(containers, dict)]
    return MappingProxyType(
        {(uid, name): _cpus(text, path) for uid, containers in pods for name, text in sorted(containers.items())}
    )


def _unnamed(found: _Checkpoint, path: Path) -> Mapping[str, CpuSet]:
    entries = [(one, text) for one, text in sorted(found.entries.items()) if isinstance(text, str)]
    return MappingProxyType({container: _cpus(text, path) for container, text in entries})


def _cpus(text: str, path: Path) -> CpuSet:
    return CpuSet.parse(text, source=str(path)) if text else EMPTY
