"""RDMA devices and their network namespaces, as `rdma dev set NAME netns` of iproute2 moves them.

Source: include/uapi/rdma/rdma_netlink.h; drivers/infiniband/core/nldev.c and device.c (ib_device_set_netns_put,
rdma_dev_change_netns, rdma_dev_exit_net). With `rdma system set netns exclusive` a device is in one namespace: only
processes of it can open its nodes. In the shared mode, the kernel's default, it is in all of them, and cannot be moved.

The kernel moves a device only if the thread that asks is in the device's own namespace, whatever the socket's is: every
request is sent by a thread that has entered it. A move resets the device for all who use it. It keeps its name and
index; its nodes are created again, and may be numbered differently. When a namespace ends, its devices return to the
initial one.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from nodeagent.errors import HostError, cause_of
from nodeagent.host.netlink.connection import Netlink
from nodeagent.host.netlink.messages import attributes, number, read_number, read_text
from nodeagent.host.netlink.namespaces import NetNamespace
from nodeagent.host.sysfs.sysfs import SysFs

_NETLINK_RDMA = 20
_NLDEV = 5 << 10
_GET, _SET, _SYS_GET = _NLDEV | 1, _NLDEV | 2, _NLDEV | 6
_INDEX, _NAME, _NODE_GUID, _NETNS_MODE, _NET_NS_FD = 1, 2, 6, 66, 68
_SHARED = 1
_NODE_CLASSES = ("infiniband_verbs", "infiniband_mad")
_NODE = re.compile(r"(?:uverbs|umad|issm)\d+")
_Answer = TypeVar("_Answer")


class RdmaDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One RDMA device."""

    index: int
    """Which the kernel gives to no other device as long as this one is registered."""
    name: str
    node_guid: str = ""
    """16 hexadecimal digits."""

    def is_it(self, other: RdmaDevice) -> bool:
        """Return whether another value is of the same device: renamed since, or registered again by its driver."""
        return self.node_guid == other.node_guid and (self.index == other.index or self.name == other.name)


class Exchange(Protocol):
    """What exchanges messages with the kernel; see `Netlink`."""

    def get(self, what: str, kind: int, body: bytes) -> bytes | None: ...

    def dump(self, what: str, kind: int, body: bytes) -> list[bytes]: ...

    def change(self, what: str, kind: int, body: bytes) -> None: ...

    def close(self) -> None: ...


Connect = Callable[[], Exchange]
"""Returns a new exchange in the network namespace of the thread that calls it. Raises HostError."""


def connected() -> Exchange:
    """Return an exchange with the kernel; see `Connect`."""
    try:
        return Netlink(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_RDMA))
    except OSError as error:
        raise HostError(f"cannot talk to the kernel through RDMA netlink: {cause_of(error)}") from None


class RdmaDevices:
    """The RDMA devices of one network namespace. Every method blocks and raises HostError."""

    def __init__(self, namespace: NetNamespace, connect: Connect = connected) -> None:
        self._namespace = namespace
        self._connect = connect

    def are_exclusive(self) -> bool:
        """Return whether a device is in one network namespace at a time; the machine has one mode."""
        what = "cannot read the mode of `rdma system`"
        answer = self._asked(lambda exchange: exchange.get(what, _SYS_GET, b""))
        mode = attributes(answer or b"").get(_NETNS_MODE)
        if not mode:
            raise HostError(f"{what}: the kernel does not report it")
        return mode[0] != _SHARED

    def devices(self) -> list[RdmaDevice]:
        """Return the devices that can be used here, in order of their index; in the shared mode all of the machine."""
        found = self._asked(lambda exchange: exchange.dump("cannot list RDMA devices", _GET, b""))
        return sorted(map(_read_device, found), key=lambda one: one.index)

    def move(self, device: RdmaDevice, target: NetNamespace) -> None:
        """Move a device of this namespace to another one."""
        what = f"cannot move RDMA device {device.name} to {target.path}"
        body = number(_INDEX, device.index) + number(_NET_NS_FD, target.fd)
        self._asked(lambda exchange: exchange.change(what, _SET, body))

    def _asked(self, ask: Callable[[Exchange], _Answer]) -> _Answer:
        def inside() -> _Answer:
            exchange = self._connect()
            try:
                return ask(exchange)
            finally:
                exchange.close()

        return self._namespace.run(inside)


def rdma_nodes(sysfs: SysFs, name: str) -> tuple[str, ...]:
    """Return the device nodes of an RDMA device, such as /dev/infiniband/uverbs0, sorted; none if no namespace of the
    machine has such a device. Its nodes are the same in all of them."""
    found = []
    for kind in _NODE_CLASSES:
        for node in sysfs.names(f"sys/class/{kind}"):
            if _NODE.fullmatch(node) and sysfs.text(f"sys/class/{kind}/{node}/ibdev", "") == name:
                found.append(f"/dev/infiniband/{node}")
    return tuple(sorted(found))


def _read_device(data: bytes) -> RdmaDevice:
    found = attributes(data)
    guid = int.from_bytes(found.get(_NODE_GUID, b""), sys.byteorder)
    return RdmaDevice(index=read_number(found.get(_INDEX)), name=read_text(found.get(_NAME)), node_guid=f"{guid:016x}")
