"""Kubelet's own files below its folder (/var/lib/kubelet): its configuration, its checkpoints, the folders of its pods.

Read at one moment. An absent file says nothing; one that cannot be understood is an error with its place.
Sources: kubelet.config.k8s.io/v1beta1, kubelet's checkpoint files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from nodeagent.errors import InputError

CONFIG_FILE, PODS = "config.yaml", "pods"
T = TypeVar("T")
E = TypeVar("E")


class _Enveloped(msgspec.Struct):
    """Newer checkpoints carry what counts as text; what older kubelets read stands beside it."""

    data: str = ""


def config(kubelet_dir: Path) -> Mapping[str, Any]:
    """Kubelet's configuration; nothing where there is no file."""
    path = kubelet_dir / CONFIG_FILE
    data = _content(path)
    if data is None:
        return {}
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"cannot read {path}: {type(found).__name__} at the top, expected a mapping")
    return found


def text(found: Mapping[str, Any], key: str, kubelet_dir: Path) -> str:
    """The value of a key of the configuration; "" where it is not there."""
    value = found.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"cannot read {key} of {kubelet_dir / CONFIG_FILE}: {value!r}, expected a string")
    return value


def checkpoint(path: Path, form: type[T]) -> T | None:
    """A checkpoint; None where there is no file. Fields that this build does not know are passed over."""
    data = _content(path)
    if data is None:
        return None
    try:
        inner = msgspec.json.decode(data, type=_Enveloped).data
        return msgspec.json.decode(inner or data, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def nested(path: Path, envelope: type[E], text_of: Callable[[E], str], form: type[T]) -> T | None:
    """A checkpoint whose content stands as text in an envelope; None where there is no file. InputError."""
    data = _content(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(text_of(msgspec.json.decode(data, type=envelope)), type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def policy(said: Mapping[Path, str], managing: str, none: str) -> tuple[str, str]:
    """(policy, the file that says so) of what each file says: the one that manages, where any does, for kubelet refuses
    to start while they differ; (none, "") where no file says anything."""
    known = [(value, str(path)) for path, value in said.items() if value]
    first = [one for one in known if one[0] == managing]
    return (first or known or [(none, "")])[0]


def pods_there(kubelet_dir: Path) -> frozenset[str]:
    """UIDs of the pods that have a folder: kubelet makes it before a pod's first container and removes it when the pod
    is gone for good. InputError where that cannot be known."""
    path = kubelet_dir / PODS
    try:
        return frozenset(one.name for one in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
