"""The kernel's side of resctrl, as strict as the kernel: what it refuses and with which error and which words in
info/last_cmd_status, what a new group begins with, and what it makes of what it takes. No hardware is behind it.

Sources: fs/resctrl/ctrlmondata.c (parse_line, cbm_validate, bw_validate, parse_cbm), fs/resctrl/rdtgroup.c
(rdtgroup_mkdir_ctrl_mon, __init_one_rdt_domain, cbm_ensure_valid, rdtgroup_mode_write, rdtgroup_tasks_write,
rdtgroup_rmdir), arch/x86/kernel/cpu/resctrl/core.c (limits of Intel and AMD), Linux 6.18.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.errors import HostError
from tests.doubles.cpufreq import Dead

MOUNT = "sys/fs/resctrl"
ROOT = ""
MOST = {"percent": 100, "MBps": 0xFFFFFFFF, "amd": 2048}
"""What a group may use of the memory bandwidth at first, by unit."""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """A cache that can be divided."""

    full: int = 0xFFF
    least: int = 1
    sparse: bool = False
    hardware: int = 0


@dataclass
class _Group:
    closid: int
    mode: str = "shareable"
    values: dict[str, dict[int, int]] = field(default_factory=dict)


class FakeResctrl:
    """A mounted resctrl below a root; `put`, `mkdir` and `rmdir` stand for the calls to the kernel."""

    def __init__(
        self,
        root: Path,
        *,
        domains: Mapping[int, Sequence[int]],
        caches: Mapping[str, Ways] | None = None,
        cdp: bool = False,
        bandwidth: str | None = "percent",
        closids: int = 8,
        rmids: int = 32,
    ) -> None:
        """domains: the CPUs of each L3 cache, by its id. caches: by level, such as "L3". bandwidth: percent, MBps or
        amd, or None if it cannot be limited."""
        self.root, self.mount = root, root / MOUNT
        self.closids, self.rmids, self.bandwidth = closids, rmids, bandwidth
        self.domains = {domain: tuple(cpus) for domain, cpus in domains.items()}
        self.ways: dict[str, Ways] = {}
        for level, ways in ({"L3": Ways()} if caches is None else caches).items():
            names = (f"{level}CODE", f"{level}DATA") if cdp and level == "L3" else (level,)
            self.ways |= dict.fromkeys(names, ways)
        self.groups = {ROOT: _Group(0, values=self._initial())}
        self.tasks: dict[int, str] = {}
        """The group of each task."""
        self.status = "ok"
        self._texts: dict[str, str] = {}
        """What the files have."""
        self.writes: list[tuple[str, str]] = []
        self.dies_after: int | None = None
        """After how many more calls the process that calls is dead."""
        self._make_machine("cdp" if cdp else "", "mba_MBps" if bandwidth == "MBps" else "")
        self._render()

    # ---------------------------------------------------------------- the calls

    def put(self, path: str, value: str) -> None:
        """Write a value and a newline. Raise HostError as host.cgroup.write.put does."""
        self._live()
        group, file = self._placed(Path(path))
        if group not in self.groups:
            raise self._refusal(path, errno.ENOENT, value)
        self.status = "ok"
        take = {"schemata": self._take_schemata, "mode": self._take_mode, "tasks": self._take_tasks}.get(file)
        if take is None:
            raise self._refusal(path, errno.EACCES, value)
        number = take(self.groups[group], group, value)
        self._render()
        if number:
            raise self._refusal(path, number, value)
        self.writes.append((f"{group}/{file}", value))

    def mkdir(self, path: str) -> None:
        self._live()
        name = str(Path(path).relative_to(self.mount))
        if "/" in name:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if name in self.groups or name in ("info", "mon_data", "mon_groups"):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.status = "ok"
        free = set(range(self.closids)) - {one.closid for one in self.groups.values()}
        why = "Out of CLOSIDs" if not free else "Out of RMIDs" if len(self.groups) >= self.rmids else ""
        if not why:
            group = _Group(min(free))
            why = self._begin(group)
        if why:
            self.status = why
            self._render()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.groups[name] = group
        self.writes.append((name, "mkdir"))
        self._render()

    def rmdir(self, path: str) -> None:
        self._live()
        name = str(Path(path).relative_to(self.mount))
        if name not in self.groups:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if name == ".":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        del self.groups[name]
        self.tasks = {tid: ROOT if group == name else group for tid, group in self.tasks.items()}
        self.writes.append((name, "rmdir"))
        self._render()

    # ---------------------------------------------------------------- what else happens on a machine

    def other(self, name: str, **schemata: Mapping[int, int]) -> None:
        """Another program makes a group and writes its masks."""
        dies, self.dies_after = self.dies_after, None
        self.mkdir(str(self.mount / name))
        for resource, values in schemata.items():
            self.put(str(self.mount / name / "schemata"), self.line(resource, values))
        self.dies_after = dies

    def line(self, resource: str, values: Mapping[int, int]) -> str:
        form = "d" if resource == "MB" else "x"
        return f"{resource}:" + ";".join(f"{domain}={value:{form}}" for domain, value in values.items())

    def reboot(self, boot_id: str) -> None:
        self.groups = {ROOT: _Group(0, values=self._initial())}
        self.tasks = {}
        (self.root / "proc/sys/kernel/random/boot_id").write_text(boot_id)
        self._render()

    def spawn(self, tid: int, cgroup: str, *, parent: int | None = None, start: int = 1) -> None:
        """A task begins in a control group, in the resctrl group of its parent."""
        self.tasks[tid] = self.tasks.get(parent, ROOT) if parent is not None else ROOT
        self._make(f"proc/{tid}/cgroup", f"0::/{cgroup}")
        self._make(f"proc/{tid}/stat", f"{tid} (a task) S {parent or 1} " + "0 " * 17 + f"{start} 0 0")
        self._list(cgroup, tid, there=True)
        self._render()

    def end(self, tid: int, cgroup: str) -> None:
        del self.tasks[tid]
        shutil.rmtree(self.root / f"proc/{tid}")
        self._forget(f"proc/{tid}/")
        self._list(cgroup, tid, there=False)
        self._render()

    def schemata(self, group: str = ROOT) -> dict[str, dict[int, int]]:
        return {name: dict(values) for name, values in self.groups[group].values.items()}

    def state(self) -> dict[str, tuple[str, dict[str, dict[int, int]]]]:
        """Every group, with its mode and its values."""
        return {name: (one.mode, self.schemata(name)) for name, one in self.groups.items()}

    def count(self, group: str, event: str, domain: int, value: str) -> None:
        """What the hardware has counted for a group."""
        self._make(f"{MOUNT}/{group}/mon_data/mon_L3_{domain:02}/{event}", value)

    # ---------------------------------------------------------------- the kernel's rules

    def _take_schemata(self, group: _Group, _: str, text: str) -> int:
        """Check all lines, then take all or none."""
        staged: dict[str, dict[int, int]] = {}
        for line in text.split("\n"):
            name, colon, rest = line.partition(":")
            name = name.strip()
            if not colon or not rest:
                self.status = f"Missing '{name}' value" if colon else "Missing ':'"
                return errno.EINVAL
            if name not in group.values:
                self.status = f"Unknown or unsupported resource name '{name}'"
                return errno.EINVAL
            staged[name] = {}
            for pair in rest.split(";"):
                if pair and (number := self._take_pair(group, name, pair, staged[name])):
                    return number
        for name, values in staged.items():
            group.values[name] |= values
        return 0

    def _take_pair(self, group: _Group, name: str, pair: str, staged: dict[int, int]) -> int:
        domain, equals, value = pair.partition("=")
        if not equals or not domain.strip().isdigit():
            self.status = "Missing '=' or non-numeric domain"
            return errno.EINVAL
        if int(domain) not in group.values[name]:
            return errno.EINVAL  # the kernel has no words for this one
        if int(domain) in staged:
            self.status = f"Duplicate domain {int(domain)}"
            return errno.EINVAL
        found = self._limit(value.strip()) if name == "MB" else self._mask(group, name, int(domain), value.strip())
        if found is None:
            return errno.EINVAL
        staged[int(domain)] = found
        return 0

    def _limit(self, text: str) -> int | None:
        if not text.isdigit():
            self.status = f"Invalid MB value {text}"
            return None
        value, most = int(text), MOST[self.bandwidth or ""]
        least, step = self._bandwidth_limits()
        if self.bandwidth == "MBps":
            return value
        if not least <= value <= most:
            self.status = f"MB value {value} out of range [{least},{most}]"
            return None
        return -(-value // step) * step

    def _bandwidth_limits(self) -> tuple[int, int]:
        return (1, 1) if self.bandwidth == "amd" else (10, 10)

    def _mask(self, group: _Group, name: str, domain: int, text: str) -> int | None:
        ways = self.ways[name]
        try:
            mask = int(text, 16)
        except ValueError:
            self.status = f"Non-hex character in the mask {text}"
            return None
        if mask == 0 or mask > ways.full:
            self.status = "Mask out of range"
            return None
        lowest = mask & -mask
        first_run = mask & ~(mask + lowest)
        if not ways.sparse and first_run != mask:
            self.status = f"The mask {mask:x} has non-consecutive 1-bits"
            return None
        if first_run.bit_count() < ways.least:
            self.status = f"Need at least {ways.least} bits in the mask"
            return None
        if self._overlaps(group, name, domain, mask, exclusive=True):
            self.status = "Overlaps with exclusive group"
            return None
        if group.mode == "exclusive" and self._overlaps(group, name, domain, mask, exclusive=False):
            self.status = "Overlaps with other group"
            return None
        return mask

    def _overlaps(self, group: _Group, name: str, domain: int, mask: int, *, exclusive: bool) -> bool:
        if not exclusive and mask & self.ways[name].hardware:
            return True
        others = [one for one in self.groups.values() if one is not group]
        counted = [one for one in others if one.mode == "exclusive" or not exclusive]
        return any(mask & one.values[peer][domain] for one in counted for peer in self._peers(name))

    def _peers(self, name: str) -> list[str]:
        """The resources of the same cache."""
        return [one for one in self.ways if one[:2] == name[:2]]

    def _take_mode(self, group: _Group, _: str, text: str) -> int:
        if text == group.mode:
            return 0
        if text == "exclusive":
            if not self.ways:
                self.status = "Cannot be exclusive without CAT/CDP"
                return errno.EINVAL
            for name in self.ways:
                for domain, mask in group.values[name].items():
                    if self._overlaps(group, name, domain, mask, exclusive=False):
                        self.status = "Schemata overlaps"
                        return errno.EINVAL
        elif text != "shareable":
            self.status = "Unknown or unsupported mode"
            return errno.EINVAL
        group.mode = text
        return 0

    def _take_tasks(self, _: _Group, name: str, text: str) -> int:
        for one in text.split(","):
            if not one.isdigit():
                self.status = f"Task list parsing error pid {one}"
                return errno.EINVAL
            if int(one) not in self.tasks:
                self.status = f"No task {one}\nError while processing task {one}"
                return errno.ESRCH
            self.tasks[int(one)] = name
        return 0

    def _begin(self, group: _Group) -> str:
        """Give a new group what the kernel gives it; return why there is nothing to give, or ""."""
        for name, ways in self.ways.items():
            group.values[name] = {}
            for domain in self.groups[ROOT].values[name]:
                used = given = ways.hardware
                for one in self.groups.values():
                    mask = 0
                    for peer in self._peers(name):
                        mask |= one.values[peer][domain]
                    used |= mask
                    given |= mask if one.mode == "shareable" else 0
                given |= ways.full & ~used
                given &= ~(given + (given & -given))  # the lowest run alone
                if given.bit_count() < ways.least:
                    return f"No space on {name}:{domain}"
                group.values[name][domain] = given
        if self.bandwidth is not None:
            group.values["MB"] = dict.fromkeys(self.domains, MOST[self.bandwidth])
        return ""

    def _initial(self) -> dict[str, dict[int, int]]:
        found = {}
        for name, ways in self.ways.items():
            # There is an L2 cache for each pair of CPUs.
            count = sum(len(cpus) for cpus in self.domains.values()) // 2
            found[name] = dict.fromkeys(self.domains if name[1] == "3" else range(count), ways.full)
        if self.bandwidth is not None:
            found["MB"] = dict.fromkeys(self.domains, MOST[self.bandwidth])
        return found

    # ---------------------------------------------------------------- files

    def _live(self) -> None:
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise Dead
            self.dies_after -= 1

    def _placed(self, path: Path) -> tuple[str, str]:
        group, _, file = str(path.relative_to(self.mount)).rpartition("/")
        return group, file

    def _refusal(self, path: str, number: int, value: str) -> HostError:
        return HostError(f"cannot write {path}: {os.strerror(number)}, value {value!r}")

    def _make_machine(self, *options: str) -> None:
        words = ",".join(["rw", "relatime", *filter(None, options)])
        self._make("proc/mounts", f"resctrl /sys/fs/resctrl resctrl {words} 0 0")
        self._make("proc/sys/kernel/random/boot_id", "boot-1")
        self._make("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu cat_l3 mba rdt_a")
        for domain, cpus in self.domains.items():
            for cpu in cpus:
                self._make(f"sys/devices/system/cpu/cpu{cpu}/cache/index2/level", "2")
                self._make(f"sys/devices/system/cpu/cpu{cpu}/cache/index2/id", str(cpu // 2))
                self._make(f"sys/devices/system/cpu/cpu{cpu}/cache/index3/level", "3")
                self._make(f"sys/devices/system/cpu/cpu{cpu}/cache/index3/id", str(domain))
        for name, ways in self.ways.items():
            self._make(f"{MOUNT}/info/{name}/cbm_mask", f"{ways.full:x}")
            self._make(f"{MOUNT}/info/{name}/min_cbm_bits", str(ways.least))
            self._make(f"{MOUNT}/info/{name}/num_closids", str(self.closids))
            self._make(f"{MOUNT}/info/{name}/shareable_bits", f"{ways.hardware:x}")
            self._make(f"{MOUNT}/info/{name}/sparse_masks", str(int(ways.sparse)))
        if self.bandwidth is not None:
            least, step = self._bandwidth_limits()
            self._make(f"{MOUNT}/info/MB/min_bandwidth", str(least))
            self._make(f"{MOUNT}/info/MB/bandwidth_gran", str(step))
            self._make(f"{MOUNT}/info/MB/delay_linear", str(int(self.bandwidth != "amd")))
            self._make(f"{MOUNT}/info/MB/num_closids", str(self.closids))
        if self.rmids:
            self._make(f"{MOUNT}/info/L3_MON/num_rmids", str(self.rmids))
            events = "llc_occupancy\nmbm_total_bytes\nmbm_total_bytes_config\nmbm_local_bytes"
            self._make(f"{MOUNT}/info/L3_MON/mon_features", events)

    def _render(self) -> None:
        """Show in the files what the groups are now."""
        self._make(f"{MOUNT}/info/last_cmd_status", self.status)
        self._show_usage()
        there = {one.name for one in self.mount.iterdir() if one.is_dir()} - {"info", "mon_data", "mon_groups"}
        for name in there - self.groups.keys():
            shutil.rmtree(self.mount / name)
            self._forget(f"{MOUNT}/{name}/")
        for name, one in self.groups.items():
            width = max(map(len, one.values), default=0)
            lines = [f"{self.line(resource, values).rjust(width)}" for resource, values in one.values.items()]
            self._make(f"{MOUNT}/{name}/schemata", "\n".join(f"    {line}" for line in lines))
            self._make(f"{MOUNT}/{name}/mode", one.mode)
            self._make(f"{MOUNT}/{name}/cpus_list", "")
            tids = sorted(tid for tid, group in self.tasks.items() if group == name)
            self._make(f"{MOUNT}/{name}/tasks", "\n".join(map(str, tids)))
            for domain in self.domains if self.rmids else ():
                for event in ("llc_occupancy", "mbm_total_bytes", "mbm_local_bytes"):
                    path = f"{MOUNT}/{name}/mon_data/mon_L3_{domain:02}/{event}"
                    self._make(path, self._texts.get(path, "0"))

    def _show_usage(self) -> None:
        for name, ways in self.ways.items():
            words = []
            for domain in self.groups[ROOT].values[name]:
                software = exclusive = 0
                for one in self.groups.values():
                    if one.mode == "exclusive":
                        exclusive |= one.values[name][domain]
                    else:
                        software |= one.values[name][domain]
                letters = [
                    "X" if ways.hardware & bit & software
                    else "H" if ways.hardware & bit
                    else "S" if software & bit
                    else "E" if exclusive & bit
                    else "0"
                    for bit in (1 << i for i in reversed(range(ways.full.bit_length())))
                ]  # fmt: skip
                words.append(f"{domain}={''.join(letters)}")
            self._make(f"{MOUNT}/info/{name}/bit_usage", ";".join(words))

    def _forget(self, folder: str) -> None:
        self._texts = {path: text for path, text in self._texts.items() if not path.startswith(folder)}

    def _list(self, cgroup: str, tid: int, *, there: bool) -> None:
        file = self.root / "sys/fs/cgroup" / cgroup / "cgroup.threads"
        known = {int(one) for one in file.read_text().split()} if file.exists() else set()
        known = known | {tid} if there else known - {tid}
        self._make(str(file.relative_to(self.root)), "\n".join(map(str, sorted(known))))

    def _make(self, path: str, text: str) -> None:
        if self._texts.get(path) == text:
            return
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n" if text else "")
        self._texts[path] = text
