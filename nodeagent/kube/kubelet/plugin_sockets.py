"""Sockets of an instance of the DRA driver, and those that other instances left behind or serve.

Each instance has its own two sockets, named after its pod, so two can be registered during a rolling upgrade. Sockets
served by another instance are never touched; only a socket that the kernel reports as having no listener is removed.

The registration socket has further names, for further attempts: kubelet counts failures by the path, waits up to two
minutes before it tries the same one again, and does not notice that it was re-created (goroutinemap in
pkg/util/goroutinemap, used by pkg/kubelet/pluginmanager/operationexecutor of 1.37).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from nodeagent.kube.kubelet import sockets

REGISTRY, PLUGINS = "plugins_registry", "plugins"
"""In kubelet's folder."""

_UID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_HASH = r"[0-9a-f]{12}"
_INSTANCE = rf"(?:-(?:{_UID}|{_HASH}))?"


FURTHER_NAMES = 7
"""With the pauses between attempts, the first name is used again after about two minutes."""


class PluginSockets(msgspec.Struct, frozen=True, kw_only=True):
    """The two sockets of one instance of a driver."""

    registration: Path
    service: Path
    further: tuple[Path, ...] = ()
    """Further names of the registration socket, one of which it has after an attempt that failed."""

    def registration_of(self, attempt: int) -> Path:
        """Return the registration socket of an attempt, counted from 0."""
        names = (self.registration, *self.further)
        return names[attempt % len(names)]


def plugin_sockets(kubelet_dir: Path, driver: str, pod_uid: str = "") -> PluginSockets:
    """Return the socket paths of an instance. Raise ConfigError if kubelet's folder is too deep.

    `pod_uid` is given if the instance runs in a pod. Name parts that would make a path too long for a socket are
    hashed, and so is a `pod_uid` that is not a UUID: the names alone then distinguish the sockets from those of a
    driver with a longer name.
    """
    instance = pod_uid if not pod_uid or re.fullmatch(_UID, pod_uid) else _hash(pod_uid)
    short = _hash(pod_uid) if pod_uid else ""
    every = [(driver, instance), (driver, short), (_hash(driver), short)]
    registry, plugins = kubelet_dir / REGISTRY, kubelet_dir / PLUGINS
    further = (_hash(f"{driver} {pod_uid} {number}") for number in range(FURTHER_NAMES))
    return PluginSockets(
        registration=_first_that_fits([registry / f"{_joined(name, one)}-reg.sock" for name, one in every]),
        service=_first_that_fits([plugins / name / f"{_joined('dra', one)}.sock" for name, one in every]),
        further=tuple(
            _first_that_fits([registry / f"{_joined(name, one)}-reg.sock" for name in (driver, _hash(driver))])
            for one in further
        ),
    )


def _joined(name: str, instance: str) -> str:
    return f"{name}-{instance}" if instance else name


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _first_that_fits(paths: Sequence[Path]) -> Path:
    for path in paths:
        if len(os.fsencode(path)) <= sockets.LONGEST_PATH_BYTES:
            return path
    return sockets.checked(paths[-1])


# ---------------------------------------------------------------- other instances of the same driver


def remove_stale(kubelet_dir: Path, driver: str, mine: PluginSockets) -> list[Path]:
    """Remove the sockets of dead instances and return their paths. Sockets that a process serves are left alone."""
    removed = []
    for path in dead_sockets(kubelet_dir, driver, mine):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed


def dead_sockets(kubelet_dir: Path, driver: str, mine: PluginSockets | None = None) -> list[Path]:
    """Return the sockets of dead instances, except the two that `mine` begins with and takes over."""
    kept = (mine.registration, mine.service) if mine else ()
    every = (*_registrations(kubelet_dir, driver, kept), *_services(kubelet_dir, driver, kept))
    return [path for path in every if sockets.is_dead(path)]


def other_instance_serves(kubelet_dir: Path, driver: str, mine: PluginSockets) -> bool:
    """Return whether another instance is offering itself to kubelet now."""
    others = _registrations(kubelet_dir, driver, (mine.registration, *mine.further))
    return any(sockets.is_served(path) for path in others)


def _registrations(kubelet_dir: Path, driver: str, mine: Collection[Path]) -> Iterator[Path]:
    pattern = re.compile(rf"(?:{re.escape(driver)}|{_hash(driver)}){_INSTANCE}-reg\.sock")
    yield from _matching(kubelet_dir / REGISTRY, pattern, mine)


def _services(kubelet_dir: Path, driver: str, mine: Collection[Path]) -> Iterator[Path]:
    pattern = re.compile(rf"dra{_INSTANCE}\.sock")
    for folder in (driver, _hash(driver)):
        yield from _matching(kubelet_dir / PLUGINS / folder, pattern, mine)


def _matching(folder: Path, pattern: re.Pattern[str], mine: Collection[Path]) -> Iterator[Path]:
    """Yield the paths in a folder whose names match, except `mine`, in order of their names."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(folder.iterdir()):
            if pattern.fullmatch(path.name) and path not in mine:
                yield path
