"""Kubelet's effective configuration: its defaults, then the --config file, then the drop-ins of --config-dir in
kubelet's order, then its flags.

A drop-in is a JSON merge patch (RFC 7386): mappings are merged key by key, everything else is replaced, and null resets
a key to its default. Only the defaults in DEFAULTS are filled in; any other key that nothing sets is absent. Source:
cmd/kubelet/app/server.go of Kubernetes 1.33 to 1.37, and what kubelet 1.37 logs as its effective configuration.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import yaml

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import mounted_file as mountedfile
from nodeagent.kube.kubelet_files.flags import KEYS, Flags

API_VERSION, KIND = "kubelet.config.k8s.io/v1beta1", "KubeletConfiguration"
SUFFIX = ".conf"
NO_FLAGS = Flags()
DEFAULT_PLACE = "kubelet's defaults"
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "cpuManagerPolicy": "none",
        "memoryManagerPolicy": "None",
        "topologyManagerPolicy": "none",
        "topologyManagerScope": "container",
        "cgroupDriver": "cgroupfs",
    }
)


class Layer(NamedTuple):
    """One file of the configuration."""

    place: str
    """Its path."""
    document: Mapping[str, Any]


class KubeletConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Kubelet's effective configuration."""

    values: Mapping[str, Any] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    places: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """The file or flag that set each key last."""
    sources: tuple[str, ...] = ()
    """The files read, in order, followed by the flags that set a key."""

    @property
    def known(self) -> bool:
        """Return whether anything is known of kubelet's configuration. If not, even its defaults cannot be assumed."""
        return bool(self.values)

    def text(self, key: str) -> str:
        """Return a value, or "" if nothing sets it. Raise InputError if it is not a string."""
        value = self.values.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise InputError(f"cannot read {key} of {self.places[key]}: {value!r}, expected a string")
        return value

    def cpus(self, key: str) -> CpuSet:
        """Return a CPU list, empty if nothing sets it. Raise InputError if it cannot be parsed."""
        text = self.text(key)
        return CpuSet.parse(text, source=f"{key} of {self.places[key]}") if text else EMPTY


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with a JSON merge patch applied. Pure; neither argument is modified."""
    after = dict(base)
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        elif isinstance(value, Mapping):
            before = after.get(key)
            after[key] = merge(before if isinstance(before, Mapping) else {}, value)
        else:
            after[key] = value
    return after


def effective(base: Layer | None, drop_ins: Iterable[Layer], flags: Flags = NO_FLAGS, whose: str = "") -> KubeletConfig:
    """Combine files and flags into a configuration. Pure.

    `whose` names the process whose command line the flags are from, or is "" if none is known. Raise InputError naming
    flag and value if kubelet would reject it.
    """
    files = [*([Layer(base.place, _in_file(base.document))] if base else []), *drop_ins]
    values, places = dict(DEFAULTS), dict.fromkeys(DEFAULTS, DEFAULT_PLACE)
    for place, patch in files:
        values = merge(values, patch)
        places |= dict.fromkeys(patch, place)
    values, places = _spelled(values, places)
    values |= {key: value for key, value in DEFAULTS.items() if values.get(key) in (None, "")}
    sources = [place for place, _ in files]
    for flag, key, value in flags.over(values, whose):
        values[key], places[key] = value, f"--{flag} of {whose}"
        sources.append(f"--{flag}")
    return KubeletConfig(
        values=MappingProxyType(values if files or whose else {}),
        places=MappingProxyType(dict.fromkeys(DEFAULTS, DEFAULT_PLACE) | places),
        sources=tuple(dict.fromkeys(sources)),
    )


def read(file: str, folder: str, flags: Flags = NO_FLAGS, whose: str = "") -> KubeletConfig:
    """Read a configuration.

    `file` is the path given by --config and `folder` the one given by --config-dir, each "" if there is none. Raise
    InputError naming the file if one is missing, unreadable, or would be rejected by kubelet.
    """
    base = Layer(file, _document(file)) if file else None
    return effective(base, (_drop_in(path) for path in drop_ins(folder)) if folder else (), flags, whose)


def drop_ins(folder: str) -> Iterator[str]:
    """Yield the drop-ins in a folder in the order in which kubelet reads them.

    Entries are sorted by the bytes of their names, and a subfolder's files come in its place. Symlinks to folders are
    not followed, including `folder` itself. Raise InputError if it is missing or unreadable.
    """
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            yield from [folder] if folder.endswith(SUFFIX) else []
            return
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda one: os.fsencode(one.name))
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from drop_ins(entry.path)
            elif entry.name.endswith(SUFFIX):
                yield entry.path
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None


def _drop_in(path: str) -> Layer:
    document = _document(path)
    is_, expected = (document.get("apiVersion"), document.get("kind")), (API_VERSION, KIND)
    if is_ != expected:
        raise InputError(f"cannot use {path}: it is {is_[0]} {is_[1]}, expected {API_VERSION} {KIND}")
    return Layer(path, document)


def _document(path: str) -> Mapping[str, Any]:
    """Return the first document of a file, as kubelet does."""
    try:
        found = next(iter(yaml.safe_load_all(mountedfile.read(Path(path)))), None)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"cannot read {path}: {type(found).__name__} at the top, expected a mapping")
    return found


# ---------------------------------------------------------------- spelling

_SPELLED = {key.lower(): key for key in KEYS}


def _right(key: str) -> str:
    return _SPELLED.get(key.lower(), key)


def _in_file(document: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the effective keys of the --config file: kubelet ignores keys there whose case does not match. An empty
    value means the default."""
    right = {key: value for key, value in document.items() if isinstance(key, str) and _right(key) == key}
    return {key: value for key, value in right.items() if value not in (None, "", [], {})}


def _spelled(values: Mapping[str, Any], places: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values and places under canonical keys. Drop-ins are case-insensitive: of several spellings the last in
    byte order wins, and mappings are merged."""
    found: dict[str, Any] = {}
    whence: dict[str, str] = {}
    for key in sorted((key for key in values if isinstance(key, str)), key=str.encode):
        name = _right(key)
        found[name], whence[name] = _together(found.get(name), values[key]), places[key]
    return found, whence


def _together(before: Any, value: Any) -> Any:
    return {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
