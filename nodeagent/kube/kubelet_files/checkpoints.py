"""Kubelet's own files below its folder (/var/lib/kubelet): its checkpoints, the folders of its pods.

Read at one moment. An absent file says nothing; one that cannot be understood is an error with its place.
Source: kubelet's checkpoint files.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import mounted_file as mountedfile
from nodeagent.kube.kubelet_files.config import KubeletConfig

PODS = "pods"
T = TypeVar("T")
E = TypeVar("E")


class _Enveloped(msgspec.Struct):
    """Newer checkpoints carry what counts as text; what older kubelets read stands beside it."""

    data: str = ""


class Policy(NamedTuple):
    """The policy of one of kubelet's managers."""

    name: str
    source: str
    """Which file or flag says so; "" where none does."""
    conflict: str
    """How configuration and checkpoint contradict each other; "" where they do not."""


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


def policy(config: KubeletConfig, key: str, path: Path, checkpointed: str, *, managing: str, none: str) -> Policy:
    """What a manager does, by its key of the configuration and by its checkpoint ("" where there is none).

    The one that manages, where either says so: kubelet refuses to start while they differ, and one that runs goes by
    the configuration that it was started with. managing, none: the names of the two policies.
    """
    configured, place = config.text(key), config.places.get(key, "")
    said = [one for one in ((configured, place), (checkpointed, str(path))) if one[0]]
    name, source = next((one for one in said if one[0] == managing), (said or [(none, "")])[0])
    differ = len({policy for policy, _ in said}) > 1
    conflict = f"{key} is {configured} ({place}) and {checkpointed} in {path}: kubelet refuses to start with both"
    return Policy(name, source, conflict if differ else "")


def pods_there(kubelet_dir: Path) -> frozenset[str]:
    """UIDs of the pods that have a folder: kubelet makes it before a pod's first container and removes it when the pod
    is gone for good. InputError where that cannot be known."""
    path = kubelet_dir / PODS
    try:
        return frozenset(one.name for one in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _content(path: Path) -> bytes | None:
    """None also where what is seen is an old file (mountedfile): kubelet writes its checkpoints anew all the time."""
    try:
        return mountedfile.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise InputError(f"cannot read {path}: {error.strerror}") from None
