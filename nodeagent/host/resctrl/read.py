"""Reads resctrl: what can be divided on this machine, and how the groups divide it.

Source: Documentation/filesystems/resctrl.rst. What is not known here (resources of newer kernels) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import MappingProxyType

from nodeagent.core.resctrl.model import BANDWIDTH, ROOT, Bandwidth, Cache, Group, Mode, Schemata, Tree, Unit
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

MOUNT = "sys/fs/resctrl"
"""Where the kernel makes the folder for it."""
STATUS = f"{MOUNT}/info/last_cmd_status"
_MOUNTS = "proc/mounts"
_INFO = f"{MOUNT}/info"
_CACHE = re.compile(r"L[23](CODE|DATA)?", re.ASCII)
_CPUS = "sys/devices/system/cpu"
_LEVEL = 3
"""Of the caches whose ids are the domains of L3 and MB."""
_NOT_GROUPS = frozenset({"info", "mon_data", "mon_groups"})


def unmounted(sysfs: SysFs) -> str:
    """Return why there is no resctrl to read, or "" if there is."""
    if sysfs.exists(_INFO):
        return ""
    if not sysfs.exists(MOUNT):
        return "the kernel or the hardware has no resctrl: there is no /sys/fs/resctrl"
    return "it is not mounted: mount -t resctrl resctrl /sys/fs/resctrl"


def read(sysfs: SysFs) -> Tree:
    """Return what is there now. Raise HostError if it is not mounted or cannot be read."""
    if why := unmounted(sysfs):
        raise HostError(f"cannot read {sysfs.path(MOUNT)}: {why}")
    groups = {one.name: one for one in _groups(sysfs)}
    root = groups[ROOT].schemata
    known = [name for name in sysfs.names(_INFO) if name in root]
    caches = {name: _cache(sysfs, name, tuple(sorted(root[name]))) for name in known if _is_cache(name)}
    bandwidth = _bandwidth(sysfs, tuple(sorted(root[BANDWIDTH]))) if BANDWIDTH in known else None
    return Tree(
        caches=MappingProxyType(caches),
        bandwidth=bandwidth,
        groups=MappingProxyType(groups),
        events=_events(sysfs),
        rmids=sysfs.number(f"{_INFO}/L3_MON/num_rmids", 0) or 0,
    )


def group(sysfs: SysFs, name: str) -> Group | None:
    """Return one group, or None if there is none of that name. Raise HostError if it cannot be read."""
    if not sysfs.exists(f"{folder(name)}/tasks"):
        return None
    text = sysfs.text(f"{folder(name)}/mode", None)
    try:
        mode = Mode.SHAREABLE if text is None else Mode(text)
    except ValueError:
        raise HostError(f"cannot read {sysfs.path(folder(name))}/mode: {text!r} is no mode") from None
    if mode == Mode.LOCK_SETUP:
        return Group(name=name, mode=mode)
    return Group(name=name, mode=mode, schemata=_schemata(sysfs, f"{folder(name)}/schemata"))


def folder(name: str) -> str:
    """Return the path of a group below the root of the machine."""
    return f"{MOUNT}/{name}" if name else MOUNT


def l3_domains(sysfs: SysFs, cpus: Iterable[int]) -> dict[int, int]:
    """Return the id of the L3 cache of each CPU that has one. Raise HostError if a value is not valid."""
    found = {}
    for cpu in cpus:
        for _, path in sysfs.numbered(f"{_CPUS}/cpu{cpu}/cache", "index"):
            if sysfs.number(f"{path}/level") == _LEVEL and (id := sysfs.number(f"{path}/id")) is not None:
                found[cpu] = id
    return found


def _groups(sysfs: SysFs) -> Iterator[Group]:
    for name in (ROOT, *(one for one in sysfs.names(MOUNT) if one not in _NOT_GROUPS)):
        if (found := group(sysfs, name)) is not None:
            yield found


def _is_cache(name: str) -> bool:
    return _CACHE.fullmatch(name) is not None


def _cache(sysfs: SysFs, name: str, domains: tuple[int, ...]) -> Cache:
    path = f"{_INFO}/{name}"
    return Cache(
        name=name,
        full=_needed(sysfs, f"{path}/cbm_mask", base=16),
        # AMD has 0 here on older kernels: a mask of no ways means nothing to a container.
        least_ways=max(1, _needed(sysfs, f"{path}/min_cbm_bits")),
        sparse=bool(sysfs.number(f"{path}/sparse_masks", 0)),
        hardware=sysfs.value(f"{path}/shareable_bits", _hex, 0) or 0,
        closids=_needed(sysfs, f"{path}/num_closids"),
        domains=domains,
    )


def _bandwidth(sysfs: SysFs, domains: tuple[int, ...]) -> Bandwidth:
    path = f"{_INFO}/{BANDWIDTH}"
    return Bandwidth(
        unit=_unit(sysfs),
        least=_needed(sysfs, f"{path}/min_bandwidth"),
        step=max(1, _needed(sysfs, f"{path}/bandwidth_gran")),
        closids=_needed(sysfs, f"{path}/num_closids"),
        domains=domains,
    )


def _unit(sysfs: SysFs) -> Unit:
    """Return what limits count: AMD alone has a scale that is not linear, and limits in eighths of GB/s."""
    mounts = (line.split() for line in sysfs.text(_MOUNTS, "").splitlines())
    options = {one for words in mounts if len(words) > 3 and words[2] == "resctrl" for one in words[3].split(",")}
    if "mba_MBps" in options or sysfs.exists(f"{MOUNT}/mba_MBps_event"):
        return Unit.MIBPS
    return Unit.PERCENT if sysfs.number(f"{_INFO}/{BANDWIDTH}/delay_linear", 1) else Unit.EIGHTHS


def _events(sysfs: SysFs) -> tuple[str, ...]:
    names = sysfs.text(f"{_INFO}/L3_MON/mon_features", "").split()
    return tuple(one for one in names if not one.endswith("_config"))


def _needed(sysfs: SysFs, path: str, base: int = 10) -> int:
    found = sysfs.value(path, lambda text: int(text, base))
    if found is None:
        raise HostError(f"cannot read {sysfs.path(path)}: it is missing or empty")
    return found


def _hex(text: str) -> int:
    return int(text, 16)


def _schemata(sysfs: SysFs, path: str) -> Schemata:
    """Return the lines of a group, such as "    L3:0=fffff;1=fffff"; none where nothing can be controlled."""
    found: dict[str, dict[int, int]] = {}
    for line in sysfs.text(path, "").splitlines():
        name, _, values = line.strip().partition(":")
        base = 16 if _is_cache(name) else 10
        try:
            pairs = [one.split("=") for one in values.split(";")]
            found[name] = {int(domain): int(value, base) for domain, value in pairs}
        except ValueError:
            raise HostError(f"cannot read {sysfs.path(path)}: {line[:80]!r} is no line of resources") from None
    return MappingProxyType({name: MappingProxyType(values) for name, values in found.items()})
