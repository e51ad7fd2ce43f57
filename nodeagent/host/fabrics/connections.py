"""Connections to NVMe targets on the network: those that exist (/sys/class/nvme), making one, and ending one.

Whose a connection is, and whether it may be ended, is for the caller to know. Blocks.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import msgspec

from nodeagent.core.fabrics.target import Host, Port, Secrets, host_of
from nodeagent.errors import HostError
from nodeagent.host.devices.nvme import Controller, namespaces
from nodeagent.host.fabrics.kernel import CLASS, FABRICS, Kernel
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

LIVE = "live"
_ANSWER = re.compile(r"instance=(\d+),cntlid=(\d+)")
_WHY = {
    errno.EALREADY: "it is connected already, and not by this agent",
    errno.EIO: "the target refuses it: it has no such subsystem, or does not allow this host",
    errno.ENOKEY: "the target does not accept the key",
    errno.EKEYREJECTED: "the target does not accept the key",
    errno.EINVAL: "the kernel refuses the options, its log says which",
}
_MOST_SECRET_BYTES = 256


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """A controller of a target."""

    name: str
    """Such as nvme3."""
    port: Port
    hostnqn: str
    state: str
    """LIVE, or as NVMe's driver calls it: new, resetting, connecting, deleting, dead."""
    disks: tuple[str, ...]
    """Names in /sys/class/block."""


class Connections:
    """Those of this machine."""

    def __init__(self, sysfs: SysFs, kernel: Kernel) -> None:
        self._sysfs = sysfs
        self._kernel = kernel

    def to(self, nqn: str) -> list[Connection]:
        """Return the connections to a subsystem, those of other programs too."""
        return [one for one in connections(self._sysfs) if one.port.nqn == nqn]

    def find(self, name: str, port: Port) -> Connection | None:
        """Return the connection with a controller's name, or None if it does not exist or leads elsewhere by now."""
        return next((one for one in self.to(port.nqn) if one.name == name and one.port == port), None)

    def connect(self, options: str, what: str) -> str:
        """Make a connection and return the name of its controller. what: for errors. Raise HostError, whose text never
        contains the options."""
        try:
            answer = self._kernel.connect(options)
        except OSError as error:
            raise HostError(f"cannot connect {what}: {_why(self._sysfs, error)}") from None
        match = _ANSWER.search(answer)
        if match is None:
            raise HostError(f"cannot connect {what}: the kernel answered {answer[:80]!r}, expected instance=N,cntlid=M")
        return f"nvme{match[1]}"

    def disconnect(self, one: Connection) -> None:
        """End a connection. Raise HostError if a disk of it is mounted or claimed, or the kernel refuses."""
        for disk in one.disks:
            if self._is_claimed(disk):
                raise HostError(
                    f"cannot disconnect {one.port}: /dev/{disk} is in use, by a mounted file system or another program "
                    "that has it to itself"
                )
        try:
            self._kernel.disconnect(one.name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # another program was faster
                raise HostError(f"cannot disconnect {one.port} ({one.name}): {error.strerror}") from None

    def _is_claimed(self, disk: str) -> bool:
        try:
            return self._kernel.is_claimed(disk)
        except OSError as error:
            raise HostError(f"cannot see whether /dev/{disk} is in use: {error.strerror}") from None


def connections(sysfs: SysFs) -> Iterator[Connection]:
    """Yield the connections to targets on the network. One that ends meanwhile is left out."""
    reader = Tolerant(sysfs)
    for name in sysfs.names(CLASS):
        path = sysfs.entry(CLASS, name)
        transport, nqn = reader.text(f"{path}/transport"), reader.text(f"{path}/subsysnqn")
        if transport in ("tcp", "rdma") and nqn:
            words = (word.partition("=") for word in (reader.text(f"{path}/address") or "").split(","))
            address = {key: value for key, _, value in words}
            port = address.get("trsvcid", "")
            disks = namespaces(reader, Controller(name=name, path=path, address=None))
            yield Connection(
                name=name,
                port=Port(
                    transport=transport,
                    traddr=address.get("traddr", ""),
                    trsvcid=int(port) if port.isascii() and port.isdigit() else 0,
                    nqn=nqn,
                ),
                hostnqn=reader.text(f"{path}/hostnqn") or "",
                state=reader.text(f"{path}/state") or "",
                disks=tuple(disks),
            )


def host(sysfs: SysFs, nqn: str) -> Host:
    """Return as whom to connect: the configured NQN, or the one that nvme-cli uses (/etc/nvme), or what the kernel made
    up when its module was loaded."""
    if nqn:
        return host_of(nqn)
    said = sysfs.text("etc/nvme/hostnqn", "")
    if not said:
        return Host()
    id = sysfs.text("etc/nvme/hostid", "")
    return Host(nqn=said, id=id or host_of(said).id)


def secrets(sysfs: SysFs, own: str, controller: str) -> Secrets:
    """Return the keys in two files, "" for none. Raise HostError if one cannot be read, without what is in it."""
    return Secrets(own=_secret(sysfs, own), controller=_secret(sysfs, controller))


def _secret(sysfs: SysFs, path: str) -> str:
    if not path:
        return ""
    text = sysfs.text(path.lstrip("/"))
    if not text or len(text) > _MOST_SECRET_BYTES or not text.startswith("DHHC-1:") or "," in text or "\n" in text:
        raise HostError(f"cannot use {path}: expected one key of DH-HMAC-CHAP, DHHC-1:…")
    return text


def _why(sysfs: SysFs, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) and not sysfs.exists(FABRICS):
        return f"there is no /{FABRICS}; `modprobe nvme-tcp` (or nvme-rdma) makes it"
    if error.errno == errno.EPERM:
        return f"the agent may not open /{FABRICS}; under systemd, nodeagent-nvmeof.conf allows it"
    return _WHY.get(error.errno or 0, error.strerror or str(error))
