"""This node's kubelet at one moment: how it was started, how it is configured, what its managers have assigned.

Its command line says where its configuration is, and is part of it. If no command line is visible (from a container in
its own PID namespace, or for a kubelet embedded in another program), the usual locations are assumed, and `unseen` says
so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from nodeagent.config.operation import KubeletConfigConfig
from nodeagent.errors import HostError, InputError
from nodeagent.host import processes
from nodeagent.host.processes import Process
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet_files import config as kubelet_config
from nodeagent.kube.kubelet_files import cpu_state as kubelet_state
from nodeagent.kube.kubelet_files import flags as kubelet_flags
from nodeagent.kube.kubelet_files import memory_state
from nodeagent.kube.kubelet_files.config import KubeletConfig
from nodeagent.kube.kubelet_files.cpu_state import KubeletState
from nodeagent.kube.kubelet_files.flags import CONFIG, CONFIG_DIR, ROOT_DIR, Flags
from nodeagent.kube.kubelet_files.memory_state import MemoryState

T = TypeVar("T")
ROOT = "/var/lib/kubelet"
"""Kubelet's default --root-dir."""
CONFIG_FILE, DROP_INS = "config.yaml", "etc/kubernetes/kubelet.conf.d"
"""Where kubeadm puts the --config file, in kubelet's folder; the --config-dir folder in the Kubernetes documentation.
Kubelet itself reads neither unless a flag names it."""
SOCKET = "device-plugins/kubelet.sock"
NAMES = ("kubel", "hyperkube", "k3s")
"""Parts of the process names (comm) of kubelets and of the programs below."""
EMBEDDING = {"kubelite": (), "k3s": ("server", "agent"), "k3s-server": (), "k3s-agent": ()}
"""Programs that embed a kubelet, with the subcommands that start it; none if every invocation does."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A kubelet's process."""

    pid: int
    flags: Flags
    folder: str
    """Its working directory, or "" if it cannot be read."""

    def __str__(self) -> str:
        return f"kubelet (process {self.pid})"


class Kubelet(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about this node's kubelet."""

    started: Started | None = None
    """None if its command line is not visible."""
    unseen: str = ""
    """Why its command line is not visible and what is assumed; "" if it is visible or there is no kubelet."""
    config: KubeletConfig = msgspec.field(default_factory=KubeletConfig)
    cpus: KubeletState | None = None
    """None if unknown; `cpus_error` says why."""
    cpus_error: str = ""
    memory: MemoryState | None = None
    memory_error: str = ""


def look(
    sysfs: SysFs, kubelet_dir: Path, named: KubeletConfigConfig | None = None, before: Started | None = None
) -> Kubelet:
    """Inspect the kubelet whose folder this is (/var/lib/kubelet). Blocks for some milliseconds; raises nothing.

    `named` gives the location of its configuration, overriding its command line. `before` is how it was started when it
    was last seen, and is used while none is found.
    """
    named = named or KubeletConfigConfig()
    known = Kubelet(started=before)
    try:
        started, unseen = _find(sysfs, kubelet_dir)
        known = Kubelet(started=started or before)
        config = _config(sysfs, kubelet_dir, named, known.started)
    except (InputError, HostError) as error:
        return replace(known, cpus_error=str(error), memory_error=str(error))
    acknowledged = known.started is not None or named.file or named.drop_ins
    unseen = f"{unseen}: {_assumed(config)}" if unseen and not acknowledged else ""
    return _with_states(replace(known, unseen=unseen, config=config), kubelet_dir)


def configuration_files(sysfs: SysFs, kubelet_dir: Path, named: KubeletConfigConfig | None = None) -> list[str]:
    """Return the full paths of the files with kubelet's configuration, in the order in which they count, and of the
    folder of drop-ins, as far as they can be found. The parameters are those of `look`."""
    found: list[str] = []
    with contextlib.suppress(InputError, HostError):
        started, _ = _find(sysfs, kubelet_dir)
        file, folder = _files(sysfs, kubelet_dir, named or KubeletConfigConfig(), started)
        found += [file] if file else []
        found += [folder, *kubelet_config.drop_ins(folder)] if folder else []
    return found


def _config(sysfs: SysFs, kubelet_dir: Path, named: KubeletConfigConfig, started: Started | None) -> KubeletConfig:
    file, folder = _files(sysfs, kubelet_dir, named, started)
    if started is None:
        return kubelet_config.read(file, folder)
    return kubelet_config.read(file, folder, started.flags, str(started))


def _with_states(known: Kubelet, kubelet_dir: Path) -> Kubelet:
    cpus, cpus_error = _tried(lambda: kubelet_state.read(kubelet_dir, known.config))
    memory, memory_error = _tried(lambda: memory_state.read(kubelet_dir, known.config))
    return replace(known, cpus=cpus, cpus_error=cpus_error, memory=memory, memory_error=memory_error)


def _tried(read: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return read(), ""
    except InputError as error:
        return None, str(error)


def _assumed(config: KubeletConfig) -> str:
    read = (
        f"its configuration is taken from {', '.join(config.sources)}" if config.sources else "its defaults are assumed"
    )
    return f"{read}; kubeletConfig names where it lies"


# ---------------------------------------------------------------- the process


def _find(sysfs: SysFs, kubelet_dir: Path) -> tuple[Started | None, str]:
    """Return (this node's kubelet, why it is not visible).

    It is the process listening on the socket in this folder, or else the one whose root folder this is. Raise
    InputError if several qualify.
    """
    there = processes.running(sysfs, lambda name: any(one in name for one in NAMES))
    kubelets = [*_kubelets(there)]
    listening = sockets.listener(kubelet_dir / SOCKET) if sysfs.root == "/" else None
    mine = [one for one in kubelets if one.pid == listening]
    mine = mine or [one for one in kubelets if _has_folder(sysfs, one, kubelet_dir)]
    if len(mine) > 1:
        pids = " and ".join(str(one.pid) for one in mine)
        raise InputError(
            f"cannot determine which kubelet is this node's: processes {pids} both have folder {kubelet_dir}"
        )
    return (mine[0], "") if mine else (None, _unseen(sysfs, there, kubelets, kubelet_dir))


def _kubelets(there: Iterable[Process]) -> Iterator[Started]:
    """Yield the kubelets that run pods. A child that kubelet has just forked briefly shows the same command line."""
    known = {one.pid: words for one in there if (words := _words(one)) is not None}
    for one in (one for one in there if one.pid in known and one.parent not in known):
        flags = kubelet_flags.parse(known[one.pid], f"kubelet (process {one.pid})")
        if not flags.ends_at_once:
            yield Started(pid=one.pid, flags=flags, folder=one.folder)


def _words(process: Process) -> tuple[str, ...] | None:
    """Return a kubelet's arguments without the program name, or None if the process is not a kubelet."""
    name, rest = os.path.basename(process.words[0]), process.words[1:]  # noqa: PTH119
    if name == "hyperkube" and rest[:1] == ("kubelet",):
        return rest[1:]
    return rest if name == "kubelet" else None


def _has_folder(sysfs: SysFs, started: Started, kubelet_dir: Path) -> bool:
    root = _resolved(sysfs, started, ROOT_DIR) or sysfs.path(ROOT.lstrip("/"))
    return os.path.realpath(root) == os.path.realpath(kubelet_dir)


def _unseen(sysfs: SysFs, there: Iterable[Process], others: Iterable[Started], kubelet_dir: Path) -> str:
    if embedding := next((found for one in there if (found := _embedding(one))), ""):
        return f"kubelet runs inside {embedding} and its command line shows no flags"
    if other := next(iter(others), None):
        return f"{other} has folder {other.flags.last(ROOT_DIR) or ROOT}, not {kubelet_dir}, and is not looked at"
    if not processes.sees_all(sysfs):
        return "kubelet's command line cannot be seen from this PID namespace (hostPID: true shows it)"
    return ""


def _embedding(process: Process) -> str:
    """Return name and PID of a program that embeds a kubelet, or "". Some set a process title of several words."""
    words = [*process.words[0].split(), *process.words[1:]]
    name = os.path.basename(words[0]) if words else ""  # noqa: PTH119
    subcommands = EMBEDDING.get(name)
    if subcommands is None or (subcommands and words[1:2] not in [[one] for one in subcommands]):
        return ""
    return f"{name} (process {process.pid})"


# ---------------------------------------------------------------- the files


def _files(sysfs: SysFs, kubelet_dir: Path, named: KubeletConfigConfig, started: Started | None) -> tuple[str, str]:
    """Return (the --config file, the --config-dir folder), each "" if there is none."""
    if started is not None:
        return (
            named.file or _resolved(sysfs, started, CONFIG),
            named.drop_ins or _resolved(sysfs, started, CONFIG_DIR),
        )
    usual = str(kubelet_dir / CONFIG_FILE), sysfs.path(DROP_INS)
    return named.file or _if_there(usual[0]), named.drop_ins or _if_there(usual[1])


def _resolved(sysfs: SysFs, started: Started, flag: str) -> str:
    """Return the path that a flag gives, relative to kubelet's working directory, or "" if the flag is not given."""
    given = started.flags.last(flag)
    if not given:
        return ""
    if not given.startswith("/") and not started.folder:
        raise InputError(
            f"cannot find --{flag} of {started}: {given!r} is relative, and its working directory cannot be read; "
            "kubeletConfig names where kubelet's configuration lies"
        )
    # A trailing slash matters: with it a symlink to a folder is followed.
    path = os.path.join(started.folder, given)  # noqa: PTH118
    if sysfs.root != "/" and ".." in path.split("/"):  # a captured command line leads nowhere out of its tree
        path = os.path.normpath(f"/{path}")
    return sysfs.path(path.lstrip("/"))


def _if_there(path: str) -> str:
    """Return the path, or "" if nothing exists there. A path that cannot be inspected counts as existing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError:
        return path
    return path
