"""The kernel's part of binding PCI functions to drivers, on a tree of files: what becomes of a text that is written to
driver_override, unbind, bind and drivers_probe.

As strict as drivers/base/bus.c and drivers/pci: a function that is bound is not bound again; only its driver can unbind
it; a driver takes what its table has, and a function that is reserved for a driver is taken by no other; vfio-pci takes
nothing that is not reserved for it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_DEVICE = re.compile(r"sys/bus/pci/devices/([^/]+)/(driver_override|driver/unbind)")
_DRIVER = re.compile(r"sys/bus/pci/drivers/([^/]+)/(bind|unbind)")
NONE = "(null)"


@dataclass
class PciKernel:
    """`put` is to be given to what writes. All state is in the tree: another process may go on with it. tables: the
    functions that each driver takes by itself."""

    root: Path
    tables: Mapping[str, frozenset[str]]
    vfio: frozenset[str] = frozenset({"vfio-pci"})
    before: Callable[[str], None] = lambda path: None
    """Called before each write takes effect; may raise or hang."""
    written: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in (*self.tables, *self.vfio):
            self._driver_folder(name).mkdir(parents=True, exist_ok=True)
        for address in self.functions():
            if not (self._function(address) / "driver_override").exists():
                (self._function(address) / "driver_override").write_text(f"{NONE}\n")

    def functions(self) -> list[str]:
        return sorted(one.name for one in (self.root / "sys/bus/pci/devices").iterdir())

    def driver(self, address: str) -> str:
        link = self._function(address) / "driver"
        return link.readlink().name if link.is_symlink() else ""

    def override(self, address: str) -> str:
        found = (self._function(address) / "driver_override").read_text().strip()
        return "" if found == NONE else found

    def put(self, path: str, text: str) -> None:
        """Take what is written to a file. Raise OSError as the kernel does."""
        below = str(Path(path).relative_to(self.root))
        self.before(below)
        self.written.append((below, text))
        if below == "sys/bus/pci/drivers_probe":
            return self._probe(text)
        if found := _DEVICE.fullmatch(below):
            return self._of_device(found[1], found[2], text)
        if found := _DRIVER.fullmatch(below):
            return self._of_driver(found[1], found[2], text)
        raise AssertionError(f"the kernel has no such file: {below}")

    def reboot(self) -> None:
        """Every function has the driver that takes it by itself, and is reserved for none."""
        for address in self.functions():
            (self._function(address) / "driver_override").write_text(f"{NONE}\n")
            self._detach(address)
            self._attach_any(address)

    # ---------------------------------------------------------------- files

    def _of_device(self, address: str, file: str, text: str) -> None:
        if address not in self.functions():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if file == "driver_override":
            name = text.rstrip("\n")
            (self._function(address) / "driver_override").write_text(f"{name or NONE}\n")
            return
        driver = self.driver(address)
        if not driver:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._of_driver(driver, "unbind", text)

    def _of_driver(self, driver: str, file: str, text: str) -> None:
        address = text.strip()
        if not self._driver_folder(driver).is_dir():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if address not in self.functions():
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if file == "unbind":
            if self.driver(address) != driver:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            self._detach(address)
        elif self.driver(address):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        elif not self._takes(driver, address):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        else:
            self._attach(address, driver)

    def _probe(self, text: str) -> None:
        address = text.strip()
        if address not in self.functions():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if not self.driver(address):
            self._attach_any(address)

    def _attach_any(self, address: str) -> None:
        for driver in (*self.tables, *self.vfio):
            if self._takes(driver, address):
                self._attach(address, driver)
                break

    def _takes(self, driver: str, address: str) -> bool:
        if reserved := self.override(address):
            return reserved == driver
        return address in self.tables.get(driver, ())

    # ---------------------------------------------------------------- links

    def _attach(self, address: str, driver: str) -> None:
        link = self._function(address) / "driver"
        link.symlink_to(os.path.relpath(self._driver_folder(driver), self._function(address).resolve()))

    def _detach(self, address: str) -> None:
        (self._function(address) / "driver").unlink(missing_ok=True)

    def _function(self, address: str) -> Path:
        return self.root / "sys/bus/pci/devices" / address

    def _driver_folder(self, name: str) -> Path:
        return self.root / "sys/bus/pci/drivers" / name
