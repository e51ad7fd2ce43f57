"""Which CPUs kubelet manages itself, read from its files: its configuration and its CPU manager's state.

A pure function of the files at one moment. An absent file says nothing; one that cannot be understood is an error.
Sources: kubelet.config.k8s.io/v1beta1 (cpuManagerPolicy, reservedSystemCPUs), kubelet's cpu_manager_state checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import yaml

from nodeagent.core.cpuset import EMPTY, CpuSet
from nodeagent.errors import InputError

STATIC, NONE = "static", "none"
STATE_FILE, CONFIG_FILE = "cpu_manager_state", "config.yaml"


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
        mask = self.shared.mask
        for cpus in self.assigned.values():
            mask |= cpus.mask
        return CpuSet.of_mask(mask) - self.reserved


class _Checkpoint(msgspec.Struct):
    policy: str = msgspec.field(name="policyName")
    default: str = msgspec.field(name="defaultCpuSet", default="")
    entries: dict[str, dict[str, str]] = {}


def read(kubelet_dir: Path) -> KubeletState:
    """Read kubelet's folder (/var/lib/kubelet); InputError names the file, the value and what is wrong with it."""
    config, checkpoint = _config(kubelet_dir / CONFIG_FILE), _checkpoint(kubelet_dir / STATE_FILE)
    policy, source = _policy(kubelet_dir, config, checkpoint)
    return KubeletState(
        policy=policy,
        policy_source=source,
        reserved=_cpus(_text(config, "reservedSystemCPUs", kubelet_dir / CONFIG_FILE), kubelet_dir / CONFIG_FILE),
        shared=_cpus(checkpoint.default, kubelet_dir / STATE_FILE) if checkpoint and checkpoint.default else None,
        assigned=_assigned(checkpoint, kubelet_dir / STATE_FILE),
    )


def _policy(kubelet_dir: Path, config: Mapping[str, Any], checkpoint: _Checkpoint | None) -> tuple[str, str]:
    said = [
        (_text(config, "cpuManagerPolicy", kubelet_dir / CONFIG_FILE), str(kubelet_dir / CONFIG_FILE)),
        (checkpoint.policy if checkpoint else "", str(kubelet_dir / STATE_FILE)),
    ]
    known = [one for one in said if one[0]]
    static = [one for one in known if one[0] == STATIC]
    return (static or known or [(NONE, "")])[0]


def _config(path: Path) -> Mapping[str, Any]:
    data = _bytes(path)
    if data is None:
        return {}
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"cannot read {path}: {type(found).__name__} at the top, expected a mapping")
    return found


def _checkpoint(path: Path) -> _Checkpoint | None:
    data = _bytes(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=_Checkpoint)
    except msgspec.MsgspecError as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _assigned(checkpoint: _Checkpoint | None, path: Path) -> Mapping[tuple[str, str], CpuSet]:
    entries = sorted(checkpoint.entries.items()) if checkpoint else []
    return MappingProxyType(
        {(pod, name): _cpus(text, path) for pod, containers in entries for name, text in sorted(containers.items())}
    )


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _text(config: Mapping[str, Any], key: str, path: Path) -> str:
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"cannot read {key} of {path}: {value!r}, expected a string")
    return value


def _cpus(text: str, path: Path) -> CpuSet:
    return CpuSet.parse(text, source=str(path)) if text else EMPTY
