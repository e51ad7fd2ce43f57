"""Which processes use a GPU of AMD: through KFD, and through its DRM nodes.

Source: drivers/gpu/drm/amd/amdkfd/kfd_process.c and kfd_device.c (kgd2kfd_check_and_lock_kfd). KFD shows each process
that has /dev/kfd open as a folder named after its pid, with one file vram_GPUID for each GPU that its device cgroup
lets it use, and one folder context_N for each further context. Older kernels change no partition while there is any
such process. What has a DRM node open keeps no partition from changing, but would lose what it works on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from nodeagent.errors import HostError
from nodeagent.host.devices.kfd import properties
from nodeagent.host.processes import sees_all
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

_KFD = "sys/class/kfd/kfd"
_SHOWN_AT_MOST = 5


def users(sysfs: SysFs, address: str, nodes: Collection[str]) -> str:
    """Return which processes use a GPU, in words, or "" if none does; blocks.

    nodes: paths of its DRM nodes. Raise HostError if it cannot be known, as without CAP_SYS_PTRACE and
    CAP_DAC_READ_SEARCH.
    """
    if kfd := _kfd_users(sysfs, address):
        return f"in use through KFD by {_named(kfd)}"
    if opened := sorted(_openers(sysfs, frozenset(nodes))):
        return f"its DRM nodes are open in {_named(opened)}"
    return ""


def kfd_processes(sysfs: SysFs) -> str:
    """Return which processes use any GPU through KFD, in words, or "" if there is none."""
    every = [pid for pid, _ in sysfs.numbered(f"{_KFD}/proc", "")]
    return _named(every) if every else ""


def _named(pids: Collection[int]) -> str:
    shown = ", ".join(map(str, [*pids][:_SHOWN_AT_MOST]))
    more = len(pids) - _SHOWN_AT_MOST
    return f"process{'es' if len(pids) > 1 else ''} {shown}{f' and {more} more' if more > 0 else ''}"


def _kfd_users(sysfs: SysFs, address: str) -> list[int]:
    files = {f"vram_{one}" for one in _gpu_ids(sysfs, address)}
    return [pid for pid, folder in sysfs.numbered(f"{_KFD}/proc", "") if files & _files(sysfs, folder)]


def _files(sysfs: SysFs, folder: str) -> set[str]:
    """Return the names of the files of one process, and of its further contexts."""
    names = sysfs.names(folder)
    contexts = (one for one in names if one.startswith("context_"))
    return {*names, *(name for one in contexts for name in sysfs.names(f"{folder}/{one}"))}


def _gpu_ids(sysfs: SysFs, address: str) -> Iterator[str]:
    """Yield KFD's numbers of a GPU: one for each of its partitions, whose location differs in the function at most."""
    domain, bus, rest = address.split(":")
    place = int(domain, 16), int(bus, 16) << 5 | int(rest.partition(".")[0], 16)
    for _, node in sysfs.numbered(f"{_KFD}/topology/nodes", ""):
        says = properties(Tolerant(sysfs), f"{node}/properties")
        if (says.get("domain", 0), says.get("location_id", 0) >> 3 & 0x1FFF) == place:
            yield sysfs.text(f"{node}/gpu_id", "")


def _openers(sysfs: SysFs, nodes: frozenset[str]) -> Iterator[int]:
    if not sees_all(sysfs):
        raise HostError("cannot see which processes have its DRM nodes open: some are in another PID namespace")
    for pid in (1, *(pid for pid, _ in sysfs.numbered("proc", "") if pid != 1)):
        if any(link in nodes for link in _links(sysfs, pid)):
            yield pid


def _links(sysfs: SysFs, pid: int) -> Iterator[str]:
    """Yield what a process has open; nothing if it has ended. Process 1 never ends: if it is not to be seen, others
    are hidden too (hidepid, ProtectProc)."""
    folder = f"proc/{pid}/fd"
    try:
        names = sysfs.names(folder)
        if pid == 1 and not sysfs.exists(folder):
            raise HostError(f"cannot list {sysfs.path(folder)}: processes are hidden")
        yield from (link for name in names if (link := sysfs.link(f"{folder}/{name}")) is not None)
    except HostError as error:
        if not isinstance(error.__context__, ProcessLookupError | FileNotFoundError):
            why = "cannot see which processes have its DRM nodes open"
            needed = "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH are needed"
            raise HostError(f"{why} ({needed}): {error}") from None
