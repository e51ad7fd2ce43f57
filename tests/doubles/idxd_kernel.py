"""The idxd driver's part of DSA and IAA, on a tree of files: what becomes of what is written to work queues, engines
and the drivers of the bus `dsa`.

As strict as drivers/dma/idxd (sysfs.c, device.c, cdev.c, bus.c): files of a queue are EPERM while it is enabled, its
size while the accelerator is enabled; sizes above the total are EINVAL, as are thresholds of 0, above the size or of a
dedicated queue. A new type clears the name, dedicated mode the threshold. An accelerator needs an engine and a queue
with a group; a queue with a group that is shared and not of type user keeps it, and every queue, from being enabled.
Groups that change while the accelerator is enabled do not reach the hardware. Disabling a queue clears all but its
size, group and driver_name, before 5.18 the first two too; disabling one whose state is `disabled`, or a bind that the
hardware refuses, clears its type and nothing else. Disabling the accelerator disables its queues but those whose state
is `disabled`, which stay bound, and clears everything but each driver_name; before 5.18 it leaves queues that were not
enabled as they are.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.builders.devices import DeviceTree

BLANK = {"type": "none", "name": "", "mode": "shared", "threshold": 0, "priority": 0, "state": "disabled", "clients": 0}
BLANK |= {"block_on_fault": 0, "ats_disable": 0, "prs_disable": 0, "max_batch_size": 32, "max_transfer_size": 2 << 20}
RESET = {"size": 0, "group_id": -1}
MAJOR = 241
GROUP = {"read_buffers_reserved": 0, "read_buffers_allowed": 96, "use_read_buffer_limit": 0}
GROUP |= {"traffic_class_a": 1, "traffic_class_b": 1, "desc_progress_limit": 0, "batch_progress_limit": 0}


@dataclass
class IdxdKernel:
    """`put` is to be given to what writes."""

    tree: DeviceTree
    older: bool = False
    """Whether the kernel is older than 5.18."""
    before: Callable[[str, str], None] = lambda path, text: None
    """Called before each write takes effect; may raise or hang."""
    after: Callable[[str, str], None] = lambda path, text: None
    refuses: frozenset[str] = frozenset()
    """Queues that the hardware refuses to enable."""
    written: list[tuple[str, str]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Addresses by name."""
    broken: set[str] = field(default_factory=set)
    hardware: dict[str, int] = field(default_factory=dict)
    """The group of each queue of enabled accelerators, as the hardware has it."""
    in_hardware: dict[str, str] = field(default_factory=dict)
    """The mode of each queue with a group, as the hardware has it: once it is dedicated it stays so until it, or the
    accelerator, is disabled (idxd_wq_config_write, idxd_wq_disable_cleanup)."""

    _folders: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for driver in ("idxd", "user", "dmaengine"):
            for file in ("bind", "unbind"):
                self.tree.write(f"sys/bus/dsa/drivers/{driver}/{file}", "")
        folder = self.tree.root / "sys/bus/dsa/devices"
        for name in sorted(os.listdir(folder)) if folder.exists() else ():  # of an earlier process
            if name.startswith(("dsa", "iax")):
                self.names[name] = self.folder(name).parent.name
                self.hardware |= {one: int(self.get(one, "group_id")) for one in self.parts(name)}

    def add(
        self, name: str, address: str, *, wqs: int = 8, engines: int = 4, total: int = 128, pasid: bool = True
    ) -> None:
        """An accelerator as it is after boot, or after another one of that name is gone."""
        self._folders.clear()
        if address not in self.tree.folders:
            self.tree.pci(address, pci_class="088000", device="0b25", driver="idxd", numa_node=0)
        folder, number = self.tree.folders[address] / name, name[3:]
        self.names[name] = address
        facts = {"state": "disabled", "configurable": 1, "max_work_queues_size": total, "cmd_status": "0x0"}
        facts |= {"read_buffer_limit": 0, "cdev_major": MAJOR}
        self._write(folder, {**facts, "pasid_enabled": int(pasid), "max_work_queues": wqs})
        self.tree.link(f"sys/bus/dsa/devices/{name}", folder)
        for index in range(wqs):
            self._write(folder / f"wq{number}.{index}", {**BLANK, **RESET, "driver_name": "", "cdev_minor": index})
            self.tree.link(f"sys/bus/dsa/devices/wq{number}.{index}", folder / f"wq{number}.{index}")
        for index in range(engines):
            self._write(folder / f"engine{number}.{index}", {"group_id": -1})
            self.tree.link(f"sys/bus/dsa/devices/engine{number}.{index}", folder / f"engine{number}.{index}")
            self._write(folder / f"group{number}.{index}", GROUP)
            self.tree.link(f"sys/bus/dsa/devices/group{number}.{index}", folder / f"group{number}.{index}")

    # ---------------------------------------------------------------- what is shown

    def folder(self, part: str) -> Path:
        """The folder of an accelerator, or a queue or engine of it."""
        if part not in self._folders:
            self._folders[part] = (self.tree.root / "sys/bus/dsa/devices" / part).resolve(strict=True)
        return self._folders[part]

    def get(self, part: str, file: str) -> str:
        return (self.folder(part) / file).read_text().strip()

    def driver(self, part: str) -> str:
        link = self.folder(part) / "driver"
        return os.path.basename(os.readlink(link)) if link.is_symlink() else ""

    def parts(self, name: str, kind: str = "wq") -> list[str]:
        every = (one.name for one in self.folder(name).iterdir() if one.name.startswith(kind))
        return sorted(every, key=lambda one: int(one.partition(".")[2]))

    def is_untouched(self, name: str) -> bool:
        """Whether it is as it was after boot."""
        wqs = all(
            self.get(one, file) == str(value)
            for one in self.parts(name)
            for file, value in {**BLANK, **RESET, "driver_name": ""}.items()
        )
        engines = all(self.get(one, "group_id") == "-1" for one in self.parts(name, "engine"))
        groups = all(
            self.get(one, file) == str(value) for one in self.parts(name, "group") for file, value in GROUP.items()
        )
        return wqs and engines and groups and self.get(name, "state") == "disabled" and not self.driver(name)

    def node(self, wq: str) -> Path:
        return self.tree.root / "dev" / self.folder(wq).parent.name.rstrip("0123456789") / wq

    @staticmethod
    def numbers_of(path: str) -> tuple[int, int] | None:
        """The numbers of a node, which is a file that has them, or None for any other file."""
        found = re.fullmatch(r"([0-9]+):([0-9]+)\n", Path(path).read_text()) if Path(path).exists() else None
        return (int(found[1]), int(found[2])) if found is not None else None

    # ---------------------------------------------------------------- what is written

    def put(self, path: str, text: str) -> None:
        """Take what is written to a file. Raise OSError as the kernel does."""
        self.before(path, text)
        self.written.append((os.path.relpath(path, self.tree.root), text))
        parts = Path(path).relative_to(self.tree.root).parts
        if parts[:4] == ("sys", "bus", "dsa", "drivers"):
            self._driver(parts[4], parts[5], text)
        else:
            self._store(parts[-2], parts[-1], text)
        self.after(path, text)

    def _driver(self, driver: str, file: str, part: str) -> None:
        if not os.path.lexists(self.tree.root / "sys/bus/dsa/devices" / part):
            raise _error(errno.ENODEV)
        if file == "unbind":
            if self.driver(part) != driver:
                raise _error(errno.ENODEV)
            (self._stop_queue if part.startswith("wq") else self._stop)(part)
            return
        assert file == "bind", file
        if self.driver(part):
            raise _error(errno.EBUSY)
        if part.startswith("wq") != (driver != "idxd"):
            raise _error(errno.ENODEV)
        self._start_queue(part, driver) if part.startswith("wq") else self._start(part)

    def _start(self, name: str) -> None:
        self._check(name)
        if not any(self.get(one, "group_id") != "-1" for one in self.parts(name, "engine")):
            raise _error(errno.ENXIO)
        self._write(self.folder(name), {"state": "enabled"})
        self._bound(name, "idxd")
        self._write_modes(name)
        self.hardware |= {one: int(self.get(one, "group_id")) for one in self.parts(name)}

    def _check(self, name: str) -> None:
        grouped = [one for one in self.parts(name) if self.get(one, "group_id") != "-1"]
        if not grouped:
            raise _error(errno.ENXIO)
        for one in grouped:
            if self.get(one, "mode") == "shared" and self.get(one, "type") != "user":
                raise _error(errno.ENXIO)

    def _start_queue(self, wq: str, driver: str) -> None:
        name = self.folder(wq).parent.name
        if self.get(name, "state") != "enabled":
            raise _error(errno.ENXIO)
        if self.get(wq, "driver_name") != driver:
            raise _error(errno.ENODEV)
        if self.get(name, "pasid_enabled") != "1":
            raise _error(errno.EOPNOTSUPP)
        try:
            self._check_queue(wq, name, driver)
        except OSError:
            self._write(self.folder(wq), {"type": "none"})  # and nothing else: the name stays
            raise
        self._write_modes(name)
        self._write(self.folder(wq), {"state": "enabled"})
        self._bound(wq, driver)
        self.node(wq).parent.mkdir(parents=True, exist_ok=True)
        self.node(wq).write_text(f"{MAJOR}:{self.get(wq, 'cdev_minor')}\n")

    def _write_modes(self, name: str) -> None:
        """Every queue with a group is written each time that anything is enabled."""
        for one in self.parts(name):
            if self.get(one, "group_id") != "-1" and self.in_hardware.get(one) != "dedicated":
                self.in_hardware[one] = self.get(one, "mode")

    def _check_queue(self, wq: str, name: str, driver: str) -> None:
        if self.get(wq, "group_id") == "-1" or not self.get(wq, "name") or self.get(wq, "type") != driver:
            raise _error(errno.ENXIO)
        if self.get(wq, "mode") == "shared" and self.get(wq, "threshold") == "0":
            raise _error(errno.ENXIO)
        self._check(name)
        if self.hardware[wq] != int(self.get(wq, "group_id")) or self.get(wq, "size") == "0" or wq in self.refuses:
            raise _error(errno.ENXIO)

    def _stop_queue(self, wq: str) -> None:
        self.broken.discard(wq)
        if self.get(wq, "state") == "disabled":
            self._write(self.folder(wq), {"type": "none", "clients": 0})
        else:
            self._write(self.folder(wq), BLANK if not self.older else BLANK | RESET)
            self.in_hardware.pop(wq, None)
        (self.folder(wq) / "driver").unlink()
        self.node(wq).unlink()

    def _stop(self, name: str) -> None:
        for one in self.parts(name):
            is_enabled = self.get(one, "state") == "enabled"
            if self.driver(one) and is_enabled:
                self._stop_queue(one)
            if is_enabled or not self.older:
                self._write(self.folder(one), BLANK | RESET)
                self.in_hardware.pop(one, None)
        for one in self.parts(name, "engine"):
            self._write(self.folder(one), {"group_id": -1})
        for one in self.parts(name, "group"):
            self._write(self.folder(one), GROUP)
        self._write(self.folder(name), {"state": "disabled"})
        (self.folder(name) / "driver").unlink()

    def _store(self, part: str, file: str, text: str) -> None:
        folder, name = self.folder(part), self.folder(part).parent.name
        assert (folder / file).exists(), f"{part} has no {file}"
        if part.startswith("engine"):
            assert file == "group_id"
            self._write(folder, {file: int(text)})
            return
        if part.startswith("group"):
            if self.get(name, "state") == "enabled":
                raise _error(errno.EPERM)
            self._write(folder, {file: int(text)})
            return
        enabled = self.get(name, "state") == "enabled" if file == "size" else self.get(part, "state") == "enabled"
        if enabled:
            raise _error(errno.EPERM)
        if file == "size":
            others = sum(int(self.get(one, "size")) for one in self.parts(name) if one != part)
            if others + int(text) > int(self.get(name, "max_work_queues_size")):
                raise _error(errno.EINVAL)
        elif file == "type":
            if text not in ("none", "kernel", "user"):
                raise _error(errno.EINVAL)
            if text != self.get(part, "type"):
                self._write(folder, {"name": ""})
        elif file == "mode":
            if text not in ("dedicated", "shared"):
                raise _error(errno.EINVAL)
            if text == "dedicated":
                self._write(folder, {"threshold": 0})
        elif file == "threshold":
            if not 0 < int(text) <= int(self.get(part, "size")) or self.get(part, "mode") == "dedicated":
                raise _error(errno.EINVAL)
        elif file == "priority":
            if not 0 <= int(text) <= 15:
                raise _error(errno.EINVAL)
        elif file == "group_id":
            if not -1 <= int(text) <= 3:
                raise _error(errno.EINVAL)
        else:
            assert file in ("name", "driver_name"), file
            if not text:
                raise _error(errno.EINVAL)
        self._write(folder, {file: text.strip()})

    # ---------------------------------------------------------------- what others do

    def opens(self, wq: str, clients: int = 1) -> None:
        """Programs open a queue. A dedicated one is disabled for a moment while that happens."""
        self._write(self.folder(wq), {"clients": clients})

    def blinks(self, wq: str) -> None:
        """A program is opening a dedicated queue right now."""
        self._write(self.folder(wq), {"state": "disabled"})

    def passes(self, _s: float = 0) -> None:
        """Some time passes: programs have opened what they were opening."""
        for name in self.names:
            for wq in self.parts(name):
                if self.driver(wq) and wq not in self.broken:
                    self._write(self.folder(wq), {"state": "enabled"})

    def breaks(self, wq: str) -> None:
        """A program opens a dedicated queue, and the hardware refuses to enable it again (idxd_wq_set_pasid)."""
        self.broken.add(wq)
        self.blinks(wq)

    def configures(self, wq: str, *, driver: str = "", **files: object) -> None:
        """An admin configures a queue, through accel-config."""
        for file, value in files.items():
            self._store(wq, file, str(value))
        if driver:
            self._start_queue(wq, driver)

    def resets(self, name: str) -> None:
        """An admin disables an accelerator, with all its queues."""
        self._stop(name)

    def was_reset(self, name: str) -> None:
        """The kernel resets an accelerator that was halted (irq.c, idxd_device_reinit): all is cleared but each driver,
        and none of it can be enabled again as no queue has a group."""
        for one in self.parts(name):
            self._write(self.folder(one), BLANK | RESET)
            self.broken.add(one)
        for one in self.parts(name, "engine"):
            self._write(self.folder(one), {"group_id": -1})
        self._write(self.folder(name), {"state": "disabled"})

    def reboot(self) -> None:
        self.broken.clear()
        for name in self.names:
            if self.driver(name):
                self._stop(name)
            for one in self.parts(name):
                self._write(self.folder(one), {**BLANK, **RESET, "driver_name": ""})
            for one in self.parts(name, "engine"):
                self._write(self.folder(one), {"group_id": -1})

    def _bound(self, part: str, driver: str) -> None:
        (self.folder(part) / "driver").symlink_to(
            os.path.relpath(self.tree.root / "sys/bus/dsa/drivers" / driver, self.folder(part))
        )

    def _write(self, folder: Path, files: dict[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in files.items():
            path, text = folder / file, f"{value}\n"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
