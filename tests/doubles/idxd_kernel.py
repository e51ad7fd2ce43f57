"""The kernel's driver of Intel's DSA and IAA on a tree of files: what becomes of a text that is written to the files of
queues and engines, and to bind and unbind of the drivers `idxd` (accelerators) and `user` (queues for programs).

As strict as drivers/dma/idxd (sysfs.c, device.c, cdev.c) of Linux 6.7 and later, in what it refuses, with which error,
and in what it resets. Stricter in one thing: sysfs.c takes groups while the accelerator is enabled, the hardware does
not, so here it is a fault of whoever writes them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tests.builders.devices import DeviceTree

BUS, DRIVERS = "sys/bus/dsa/devices", "sys/bus/dsa/drivers"
_ATTRIBUTE = re.compile(r"sys/bus/dsa/devices/((?:wq|engine)[0-9]+\.[0-9]+)/([a-z_]+)")
_DRIVER = re.compile(r"sys/bus/dsa/drivers/(idxd|user)/(bind|unbind)")
RESET = {"state": "disabled", "type": "none", "threshold": 0, "priority": 0, "mode": "shared", "name": ""} | {
    "block_on_fault": 0
}
"""What disabling a queue leaves of it (idxd_wq_disable_cleanup); size and group stay."""
BLANK = {**RESET, "size": 0, "group_id": -1}
"""What disabling the accelerator leaves (idxd_wq_device_reset_cleanup)."""
MOST_PRIORITY, LONGEST_NAME = 15, 1024


def refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def accelerator(
    tree: DeviceTree, address: str, name: str, *, queues: int = 8, engines: int = 4, **files: object
) -> None:
    """An accelerator as the kernel makes it: nothing of it is configured."""
    tree.pci(address, pci_class="088000", driver="idxd", numa_node=0)
    folder = tree.folders[address] / name
    told = {
        **{"state": "disabled", "configurable": 1, "pasid_enabled": 1, "cmd_status": "0x0", "errors": 0},
        **{"max_work_queues": queues, "max_engines": engines, "max_groups": 4, "max_work_queues_size": 128},
        **files,
    }
    _device(tree, folder, told)
    for number in range(queues):
        _device(tree, folder / f"wq{name[3:]}.{number}", {**BLANK, "clients": 0, "driver_name": ""})
    for number in range(engines):
        _device(tree, folder / f"engine{name[3:]}.{number}", {"group_id": -1})
    for number in range(4):
        _device(tree, folder / f"group{name[3:]}.{number}", {"traffic_class_a": 1})
    for driver in ("idxd", "user"):
        (tree.root / DRIVERS / driver).mkdir(parents=True, exist_ok=True)


def _device(tree: DeviceTree, folder: Path, files: dict[str, object]) -> None:
    for file, value in files.items():
        tree.write(f"{folder.relative_to(tree.root)}/{file}", value)
    tree.link(f"{BUS}/{folder.name}", folder)


@dataclass
class IdxdKernel:
    """`put` is to be given to what writes. All state is in the tree: another process may go on with it."""

    root: Path
    enqcmd: bool = True
    """Whether the processor has ENQCMD, without which there are no shared queues."""
    faults: bool = True
    """Whether accelerators can wait for pages (gen_cap.block_on_fault)."""
    nodes: bool = True
    """Whether udev makes nodes."""
    before: Callable[[str], None] = lambda path: None
    """Called before each write takes effect; may raise or hang."""
    after: Callable[[str], None] = lambda path: None
    written: list[tuple[str, str]] = field(default_factory=list)

    def put(self, path: str, text: str) -> None:
        """Take what is written to a file. Raise OSError as the kernel does."""
        below = str(Path(path).relative_to(self.root))
        self.before(below)
        self.written.append((below, text))
        if found := _DRIVER.fullmatch(below):
            self._of_driver(found[1], found[2], text.strip())
        elif found := _ATTRIBUTE.fullmatch(below):
            if not self._there(found[1]):
                refuse(errno.ENOENT)
            self._of_attribute(found[1], found[2], text)
        else:
            raise AssertionError(f"nobody may write {below}")
        self.after(below)

    def admin(self, queue: str, **files: object) -> None:
        """An admin configures a queue, as accel-config does."""
        for file, value in files.items():
            self.put(f"{self.root}/{BUS}/{queue}/{file}", str(value))

    def bind(self, driver: str, what: str) -> None:
        self.put(f"{self.root}/{DRIVERS}/{driver}/bind", what)

    def unbind(self, driver: str, what: str) -> None:
        self.put(f"{self.root}/{DRIVERS}/{driver}/unbind", what)

    def reboot(self) -> None:
        """Nothing is configured, whatever was."""
        for one in sorted(self._folder("").iterdir()):
            if one.name.startswith(("dsa", "iax")) and one.is_symlink():
                self._disable(one.name)

    # ---------------------------------------------------------------- what tests look at

    def files(self, what: str, *names: str) -> dict[str, str]:
        return {name: self._text(what, name) for name in names or BLANK}

    def everything(self) -> dict[str, dict[str, str]]:
        """All of what can be configured, and what is bound."""
        found = {}
        for one in sorted(path.name for path in self._folder("").iterdir()):
            names = BLANK if one.startswith("wq") else ["group_id"] if one.startswith("engine") else ["state"]
            if not one.startswith("group"):
                found[one] = {**self.files(one, *names), "driver": self._bound(one)}
        return found

    def enabled(self) -> dict[str, str]:
        """The queues that are enabled, with their names."""
        return {
            one: said["name"]
            for one, said in self.everything().items()
            if one.startswith("wq") and said["state"] == "enabled"
        }

    # ---------------------------------------------------------------- files

    def _folder(self, what: str) -> Path:
        return self.root / BUS / what

    def _there(self, what: str) -> bool:
        return self._folder(what).is_dir()

    def _text(self, what: str, file: str) -> str:
        return (self._folder(what) / file).read_text().strip()

    def _number(self, what: str, file: str) -> int:
        return int(self._text(what, file))

    def _write(self, what: str, **files: object) -> None:
        for file, value in files.items():
            (self._folder(what) / file).write_text(f"{value}\n")

    def _owner(self, what: str) -> str:
        """The accelerator of a queue or an engine."""
        return self._folder(what).resolve().parent.name

    def _queues(self, owner: str) -> list[str]:
        return sorted(one.name for one in self._folder(owner).iterdir() if one.name.startswith("wq"))

    def _engines(self, owner: str) -> list[str]:
        return sorted(one.name for one in self._folder(owner).iterdir() if one.name.startswith("engine"))

    def _bound(self, what: str) -> str:
        link = self._folder(what) / "driver"
        return link.readlink().name if link.is_symlink() else ""

    # ---------------------------------------------------------------- attributes

    def _of_attribute(self, what: str, file: str, text: str) -> None:
        if not (self._folder(what) / file).exists():
            refuse(errno.ENOENT)
        setters = {
            "size": self._set_size,
            "group_id": self._set_group if what.startswith("engine") else self._set_group_id,
            "mode": self._set_mode,
            "priority": self._set_priority,
            "block_on_fault": self._set_block_on_fault,
            "threshold": self._set_threshold,
            "type": self._set_type,
            "name": self._set_name,
            "driver_name": self._set_driver_name,
        }
        if file not in setters:
            refuse(errno.EACCES)
        setters[file](what, self._owner(what), text)

    def _refuse_fixed(self, owner: str) -> None:
        if self._text(owner, "configurable") != "1":
            refuse(errno.EPERM)

    def _refuse_enabled(self, queue: str, number: int = errno.EPERM) -> None:
        if self._text(queue, "state") != "disabled":
            refuse(number)

    def _set_size(self, queue: str, owner: str, text: str) -> None:
        size = _number(text, least=0)
        self._refuse_fixed(owner)
        if self._text(owner, "state") == "enabled":
            refuse(errno.EPERM)
        others = sum(self._number(one, "size") for one in self._queues(owner) if one != queue)
        if size + others > self._number(owner, "max_work_queues_size"):
            refuse(errno.EINVAL)
        self._write(queue, size=size)

    def _set_group_id(self, queue: str, owner: str, text: str) -> None:
        _number(text)
        self._refuse_fixed(owner)
        self._refuse_enabled(queue)
        self._set_group(queue, owner, text)

    def _set_group(self, what: str, owner: str, text: str) -> None:
        group = _number(text)
        self._refuse_fixed(owner)
        if not -1 <= group < self._number(owner, "max_groups"):
            refuse(errno.EINVAL)
        assert self._text(owner, "state") == "disabled", f"the hardware takes no group of {what} now"
        self._write(what, group_id=group)

    def _set_mode(self, queue: str, owner: str, text: str) -> None:
        self._refuse_fixed(owner)
        self._refuse_enabled(queue)
        mode = text.rstrip("\n")
        if mode not in ("dedicated", "shared"):
            refuse(errno.EINVAL)
        self._write(queue, mode=mode, **({"threshold": 0} if mode == "dedicated" else {}))

    def _set_priority(self, queue: str, owner: str, text: str) -> None:
        priority = _number(text, least=0)
        self._refuse_fixed(owner)
        self._refuse_enabled(queue)
        if priority > MOST_PRIORITY:
            refuse(errno.EINVAL)
        self._write(queue, priority=priority)

    def _set_block_on_fault(self, queue: str, owner: str, text: str) -> None:
        if not self.faults:
            refuse(errno.EOPNOTSUPP)
        self._refuse_fixed(owner)
        self._refuse_enabled(queue, errno.ENXIO)
        if text.strip() not in ("0", "1"):
            refuse(errno.EINVAL)
        self._write(queue, block_on_fault=text.strip())

    def _set_threshold(self, queue: str, owner: str, text: str) -> None:
        threshold = _number(text, least=1)
        if threshold > self._number(queue, "size"):
            refuse(errno.EINVAL)
        self._refuse_fixed(owner)
        self._refuse_enabled(queue, errno.ENXIO)
        if self._text(queue, "mode") == "dedicated":
            refuse(errno.EINVAL)
        self._write(queue, threshold=threshold)

    def _set_type(self, queue: str, owner: str, text: str) -> None:
        self._refuse_enabled(queue)
        if text.strip() not in ("none", "kernel", "user"):
            refuse(errno.EINVAL)
        if text.strip() != self._text(queue, "type"):
            self._write(queue, name="")
        self._write(queue, type=text.strip())

    def _set_name(self, queue: str, owner: str, text: str) -> None:
        self._refuse_enabled(queue)
        if not 1 <= len(text) <= LONGEST_NAME:
            refuse(errno.EINVAL)
        if self._text(queue, "type") == "kernel":
            refuse(errno.EOPNOTSUPP)
        self._write(queue, name=text.strip())

    def _set_driver_name(self, queue: str, owner: str, text: str) -> None:
        self._refuse_enabled(queue)
        if not text:
            refuse(errno.EINVAL)
        self._write(queue, driver_name=text.strip())

    # ---------------------------------------------------------------- drivers

    def _of_driver(self, driver: str, file: str, what: str) -> None:
        fits = what.startswith(("dsa", "iax")) if driver == "idxd" else what.startswith("wq")
        if not fits or not self._there(what):
            refuse(errno.ENODEV)
        bind, unbind = {
            "idxd": (self._enable, self._disable),
            "user": (self._enable_queue, self._disable_queue),
        }[driver]
        if file == "unbind":
            if self._bound(what) != driver:
                refuse(errno.ENODEV)
            unbind(what)
            return
        if self._bound(what):
            refuse(errno.EBUSY)
        bind(what)
        target = os.path.relpath(self.root / DRIVERS / driver, self._folder(what).resolve())
        (self._folder(what) / "driver").symlink_to(target)

    def _enable(self, name: str) -> None:
        if self._text(name, "state") != "disabled" or self._misconfigured(name):
            refuse(errno.ENXIO)
        self._write(name, state="enabled", cmd_status="0x0")

    def _misconfigured(self, owner: str) -> bool:
        """Whether the driver refuses to write the configuration of the whole accelerator (idxd_device_config)."""
        grouped = [one for one in self._queues(owner) if self._number(one, "group_id") >= 0]
        for one in grouped:
            if self._text(one, "mode") == "shared" and not self._shares(owner, one):
                self._write(owner, cmd_status="0x800c0000")
                return True
            assert self._number(one, "size") or self._text(one, "type") == "none", f"{one} would get 16 entries"
        if not grouped:
            self._write(owner, cmd_status="0x800d0000")
        return not grouped or not [one for one in self._engines(owner) if self._number(one, "group_id") >= 0]

    def _shares(self, owner: str, queue: str) -> bool:
        """Whether a queue may be shared (wq_shared_supported): one that nothing uses may not."""
        return self.enqcmd and self._text(owner, "pasid_enabled") == "1" and self._text(queue, "type") == "user"

    def _enable_queue(self, queue: str) -> None:
        owner = self._owner(queue)
        if self._text(owner, "state") != "enabled":
            refuse(errno.ENXIO)
        if self._text(owner, "pasid_enabled") != "1":
            self._fail(owner, "0x80110000", errno.EOPNOTSUPP)
        if self._text(queue, "driver_name") != "user":
            self._fail(owner, "0x80200000", errno.ENODEV)
        self._write(queue, type="user")
        try:
            self._checked(queue, owner)
        except OSError:
            self._write(queue, type="none")
            raise
        self._write(queue, state="enabled")
        self._write(owner, cmd_status="0x0")
        if self.nodes:
            node = self._node(queue)
            node.parent.mkdir(parents=True, exist_ok=True)
            node.touch()

    def _checked(self, queue: str, owner: str) -> None:
        if self._text(queue, "state") != "disabled":
            self._fail(owner, "0x80000021", errno.EBUSY)
        if self._number(queue, "group_id") < 0:
            self._fail(owner, "0x80030000", errno.ENXIO)
        if not self._text(queue, "name"):
            self._fail(owner, "0x80040000", errno.ENXIO)
        if self._text(queue, "mode") == "shared":
            if not self._shares(owner, queue):
                self._fail(owner, "0x80050000", errno.ENXIO)
            if not self._number(queue, "threshold"):
                self._fail(owner, "0x80060000", errno.ENXIO)
        if self._misconfigured(owner):
            refuse(errno.EINVAL)

    def _fail(self, owner: str, status: str, number: int) -> NoReturn:
        self._write(owner, cmd_status=status)
        refuse(number)

    def _disable_queue(self, queue: str) -> None:
        self._node(queue).unlink(missing_ok=True)
        self._write(queue, **RESET)
        (self._folder(queue) / "driver").unlink(missing_ok=True)

    def _disable(self, name: str) -> None:
        for one in self._queues(name):
            self._disable_queue(one)
            self._write(one, **BLANK)
        for one in self._engines(name):
            self._write(one, group_id=-1)
        self._write(name, state="disabled")
        (self._folder(name) / "driver").unlink(missing_ok=True)

    def _node(self, queue: str) -> Path:
        return self.root / "dev" / self._owner(queue)[:3] / queue


def _number(text: str, *, least: int = -(1 << 31)) -> int:
    try:
        found = int(text)
    except ValueError:
        refuse(errno.EINVAL)
    if found < least:
        refuse(errno.EINVAL)
    return found
