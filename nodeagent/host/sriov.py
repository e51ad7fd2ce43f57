"""Virtual functions of PCI functions: how many there are, and making and removing them.

Source: Documentation/ABI/testing/sysfs-bus-pci, drivers/pci/pci-sysfs.c and iov.c. A driver may make fewer than were
asked for, and may take long; a write has a deadline.
"""

from __future__ import annotations

from collections.abc import Collection

from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut

DEADLINE_S = 120.0
"""A driver resets its adapter, and the kernel probes a driver for each function."""
_DEVICES = "sys/bus/pci/devices"


class VirtualFunctions:
    """The physical functions below a root. Every method blocks."""

    def __init__(self, sysfs: SysFs, put: TimedPut | None = None) -> None:
        self._sysfs = sysfs
        self._put = put or TimedPut(deadline_s=DEADLINE_S)

    def count(self, address: str) -> int:
        """Return how many virtual functions a physical one has. Raise HostError if that is unknown."""
        found = self._sysfs.number(f"{_DEVICES}/{address}/sriov_numvfs")
        if found is None:
            raise HostError(
                f"cannot read {self._sysfs.path(f'{_DEVICES}/{address}/sriov_numvfs')}: there is no such file"
            )
        return found

    def has_none(self, address: str) -> bool:
        """Return whether a physical function has no virtual ones, and gets none by a write that has not ended. Raise
        HostError if that is unknown."""
        return not self._put.hangs(address) and not self.count(address)

    def make(self, address: str, wanted: int, *, autoprobe: bool | None = None) -> None:
        """Give a physical function that has none so many virtual ones. Raise HostError, also if the driver makes fewer:
        these are removed again.

        autoprobe: whether the kernel binds new ones to a driver, or None to leave that as it is.
        """
        self._refuse_unless(address, {0, wanted})
        if autoprobe is not None:
            self._write(address, "sriov_drivers_autoprobe", int(autoprobe))
        if self.count(address) != wanted:
            self._write(address, "sriov_numvfs", wanted)
        if (found := self.count(address)) != wanted:
            self._write(address, "sriov_numvfs", 0)
            raise HostError(f"cannot give {address} {wanted} virtual functions: its driver made {found}")

    def remove(self, address: str, expected: int) -> None:
        """Remove all virtual functions of a physical one. Raise HostError, also if it has another number than
        expected."""
        self._refuse_unless(address, {0, expected})
        if self.count(address):
            self._write(address, "sriov_numvfs", 0)

    def _refuse_unless(self, address: str, counts: Collection[int]) -> None:
        if self._put.hangs(address):
            raise HostError(f"cannot change the virtual functions of {address}: an earlier write has not ended")
        if (found := self.count(address)) not in counts:
            raise HostError(f"cannot change the virtual functions of {address}: another program made {found} meanwhile")

    def _write(self, address: str, file: str, value: int) -> None:
        self._put(self._sysfs.path(f"{_DEVICES}/{address}/{file}"), str(value))
