"""Files, sockets and folders of the agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from nodeagent.core.sharing.mps import DAEMONS as MPS_DAEMONS
from nodeagent.daemon.leftovers.leftover import Host, Leftover, Line, kept_going
from nodeagent.daemon.paths import STATUS_SOCKET
from nodeagent.errors import HostError
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.kube.kubelet import device_plugin_sockets, plugin_sockets
from nodeagent.managers import state_files
from nodeagent.managers.deviceplugin.manager import PLUGINS
from nodeagent.managers.dra.manager import CLAIMS
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.network.device_info import left_files

STATE_FILES = (
    "ledger.*",
    "leader.lock",
    "interrupts.json",
    "hugepages.*",
    "health.*",
    "nvlinks.json",
    "gpu-faults.json",
    "published.json",
    "tuning.json",
    "resctrl.*",
    "io.json",
    "io.lock",
    "uclamp.*",
    "sharing.*",
    "partitions.*",
    "mig-modes.json",
    "amd-partitions.*",
    "passthrough.*",
    "vf-properties.*",
    "interfaces.*",
    "kinds.*",
    "fabrics.*",
    "dsa-queues.*",
    "device-info.json",
    "vfs.*",
    "*.json.damaged-*",
    ".*.tmp",
)
"""Names in the state folder."""


def cdi_files(host: Host) -> Leftover:
    """Return the CDI files of this driver."""
    dra = host.config.dra
    return _removed(CdiFolder(Path(dra.cdi_dir), dra.driver, host.where.sysfs).orphans(()))


def claim_files(host: Host) -> Leftover:
    """Return the files of claims."""
    folder = host.where.runtime_dir / CLAIMS
    claims = ClaimFiles(folder)
    paths = [claims.path(uid).parent for uid in sorted(claims.uids())]
    return _removed(paths, files.remove_folder)


def device_info(host: Host) -> Leftover:
    """Return the device information files of adapters."""
    memory = host.where.state_dir / state_files.DEVICE_INFO
    try:
        return _removed(left_files(memory))
    except HostError as error:
        return Leftover(notes=[str(error)])


def kubelet_sockets(host: Host) -> Leftover:
    """Return the sockets that no process serves: those of an agent that still runs are its own to remove."""
    folder, driver = host.where.kubelet_dir, host.config.dra.driver
    every = device_plugin_sockets.dead_sockets(folder / PLUGINS), plugin_sockets.dead_sockets(folder, driver)
    return _with_folder(folder / plugin_sockets.PLUGINS / driver, [path for some in every for path in some])


def runtime_folder(host: Host) -> Leftover:
    """Return what is the agent's in its folder of runtime files; the folder only if nothing else is in it."""
    folder = host.where.runtime_dir
    return _with_folder(
        folder, [path for path in (folder / STATUS_SOCKET, folder / CLAIMS, folder / MPS_DAEMONS) if path.exists()]
    )


def state_folder(host: Host) -> Leftover:
    """Return the ledger and what else is the agent's in its folder; the folder only if nothing else is in it. What is
    recorded of work queues that are not taken down stays: nothing else tells an admin, or the next agent, whose they
    are."""
    folder = host.where.state_dir
    kept = _queues_left(host)
    every = {path for name in STATE_FILES for path in folder.glob(name)} - {*kept}
    notes = [f"{path} stays as long as it records accelerators that are divided" for path in kept]
    return replace(_with_folder(folder, sorted(every)), notes=notes)


def _queues_left(host: Host) -> list[Path]:
    where = host.where
    journal = DsaJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    try:
        return [journal.path] if journal.read(certain=True) else []
    except HostError:  # it may have any
        return [journal.path]


def _with_folder(folder: Path, paths: Sequence[Path]) -> Leftover:
    """Return some files and the folder of the agent's that is removed with them, if nothing else is in it."""
    every = [*paths, *([folder] if folder.is_dir() and not {*folder.iterdir()} - {*paths} else ())]
    return _removed(every, _remove_one)


def _remove_one(path: Path) -> object:
    return files.remove_folder(path) if path.is_dir() else files.remove(path)


def _removed(paths: Sequence[Path], remove: Callable[[Path], object] = files.remove) -> Leftover:
    def undo() -> Iterator[str]:
        for path in paths:
            with kept_going() as errors:
                remove(path)
            yield from errors

    return Leftover([Line(str(path)) for path in paths], undo)
