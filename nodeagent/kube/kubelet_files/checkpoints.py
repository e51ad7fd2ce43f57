"""Kubelet's own files in its folder (/var/lib/kubelet): its checkpoints and the folders of its pods.

Read at one moment. A missing file is no evidence; one that cannot be parsed is an error that names its path. Source:
kubelet's checkpoint files.
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
_FNV_OFFSET, _FNV_PRIME = 0x811C9DC5, 0x01000193
"""http://www.isthe.com/chongo/tech/comp/fnv/index.html"""
T = TypeVar("T")
E = TypeVar("E")


class _Enveloped(msgspec.Struct):
    """Newer checkpoints carry the content as text in `data`, alongside fields for older kubelets, which do not count
    (Kubernetes 1.37: pkg/kubelet/cm, CPU manager 4, memory manager 3)."""

    data: str = ""
    checksum: int = msgspec.field(name="dataChecksum", default=0)

    @property
    def used(self) -> bool:
        """Return whether kubelet takes it for the newer form: it then never falls back to the other fields."""
        return bool(self.data or self.checksum)


class Policy(NamedTuple):
    """The policy of one of kubelet's managers."""

    name: str
    source: str
    """The file or flag that sets it, or "" if none does."""
    conflict: str
    """How configuration and checkpoint contradict each other, or "" if they agree."""


def checkpoint(path: Path, form: type[T]) -> T | None:
    """Return a checkpoint, or None if there is no file. Unknown fields are ignored. Raise InputError if it cannot be
    read, or if its text is not what was written: kubelet does not start with such a file either."""
    data = _content(path)
    if data is None:
        return None
    try:
        envelope = msgspec.json.decode(data, type=_Enveloped)
        if envelope.used and (actual := text_checksum(envelope.data)) != envelope.checksum:
            raise InputError(f"cannot read {path}: dataChecksum is {envelope.checksum}, that of its data {actual}")
        return msgspec.json.decode(envelope.data if envelope.used else data, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def text_checksum(text: str) -> int:
    """Return kubelet's checksum of a text: 32-bit FNV-1a of "(string)" and the text
    (k8s.io/kubernetes/pkg/kubelet/checkpointmanager/checksum, 1.37)."""
    found = _FNV_OFFSET
    for byte in f"(string){text}".encode():
        found = (found ^ byte) * _FNV_PRIME & 0xFFFFFFFF
    return found


def nested(path: Path, envelope: type[E], text_of: Callable[[E], str], form: type[T]) -> T | None:
    """Return a checkpoint whose content is text inside an envelope, or None if there is no file. Raise InputError if it
    cannot be read."""
    data = _content(path)
    if data is None:
        return None
    try:
        return msgspec.json.decode(text_of(msgspec.json.decode(data, type=envelope)), type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def policy(config: KubeletConfig, key: str, path: Path, checkpointed: str, *, managing: str, none: str) -> Policy:
    """Return the policy of a kubelet manager, from its configuration key and its checkpoint ("" without one).

    The managing policy wins if either names it: kubelet refuses to start while they differ, and a running kubelet uses
    the configuration it was started with. `managing` and `none` are the names of the two policies.
    """
    configured, place = config.text(key), config.places.get(key, "")
    said = [one for one in ((configured, place), (checkpointed, str(path))) if one[0]]
    name, source = next((one for one in said if one[0] == managing), (said or [(none, "")])[0])
    differ = len({policy for policy, _ in said}) > 1
    conflict = f"{key} is {configured} ({place}) and {checkpointed} in {path}: kubelet refuses to start with both"
    return Policy(name, source, conflict if differ else "")


def pods_there(kubelet_dir: Path) -> frozenset[str]:
    """Return the UIDs of the pods that have a folder. Raise InputError if they cannot be listed.

    Kubelet creates the folder before a pod's first container and removes it when the pod is gone for good.
    """
    path = kubelet_dir / PODS
    try:
        return frozenset(one.name for one in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _content(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is none or only an old copy is visible (see mounted_file): kubelet
    rewrites its checkpoints all the time."""
    try:
        return mountedfile.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise InputError(f"cannot read {path}: {error.strerror}") from None
