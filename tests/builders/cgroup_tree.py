"""A made-up unified hierarchy in a folder that answers writes as the kernel does: what a cgroup has in effect follows
from its own files and its parent's, wrong values are EINVAL, limits are whole pages. Interface files are plain files;
`put` stands in for the one function that writes them.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError, InputError
from tests.builders import uclamp_files
from tests.builders.io_files import IoDisks

SIZES = {"2MB": 2 << 20, "1GB": 1 << 30}
CONTROLLERS = "cpuset cpu hugetlb"
HANG_S = 20


class CgroupTree:
    """Below `root`/sys/fs/cgroup; with `root` as the machine's root there is nothing else yet."""

    def __init__(self, root: Path, *, cpus: str, mems: str, io: IoDisks | None = None, uclamp: bool = False) -> None:
        """io: the disks that the kernel knows; without it there is no I/O controller, which is on in kubepods alone.
        uclamp: whether the kernel has utilization clamps (CONFIG_UCLAMP_TASK_GROUP)."""
        self.root = root
        self.io = io
        self.uclamp = uclamp
        self.mount = root / "sys/fs/cgroup"
        self.online, self.mems = CpuSet.parse(cpus), CpuSet.parse(mems)
        self.refuses: dict[str, int] = {}
        """errno by the path of a file, below the mount."""
        self.answers = threading.Event()
        """While it is not set, nothing that is put returns."""
        self.answers.set()
        self.writes: list[tuple[str, str]] = []
        """(path below the mount, value) of what was put."""
        self._lock = threading.RLock()
        self.mount.mkdir(parents=True)
        controllers = CONTROLLERS if io is None else f"{CONTROLLERS} io"
        for name, text in (("controllers", controllers), ("subtree_control", controllers), ("procs", "")):
            (self.mount / f"cgroup.{name}").write_text(f"{text}\n")
        for size in SIZES.values():
            (root / f"sys/kernel/mm/hugepages/hugepages-{size >> 10}kB").mkdir(parents=True, exist_ok=True)

    def make(self, path: str, **files: str) -> Path:
        """A cgroup and those above it. files: values of interface files, "." written "__" """
        with self._lock:
            self._make(path)
        for name, value in files.items():
            self.set(path, name.replace("__", "."), value)
        return self.mount / path

    def _make(self, path: str) -> None:
        for depth in range(1, len(path.split("/")) + 1):
            self._one("/".join(path.split("/")[:depth]))

    def remove(self, path: str) -> None:
        with self._lock:
            shutil.rmtree(self.mount / path)

    def set(self, path: str, file: str, value: str) -> None:
        """Another process writes."""
        self._take(f"{path}/{file}", value)

    def text(self, path: str, file: str) -> str:
        return (self.mount / path / file).read_text().strip()

    def effective(self, path: str) -> str:
        return self.text(path, "cpuset.cpus.effective")

    def hotplug(self, cpus: str) -> None:
        """Other CPUs are online."""
        with self._lock:
            self.online = CpuSet.parse(cpus)
            self._follow(self.mount)

    def put(self, path: str, value: str) -> None:
        """In place of cgroupset.put."""
        below = str(Path(path).relative_to(self.mount))
        assert self.answers.wait(HANG_S), f"no test ended the hang of {below}"
        try:
            if code := self.refuses.get(below):
                raise OSError(code, os.strerror(code))
            self._take(below, value)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}, value {value!r}") from None
        self.writes.append((below, value))

    def _one(self, path: str) -> None:
        folder = self.mount / path
        if folder.exists():
            return
        controllers = (folder.parent / "cgroup.subtree_control").read_text().strip()
        files = {
            "cgroup.controllers": controllers,
            "cgroup.subtree_control": CONTROLLERS,
            "cgroup.events": "populated 1\nfrozen 0",
            "cgroup.kill": "",
            "cgroup.procs": "",
            "cpu.max": "max 100000",
            "cpu.stat": "usage_usec 0\nnr_throttled 0\nthrottled_usec 0",
            "cpuset.cpus": "",
            "cpuset.cpus.effective": "",
            "cpuset.cpus.exclusive": "",
            "cpuset.cpus.partition": "member",
            "cpuset.mems": "",
            "cpuset.mems.effective": "",
            **{f"hugetlb.{size}.{limit}": "max" for size in SIZES for limit in ("max", "rsvd.max")},
            **{f"hugetlb.{size}.{use}": "0" for size in SIZES for use in ("current", "rsvd.current")},
            **{file: text for one in controllers.split() for file, text in self._of_controller(one).items()},
        }
        # The watcher runs on this loop: to it all of it is there at once, as the kernel shows a cgroup.
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
        self._follow(folder)

    def _take(self, below: str, value: str) -> None:
        with self._lock:
            self._taken(below, value)

    def _taken(self, below: str, value: str) -> None:
        path, file = self.mount / below, Path(below).name
        if not path.exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if file in ("cpuset.cpus", "cpuset.mems"):
            try:
                value = str(CpuSet.parse(value)) if value else ""
            except InputError:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        if file.startswith("hugetlb.") and value != "max":
            size = SIZES[file.split(".")[1]]
            value = str(int(value) // size * size)
        if self.io is not None and file.startswith("io."):
            value = self.io.write(file, path.read_text().strip(), value)
        if file in uclamp_files.INITIAL:
            value = uclamp_files.write(value)
        if file == "cgroup.subtree_control" and (self.io is not None or self.uclamp):
            value = self._switched(path.parent, value)
        _store(path, value)
        if file.startswith("cpuset."):
            self._follow(path.parent)

    def _switched(self, folder: Path, value: str) -> str:
        """What is on below a cgroup after a write such as "+io". Files of I/O and of clamps come and go with their
        controllers."""
        on = dict.fromkeys((folder / "cgroup.subtree_control").read_text().split())
        have = (folder / "cgroup.controllers").read_text().split()
        for word in value.split():
            if word[0] not in "+-" or (word[0] == "+" and word[1:] not in have):
                code = errno.ENOENT if word[0] == "+" else errno.EINVAL
                raise OSError(code, os.strerror(code))
            on = {**on, word[1:]: None} if word[0] == "+" else {one: None for one in on if one != word[1:]}
        for child in (one for one in folder.iterdir() if one.is_dir()):
            _store(child / "cgroup.controllers", " ".join(on))
            for one in ("io", "cpu"):
                for file, text in self._of_controller(one).items():
                    if one not in on:
                        (child / file).unlink(missing_ok=True)
                    elif not (child / file).exists():
                        (child / file).write_text(f"{text}\n")
        return " ".join(on)

    def _of_controller(self, name: str) -> Mapping[str, str]:
        """The files of a new cgroup that come and go with a controller."""
        if name == "io" and self.io is not None:
            return self.io.initial()
        return uclamp_files.INITIAL if name == "cpu" and self.uclamp else {}

    def clamped(self, path: str) -> tuple[int, int]:
        """The utilization clamps that a cgroup has in effect, of 1024."""
        parts = path.split("/")
        above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return uclamp_files.effective({file: self.text(one, file) for file in uclamp_files.INITIAL} for one in above)

    def _follow(self, folder: Path) -> None:
        """What is in effect in a cgroup and, where that changes, below."""
        changed = [
            folder == self.mount or self._followed(folder, file, whole)
            for file, whole in (("cpuset.cpus", self.online), ("cpuset.mems", self.mems))
        ]
        for child in os.scandir(folder) if any(changed) else ():
            if child.is_dir():
                self._follow(Path(child.path))

    def _followed(self, folder: Path, file: str, whole: CpuSet) -> bool:
        """Whether something else is in effect now."""
        above = self._effective(folder.parent, file, whole)
        own = CpuSet.parse((folder / file).read_text().strip())
        now = str((own & above) or above)
        if (folder / f"{file}.effective").read_text().strip() == now:
            return False
        _store(folder / f"{file}.effective", now)
        return True

    def _effective(self, folder: Path, file: str, whole: CpuSet) -> CpuSet:
        return whole if folder == self.mount else CpuSet.parse((folder / f"{file}.effective").read_text().strip())


def _store(path: Path, value: str) -> None:
    """In one write, so that no reader gets half of it, as none does of the kernel's; blanks cover what was longer."""
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, f"{value}\n".ljust(os.fstat(handle).st_size).encode())
    finally:
        os.close(handle)
