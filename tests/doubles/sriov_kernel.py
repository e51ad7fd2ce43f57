"""The kernel's part of virtual functions, on a tree of files: what becomes of a number that is written to sriov_numvfs.

As strict as sriov_numvfs_store (drivers/pci/pci-sysfs.c): more than sriov_totalvfs is ERANGE; a function without a
driver that can is ENOENT; another number than 0 while there are some is EBUSY; the same number changes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.builders.devices import DeviceTree


@dataclass
class SriovKernel:
    """`put` is to be given to what writes. limits: what each driver makes at most, by physical function."""

    tree: DeviceTree
    limits: Mapping[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    """Error number of a driver that refuses, by physical function."""
    before: Callable[[str, str], None] = lambda address, text: None
    """Called before each write takes effect; may raise or hang."""
    after: Callable[[str, str], None] = lambda address, text: None
    written: list[tuple[str, str, str]] = field(default_factory=list)

    def port(self, address: str, total: int = 8, *, driver: str | None = "ice", name: str = "") -> None:
        """A physical function without virtual ones."""
        files = {"sriov_totalvfs": total, "sriov_numvfs": 0, "sriov_drivers_autoprobe": 1}
        self.tree.pci(address, driver=driver, numa_node=0, files=files)
        if name:
            self.tree.net(address, name)

    def count(self, address: str) -> int:
        return int((self._folder(address) / "sriov_numvfs").read_text())

    def vfs(self, address: str) -> list[str]:
        return [f"{address[:8]}{1 + int(address[-1]):02x}.{index}" for index in range(self.count(address))]

    def put(self, path: str, text: str) -> None:
        """Take what is written to a file. Raise OSError as the kernel does."""
        parts = Path(path).relative_to(self.tree.root).parts
        assert parts[:4] == ("sys", "bus", "pci", "devices") and len(parts) == 6, path
        address, file = parts[4:]
        self.before(address, text)
        self.written.append((address, file, text))
        if not self._folder(address).exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if file == "sriov_drivers_autoprobe":
            assert text in ("0", "1")
            (self._folder(address) / file).write_text(text)
        elif file == "sriov_numvfs":
            self._store(address, int(text))
        else:
            raise AssertionError(f"nothing writes to {file}")
        self.after(address, text)

    def reboot(self) -> None:
        """All virtual functions are gone."""
        for folder in (self.tree.root / "sys/bus/pci/devices").iterdir():
            if (folder / "sriov_numvfs").exists():
                self._clear(folder.name)

    def _store(self, address: str, wanted: int) -> None:
        folder, there = self._folder(address), self.count(address)
        if wanted > int((folder / "sriov_totalvfs").read_text()):
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        if not (folder / "driver").is_symlink():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if wanted == there:
            return
        if wanted == 0:
            self._clear(address)
        elif there:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        elif address in self.refusals:
            raise OSError(self.refusals[address], os.strerror(self.refusals[address]))
        else:
            self._make(address, min(wanted, self.limits.get(address, wanted)))

    def _make(self, address: str, count: int) -> None:
        probed = (self._folder(address) / "sriov_drivers_autoprobe").read_text().strip() == "1"
        total = (self._folder(address) / "sriov_totalvfs").read_text()
        for index in range(count):
            vf = f"{address[:8]}{1 + int(address[-1]):02x}.{index}"
            folder = self.tree.vf(address, index, vf)
            if not probed:
                (folder / "driver").unlink()
        (self._folder(address) / "sriov_totalvfs").write_text(total)
        (self._folder(address) / "sriov_numvfs").write_text(f"{count}\n")

    def _clear(self, address: str) -> None:
        for index, vf in enumerate(self.vfs(address)):
            (self._folder(address) / f"virtfn{index}").unlink()
            shutil.rmtree(self._folder(vf))
            (self.tree.root / "sys/bus/pci/devices" / vf).unlink()
        (self._folder(address) / "sriov_numvfs").write_text("0\n")

    def _folder(self, address: str) -> Path:
        return (self.tree.root / "sys/bus/pci/devices" / address).resolve()
