"""The kernel's part of NVMe over fabrics, on a tree of files: what becomes of what is written to /dev/nvme-fabrics and
to delete_controller, and the targets that it reaches.

As strict as nvmf_parse_options and nvmf_create_ctrl (drivers/nvme/host/fabrics.c, Linux 6.12): an option that is not
known, given twice, missing or too long is EINVAL; so is one UUID for two host NQNs, or the reverse (nvmf_host_add). A
second connection of a host to a port of a subsystem is EALREADY; a target that is not there is ECONNREFUSED; one that
does not have the subsystem, or does not allow the host, is EIO. With native multipath a disk is called after its
subsystem, and the controller's folder has it with a path's name.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.builders.devices import DeviceTree

OPTIONS = {"transport", "traddr", "trsvcid", "nqn", "hostnqn", "hostid", "ctrl_loss_tmo", "reconnect_delay"}
OPTIONS |= {"fast_io_fail_tmo", "dhchap_secret", "dhchap_ctrl_secret"}
NEEDED = {"transport", "traddr", "nqn"}
LONGEST_NQN = 223
HOSTID = "a9b1e2fe-0000-4000-8000-000000000001"
HOSTNQN = f"nqn.2014-08.org.nvmexpress:uuid:{HOSTID}"
"""What the module makes up when it is loaded."""


@dataclass
class Target:
    """A subsystem on a server. disks: how many namespaces a host sees. hosts: who may connect; None: any."""

    nqn: str
    traddr: str = "192.0.2.1"
    trsvcid: int = 4420
    transport: str = "tcp"
    disks: int = 1
    hosts: frozenset[str] | None = None
    key: str = ""
    up: bool = True
    silent: threading.Event | None = None
    """Does not answer before this is set."""


@dataclass
class Controller:
    """A connection of the node."""

    name: str
    options: dict[str, str]
    disks: list[str]


@dataclass
class FabricsKernel:
    """A host, and the targets that it reaches. `before` is called before and after each step, and may raise."""

    tree: DeviceTree
    targets: list[Target] = field(default_factory=list)
    controllers: dict[str, Controller] = field(default_factory=dict)
    mounted: set[str] = field(default_factory=set)
    """Disks that have a mounted file system."""
    written: list[str] = field(default_factory=list)
    before: Callable[[str], None] = lambda step: None
    multipath: bool = False
    loaded: bool = True
    subsystems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.loaded:
            self.tree.node("/dev/nvme-fabrics")

    # ---------------------------------------------------------------- what the agent does

    def connect(self, text: str) -> str:
        """What is written to /dev/nvme-fabrics, and the answer that is read."""
        self.before("connect")
        if not self.loaded:
            raise _error(errno.ENOENT)
        self.written.append(text)
        options = self._parsed(text)
        target = self._reached(options)
        made = self._made(options, target)
        self.before("connect")
        return f"instance={made.name.removeprefix('nvme')},cntlid=1"

    def disconnect(self, name: str) -> None:
        """What is written to delete_controller."""
        self.before("disconnect")
        if name not in self.controllers:
            raise _error(errno.ENOENT)
        self.remove(name)
        self.before("disconnect")

    def is_claimed(self, disk: str) -> bool:
        return disk in self.mounted

    # ---------------------------------------------------------------- what others do

    def by_admin(self, target: Target, **more: str) -> str:
        """`nvme connect` of an admin. Return the controller's name."""
        options = {"transport": target.transport, "traddr": target.traddr, "trsvcid": str(target.trsvcid)}
        return self._made({**options, "nqn": target.nqn, "hostnqn": HOSTNQN, "hostid": HOSTID, **more}, target).name

    def lose(self, target: Target) -> None:
        """The target is gone: its controllers try to connect again."""
        target.up = False
        for one in self._to(target):
            self._folder(one.name, "state").write_text("connecting\n")

    def restore(self, target: Target) -> None:
        target.up = True
        for one in self._to(target):
            self._folder(one.name, "state").write_text("live\n")

    def remove(self, name: str) -> None:
        """A controller ends, with its disks."""
        one = self.controllers.pop(name)
        shutil.rmtree(self.tree.root / "sys/devices/virtual/nvme-fabrics/ctl" / name)
        (self.tree.root / "sys/class/nvme" / name).unlink()
        for disk in one.disks:
            self._forget_disk(disk)

    def reboot(self) -> None:
        for name in list(self.controllers):
            self.remove(name)
        self.mounted.clear()

    def load(self) -> None:
        """Take over the connections that the tree has, as of another process's double."""
        self.controllers.clear()
        folder = self.tree.root / "sys/class/nvme"
        for entry in sorted(folder.iterdir()) if folder.exists() else ():
            said = {name: (entry / name).read_text().strip() for name in ("transport", "hostnqn", "hostid")}
            address = dict(word.split("=") for word in (entry / "address").read_text().strip().split(","))
            options = {**said, **address, "nqn": (entry / "subsysnqn").read_text().strip()}
            disks = [one.name for one in sorted(entry.iterdir()) if one.is_dir()]
            self.controllers[entry.name] = Controller(entry.name, options, disks)

    def connected(self) -> dict[str, str]:
        """The subsystems that the node is connected to, by controller."""
        return {name: one.options["nqn"] for name, one in self.controllers.items()}

    # ---------------------------------------------------------------- inside

    def _to(self, target: Target) -> list[Controller]:
        return [one for one in self.controllers.values() if one.options["nqn"] == target.nqn]

    def _parsed(self, text: str) -> dict[str, str]:
        options: dict[str, str] = {}
        for word in text.removesuffix("\n").split(","):
            name, equals, value = word.partition("=")
            if not equals or name not in OPTIONS or name in options or not value:
                raise _error(errno.EINVAL)
            options[name] = value
        if not options.keys() >= NEEDED or options["transport"] not in ("tcp", "rdma"):
            raise _error(errno.EINVAL)
        if any(len(options.get(name, "").encode()) > LONGEST_NQN for name in ("nqn", "hostnqn")):
            raise _error(errno.EINVAL)
        for name in ("trsvcid", "ctrl_loss_tmo", "reconnect_delay", "fast_io_fail_tmo"):
            if name in options and not options[name].removeprefix("-").isdigit():
                raise _error(errno.EINVAL)
        if options.get("reconnect_delay", "1").startswith(("-", "0")):
            raise _error(errno.EINVAL)
        options.setdefault("hostnqn", HOSTNQN)
        options.setdefault("hostid", HOSTID)
        uuid.UUID(options["hostid"])
        hosts = [(it.options["hostnqn"], it.options["hostid"]) for it in self.controllers.values()]
        for nqn, id in [(HOSTNQN, HOSTID), *hosts]:
            if (nqn == options["hostnqn"]) != (id == options["hostid"]):
                raise _error(errno.EINVAL)
        return options

    def _reached(self, options: dict[str, str]) -> Target:
        same = ("transport", "traddr", "trsvcid", "nqn", "hostnqn")
        if any(all(one.options[key] == options.get(key) for key in same) for one in self.controllers.values()):
            raise _error(errno.EALREADY)
        where = options["transport"], options["traddr"], options.get("trsvcid", "4420")
        there = [it for it in self.targets if it.up and (it.transport, it.traddr, str(it.trsvcid)) == where]
        if not there:
            raise _error(errno.ECONNREFUSED)
        target = next((it for it in there if it.nqn == options["nqn"]), None)
        if target is not None and target.silent is not None:
            target.silent.wait(20)
        if target is None or not target.up or (target.hosts is not None and options["hostnqn"] not in target.hosts):
            raise _error(errno.EIO)
        if target.key and options.get("dhchap_secret") != target.key:
            raise _error(errno.EKEYREJECTED)
        return target

    def _made(self, options: dict[str, str], target: Target) -> Controller:
        number = next(it for it in range(99) if f"nvme{it}" not in self.controllers)
        name = f"nvme{number}"
        if target.nqn not in self.subsystems:
            self.subsystems.append(target.nqn)
        head = self.subsystems.index(target.nqn) + 40 if self.multipath else number
        disks = [f"nvme{head}n{it + 1}" for it in range(target.disks)]
        folder = f"sys/devices/virtual/nvme-fabrics/ctl/{name}"
        files = {
            "transport": options["transport"],
            "address": f"traddr={options['traddr']},trsvcid={options['trsvcid']},src_addr=192.0.2.99",
            "subsysnqn": options["nqn"],
            "hostnqn": options["hostnqn"],
            "hostid": options["hostid"],
            "state": "live",
            "cntlid": "1",
            "serial": uuid.uuid5(uuid.NAMESPACE_OID, target.nqn).hex[:20],
            "model": "Linux",
        }
        for file, text in files.items():
            self._folder(name, file).parent.mkdir(parents=True, exist_ok=True)
            self._folder(name, file).write_text(f"{text}\n")
        for it, disk in enumerate(disks):
            path = f"nvme{head}c{number}n{it + 1}" if self.multipath else disk
            (self.tree.root / folder / path).mkdir()
            self._add_disk(disk)
        entry = self.tree.root / "sys/class/nvme" / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.symlink_to(f"../../devices/virtual/nvme-fabrics/ctl/{name}")
        one = self.controllers[name] = Controller(name, options, disks)
        return one

    def grow(self, name: str) -> None:
        """The target of a controller gets another namespace; without multipath."""
        one = self.controllers[name]
        disk = f"{name}n{len(one.disks) + 1}"
        self._folder(name, disk).mkdir()
        self._add_disk(disk)
        one.disks.append(disk)

    def _add_disk(self, disk: str) -> None:
        folder = self.tree.root / "sys/devices/virtual/nvme-subsystem" / disk
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "size").write_text("2048\n")
        entry = self.tree.root / "sys/class/block" / disk
        entry.parent.mkdir(parents=True, exist_ok=True)
        if not entry.is_symlink():
            entry.symlink_to(f"../../devices/virtual/nvme-subsystem/{disk}")
        self.tree.node(f"/dev/{disk}")

    def _forget_disk(self, disk: str) -> None:
        if any(disk in one.disks for one in self.controllers.values()):
            return  # another path leads to it
        (self.tree.root / "sys/class/block" / disk).unlink()
        shutil.rmtree(self.tree.root / "sys/devices/virtual/nvme-subsystem" / disk)
        (self.tree.root / "dev" / disk).unlink()

    def _folder(self, name: str, file: str) -> Path:
        return self.tree.root / "sys/devices/virtual/nvme-fabrics/ctl" / name / file


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
