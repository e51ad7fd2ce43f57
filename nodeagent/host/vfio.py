"""PCI functions bound to a VFIO driver, and given back: driver_override, unbind, drivers_probe.

Source: Documentation/ABI/testing/sysfs-bus-pci and drivers/base/bus.c. Every step looks at what is there first, so that
it can be taken again after a crash at any point. A write can hang in a driver that waits for its users: it has a
deadline, and the thread that hangs is left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

DEADLINE_S = 8.0
_DEVICES, _DRIVERS = "sys/bus/pci/devices", "sys/bus/pci/drivers"
_PROBE = "sys/bus/pci/drivers_probe"
_NONE = "(null)"
"""What driver_override shows if there is none."""
_BRIDGE = "0x0604"
Put = Callable[[str, str], None]
"""Writes a text to a file. Raises OSError."""


def write(path: str, text: str) -> None:
    """Write to a file of the kernel, in one call."""
    with Path(path).open("w") as file:
        file.write(text)


class TimedPut:
    """Writes within a deadline. What hangs is not written again before it has ended."""

    def __init__(self, put: Put = write, deadline_s: float = DEADLINE_S) -> None:
        self._put = put
        self._deadline_s = deadline_s
        self._hanging: dict[str, threading.Thread] = {}

    def hangs(self, address: str) -> bool:
        """Return whether a write that concerns a function has not ended: it may still take effect."""
        self._hanging = {path: one for path, one in self._hanging.items() if one.is_alive()}
        return any(address in path for path in self._hanging)

    def __call__(self, path: str, text: str) -> None:
        """Write. Raise HostError if it fails, or does not end in time."""
        failed: list[OSError] = []
        thread = threading.Thread(target=self._run, args=(path, text, failed), name="vfio", daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if thread.is_alive():
            self._hanging[f"{path} {text}"] = thread
            raise HostError(f"cannot write {path}: it did not end within {self._deadline_s:g} s")
        if failed:
            raise HostError(f"cannot write {text.strip() or 'nothing'} to {path}: {failed[0].strerror}")

    def _run(self, path: str, text: str, failed: list[OSError]) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            failed.append(error)


class Functions:
    """The PCI functions below a root. Every method blocks."""

    def __init__(self, sysfs: SysFs, put: TimedPut | None = None) -> None:
        self._sysfs = sysfs
        self._put = put or TimedPut()

    def group(self, address: str) -> list[str]:
        """Return the functions of an IOMMU group, without bridges. Raise HostError if there is no group."""
        names = self._sysfs.names(f"{_DEVICES}/{address}/iommu_group/devices")
        if address not in names:
            raise HostError(f"cannot find the IOMMU group of {address}")
        classes = {name: self._sysfs.text(f"{_DEVICES}/{name}/class", "") for name in names}
        return [name for name in names if not classes[name].startswith(_BRIDGE)]

    def driver(self, address: str) -> str:
        """Return the driver that a function is bound to, or ""."""
        return self._sysfs.link_name(f"{_DEVICES}/{address}/driver") or ""

    def override(self, address: str) -> str:
        """Return the driver that a function is reserved for, or ""."""
        found = self._sysfs.text(f"{_DEVICES}/{address}/driver_override", "")
        return "" if found == _NONE else found

    def bind(self, address: str, driver: str) -> None:
        """Bind a function to a driver that takes any function it is told to. Raise HostError."""
        self._refuse_while_hanging(address)
        if not self._sysfs.exists(f"{_DRIVERS}/{driver}"):
            raise HostError(f"cannot bind {address}: there is no driver {driver} (modprobe {driver})")
        if self.override(address) != driver:
            self._write(f"{_DEVICES}/{address}/driver_override", driver)
        if self.driver(address) != driver:
            self._unbind(address)
            self._write(_PROBE, address)
        if (found := self.driver(address)) != driver:
            raise HostError(f"cannot bind {address} to {driver}: it is bound to {found or 'no driver'}")

    def give_back(self, address: str, driver: str, override: str) -> None:
        """Bind a function to the driver that it had, "" for none. override: what it was reserved for. Raise
        HostError."""
        self._refuse_while_hanging(address)
        if not self._sysfs.exists(f"{_DEVICES}/{address}"):
            return  # it has been removed, and the kernel forgot both
        if self.override(address) != override:
            self._write(f"{_DEVICES}/{address}/driver_override", override or "\n")
        if self.driver(address) == driver:
            return
        self._unbind(address)
        if driver:
            self._write(_PROBE, address)
        if driver and self.driver(address) not in ("", driver):
            self._unbind(address)
        if driver and self.driver(address) != driver:
            self._write(f"{_DRIVERS}/{driver}/bind", address)
        if (found := self.driver(address)) != driver:
            raise HostError(f"cannot give {address} back to {driver or 'no driver'}: it is bound to {found or 'none'}")

    def _refuse_while_hanging(self, address: str) -> None:
        """Raise HostError while an earlier write may still change the function's driver."""
        if self._put.hangs(address):
            raise HostError(f"cannot change the driver of {address}: an earlier write has not ended")

    def _unbind(self, address: str) -> None:
        if self.driver(address):
            self._write(f"{_DEVICES}/{address}/driver/unbind", address)

    def _write(self, path: str, text: str) -> None:
        self._put(self._sysfs.path(path), text)
