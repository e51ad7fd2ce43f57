"""The claims that kubelet has prepared, as recorded by its DRA manager on disk: dra_manager_state in kubelet's folder.

Kubelet adds a claim before it calls NodePrepareResources and removes it after NodeUnprepareResources. Source:
k8s.io/kubernetes pkg/kubelet/cm/dra/state, 1.34 to 1.37 (checkpoint.dra.kubelet.k8s.io/v1).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.model.claim import ClaimRef
from nodeagent.kube.kubelet_files import checkpoints as kubelet_files

STATE_FILE = "dra_manager_state"


class _Claim(msgspec.Struct):
    uid: str = msgspec.field(name="ClaimUID")
    name: str = msgspec.field(name="ClaimName")
    namespace: str = msgspec.field(name="Namespace")
    pods: dict[str, Any] | None = msgspec.field(name="PodUIDs", default=None)
    drivers: dict[str, Any] | None = msgspec.field(name="DriverState", default=None)


class _State(msgspec.Struct):
    claims: list[_Claim] | None = msgspec.field(name="ClaimInfoStateList", default=None)


class _File(msgspec.Struct):
    data: str = msgspec.field(name="Data")


def prepared(kubelet_dir: Path, driver: str) -> Mapping[str, ClaimRef] | None:
    """Return, by UID, the claims that kubelet has prepared or is preparing with a driver, or None without a file.

    Raise InputError if the file cannot be read.
    """
    found = _claims(kubelet_dir)
    if found is None:
        return None
    mine = [one for one in found if driver in (one.drivers or {})]
    return MappingProxyType({one.uid: ClaimRef(namespace=one.namespace, name=one.name, uid=one.uid) for one in mine})


def pods_of(kubelet_dir: Path, uid: str) -> frozenset[str]:
    """Return the UIDs of the pods for which kubelet has prepared a claim, or is preparing it; none without a file.

    Raise InputError if the file cannot be read.
    """
    return frozenset(pod for one in _claims(kubelet_dir) or [] if one.uid == uid for pod in one.pods or {})


def _claims(kubelet_dir: Path) -> list[_Claim] | None:
    found = kubelet_files.nested(kubelet_dir / STATE_FILE, _File, lambda file: file.data, _State)
    return (found.claims or []) if found is not None else None
