"""The kernel's part of RDMA devices and their network namespaces: what becomes of RDMA netlink's messages, over real
namespaces, on a machine without RDMA.

As strict as drivers/infiniband/core/{netlink,nldev,device}.c (rdma_nl_rcv_msg, nldev_get_dumpit, nldev_set_doit,
nldev_sys_get_doit, ib_device_set_netns_put, rdma_dev_change_netns): a change needs CAP_NET_ADMIN (EPERM); a device that
there is not is EINVAL; a descriptor that is none EBADF, one of something else EINVAL; in the shared mode, and with a
driver that cannot disassociate its users, a move is EOPNOTSUPP; a device is moved only by a thread that is in its own
namespace, whatever the socket's is (ENODEV); an attribute that is too short is ERANGE. A device keeps its index and
name when it is moved; its verbs node gets the lowest number that is free. It reads and writes the bytes by itself, with
nothing of the package. With a file another process goes on with its state.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from nodeagent.host.netlink.connection import NetlinkError

GET, SET, SYS_GET = 5 << 10 | 1, 5 << 10 | 2, 5 << 10 | 6
INDEX, NAME, NODE_GUID, NETNS_MODE, NET_NS_FD = 1, 2, 6, 66, 68
NODE_TYPE, COPY_ON_FORK = 14, 93
NUMBERS = (INDEX, NET_NS_FD)
Answer = TypeVar("Answer")
_NS_GET_NSTYPE, _CLONE_NEWNET = 0xB703, 0x40000000


@dataclass
class Ib:
    """A device. namespace: (device, inode) of where it is; verbs: the number of its node."""

    index: int
    name: str
    guid: int
    namespace: list[int]
    verbs: int
    function: str
    disassociates: bool = True


@dataclass
class RdmaKernel:
    """Devices by name; `connect` is to be given to what talks to the kernel."""

    host: Path
    """The namespace that is the initial one."""
    root: Path | None = None
    """Where /sys is: the nodes of devices are kept there."""
    file: Path | None = None
    exclusive: bool = True
    may: bool = True
    """Whether the caller has CAP_NET_ADMIN."""
    before: Callable[[str], None] = lambda step: None
    """Called before and after each change takes effect; may raise."""
    devices: dict[str, Ib] = field(default_factory=dict)
    moves: list[str] = field(default_factory=list)
    """Names of what was moved."""
    opened: int = 0
    _last: int = 0
    """The index that was given last."""

    def add(self, name: str, function: str = "", *, guid: int = 0, disassociates: bool = True) -> Ib:
        """Register a device, on the host."""
        number = self._free()
        self._last += 1
        made = Ib(self._last, name, guid or zlib.crc32(name.encode()), _id(self.host), number, function)
        made.disassociates = disassociates
        self.devices[name] = made
        self._show(made)
        self._save()
        return made

    def remove(self, name: str) -> None:
        """Its driver unregisters it."""
        self.load()
        self._hide(self.devices.pop(name))
        self._save()

    def where(self, name: str, namespace: Path) -> bool:
        """Return whether a device is in a namespace."""
        self.load()
        return self.devices[name].namespace == _id(namespace)

    def end(self, namespace: Path) -> None:
        """What becomes of the devices of a namespace that ends: they return to the initial one."""
        self.load()
        for one in self.devices.values():
            if one.namespace == _id(namespace):
                self.returned(one.name)

    def returned(self, name: str) -> None:
        """A device returns to the initial namespace, whose own has ended."""
        self._change(self.devices[name], _id(self.host))

    def connect(self) -> _Connection:
        self.opened += 1
        return _Connection(self, _current())

    # ---------------------------------------------------------------- requests

    def sys_get(self, body: bytes) -> bytes:
        _parsed(body)
        return _attr(NETNS_MODE, bytes([not self.exclusive])) + _attr(COPY_ON_FORK, b"\1")

    def dump(self, namespace: list[int]) -> list[bytes]:
        there = [one for one in self.devices.values() if not self.exclusive or one.namespace == namespace]
        return [
            _attr(INDEX, struct.pack("=I", one.index))
            + _attr(NAME, one.name.encode() + b"\0")
            + _attr(NODE_GUID, struct.pack("=Q", one.guid))
            + _attr(NODE_TYPE, b"\1")
            for one in there
        ]

    def set(self, body: bytes) -> None:
        _require(self.may, errno.EPERM)
        found = _parsed(body)
        _require(INDEX in found, errno.EINVAL)
        (index,) = struct.unpack_from("=I", found[INDEX])
        mine = [one for one in self.devices.values() if one.index == index]
        _require(bool(mine), errno.EINVAL)
        assert not found.keys() - {INDEX, NET_NS_FD}, "the double knows nothing else"
        if NET_NS_FD not in found:
            return
        (fd,) = struct.unpack_from("=I", found[NET_NS_FD])
        target = _target(fd)
        _require(mine[0].disassociates and self.exclusive, errno.EOPNOTSUPP)
        _require(mine[0].namespace == _current(), errno.ENODEV)
        self.before(mine[0].name)
        self._change(mine[0], target)
        self.moves.append(mine[0].name)
        self.before(mine[0].name)

    # ---------------------------------------------------------------- state

    def _change(self, one: Ib, target: list[int]) -> None:
        """Unregister it for its users, and register it in another namespace."""
        self._hide(one)
        one.verbs = -1
        one.namespace, one.verbs = target, self._free()
        self._show(one)
        self._save()

    def _free(self) -> int:
        taken = {one.verbs for one in self.devices.values()}
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _show(self, one: Ib) -> None:
        """Its verbs node is in /sys, which is the same in all namespaces; itself only in that of its namespace."""
        if self.root is None:
            return
        parent = f"sys/bus/pci/devices/{one.function}" if one.function else "sys/devices/virtual"
        folder = (self.root / parent).resolve()
        verbs = f"uverbs{one.verbs}"
        shown = {("infiniband_verbs", verbs): {"ibdev": one.name, "dev": f"231:{192 + one.verbs}"}}
        if one.namespace == _id(self.host):
            shown["infiniband", one.name] = {"node_type": "1: CA"}
        for (kind, name), files in shown.items():
            (folder / kind / name).mkdir(parents=True)
            for file, text in files.items():
                (folder / kind / name / file).write_text(f"{text}\n")
            link = self.root / f"sys/class/{kind}/{name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(folder / kind / name, link.parent))

    def _hide(self, one: Ib) -> None:
        if self.root is not None:
            for shown in (f"infiniband_verbs/uverbs{one.verbs}", f"infiniband/{one.name}"):
                link = self.root / "sys/class" / shown
                if link.is_symlink():
                    shutil.rmtree(link.resolve())
                    link.unlink()

    def _save(self) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps([asdict(one) for one in self.devices.values()]))

    def load(self) -> None:
        """Read the state that another process has written."""
        if self.file is not None and self.file.exists():
            self.devices = {one["name"]: Ib(**one) for one in json.loads(self.file.read_text())}


class _Connection:
    """A socket, which stays in the namespace in which it was made."""

    def __init__(self, kernel: RdmaKernel, namespace: list[int]) -> None:
        self._kernel, self._namespace = kernel, namespace

    def get(self, what: str, kind: int, body: bytes) -> bytes | None:
        assert kind == SYS_GET, kind
        return self._answered(what, lambda: self._kernel.sys_get(body))

    def dump(self, what: str, kind: int, body: bytes) -> list[bytes]:
        assert (kind, body) == (GET, b""), (kind, body)
        return self._answered(what, lambda: self._kernel.dump(self._namespace))

    def change(self, what: str, kind: int, body: bytes) -> None:
        assert kind == SET, kind
        self._answered(what, lambda: self._kernel.set(body))

    def close(self) -> None:
        self._kernel.opened -= 1

    def _answered(self, what: str, work: Callable[[], Answer]) -> Answer:
        try:
            self._kernel.load()
            return work()
        except OSError as error:
            raise NetlinkError(what, error.errno or 0) from None


def _current() -> list[int]:
    """Return the namespace of the thread that calls."""
    return _id(Path("/proc/thread-self/ns/net"))


def _id(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino]


def _target(fd: int) -> list[int]:
    found = os.fstat(fd)  # EBADF
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    _require(kind == _CLONE_NEWNET, errno.EINVAL)
    return [found.st_dev, found.st_ino]


def _parsed(body: bytes) -> dict[int, bytes]:
    found = dict(_each(body))
    _require(all(len(found[one]) >= 4 for one in NUMBERS if one in found), errno.ERANGE)
    return found


def _attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def _each(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        _require(4 <= length <= len(data), errno.EINVAL)
        yield kind & 0x3FFF, data[4:length]
        data = data[length + (-length % 4) :]


def _require(holds: bool, code: int) -> None:
    if not holds:
        raise OSError(code, "")
