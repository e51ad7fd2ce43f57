"""The kernel's side of NVMe over fabrics: connecting, disconnecting, and whether something has a disk open.

Each call is one of the kernel's own, without any decision. All block: a connection that is being made waits for the
network (with TCP, 3 s for an address that does not answer, 10 s for a server that is no target, 60 s for a target that
hangs: drivers/nvme/host/tcp.c and core.c), and while one waits, the kernel makes no other.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from nodeagent.host.sysfs.sysfs import SysFs

FABRICS = "dev/nvme-fabrics"
CLASS = "sys/class/nvme"


class Kernel(Protocol):
    """What is asked of the kernel. Every call raises OSError."""

    def connect(self, options: str) -> str:
        """Connect and return the kernel's answer, such as "instance=0,cntlid=1"."""
        ...

    def disconnect(self, controller: str) -> None:
        """End a connection, by the name of its controller. Its disks are gone on return."""
        ...

    def is_claimed(self, disk: str) -> bool:
        """Return whether a file system, a swap or another program has a disk, or a partition of it, to itself."""
        ...


class HostKernel:
    """The running kernel."""

    def __init__(self, sysfs: SysFs) -> None:
        self._sysfs = sysfs

    def connect(self, options: str) -> str:
        """As Kernel.connect. The answer is read from the file into which the options were written: the kernel keeps it
        there (nvmf_dev_show)."""
        handle = os.open(self._sysfs.path(FABRICS), os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(handle, options.encode())
            return os.read(handle, 4096).decode(errors="replace").strip()
        finally:
            os.close(handle)

    def disconnect(self, controller: str) -> None:
        """As Kernel.disconnect."""
        handle = os.open(self._sysfs.path(f"{CLASS}/{controller}/delete_controller"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(handle, b"1\n")
        finally:
            os.close(handle)

    def is_claimed(self, disk: str) -> bool:
        """As Kernel.is_claimed. A disk that is mounted in any mount namespace, or that a device mapper uses, cannot be
        opened exclusively; nor can one with such a partition (bd_may_claim, block/bdev.c)."""
        try:
            os.close(os.open(self._sysfs.path(f"dev/{disk}"), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                return False
            raise
        return False
