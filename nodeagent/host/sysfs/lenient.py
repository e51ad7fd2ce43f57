"""Lenient reading: an unreadable file becomes a warning and None, and never ends a scan.

SysFs stays strict; only here are its errors turned into texts for Inventory.warnings. So one bad file costs one fact
rather than its device, and one bad device affects no other.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs

T = TypeVar("T")
_UNSAID = (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO)


class Tolerant:
    """A SysFs whose readers return None for what is missing or bad; bad files are also noted in `warnings`."""

    def __init__(self, sysfs: SysFs) -> None:
        self.sysfs = sysfs
        self.warnings: list[str] = []

    def read(self, reader: Callable[[str], T | None], path: str) -> T | None:
        """Return what `reader` (a method of SysFs) makes of a path, or None if it raises HostError."""
        try:
            return reader(path)
        except HostError as error:
            self.warnings.append(str(error))
            return None

    def text(self, path: str) -> str | None:
        """Return the stripped content of a file, or None if it is missing, empty or unreadable."""
        return self.read(lambda one: self.sysfs.text(one, None), path) or None

    def number(self, path: str) -> int | None:
        """Return the number in a file, or None."""
        return self.read(self.sysfs.number, path)

    def link_name(self, path: str) -> str | None:
        """Return the last part of what a link points to, or None."""
        return self.read(self.sysfs.link_name, path)

    def names(self, path: str) -> list[str]:
        """Return the names in a folder in order; none if it cannot be listed."""
        return self.read(self.sysfs.names, path) or []

    def cpu_mask(self, path: str) -> CpuSet | None:
        """Return a set of CPUs that is written as a hexadecimal mask, or None."""
        return self.read(self.sysfs.cpu_mask, path)

    def cpus(self, path: str) -> CpuSet | None:
        """Return a set of CPUs in list syntax, or None."""
        return self.read(self.sysfs.cpus, path)

    def hexadecimal(self, path: str, digits: int) -> str | None:
        """Return "0x8086" as "8086", in lower case, or None. The file must exist: the kernel always provides it."""
        text = self.read(self.sysfs.text, path)
        if text is None:
            return None
        found = text[2:].lower()
        if text[:2].lower() == "0x" and len(found) == digits and set(found) <= set("0123456789abcdef"):
            return found
        self.warn(path, f"{text[:80]!r} is not 0x and {digits} hexadecimal digits")
        return None

    def if_told(self, path: str) -> str | None:
        """Return a text that a driver may decline to provide, or None: `speed`, `carrier` and `phys_port_name` of a
        network device fail with EINVAL or EOPNOTSUPP while they have no value
        (Documentation/ABI/testing/sysfs-class-net)."""
        try:
            return self.sysfs.text(path, None) or None
        except HostError as error:
            if not _declined(error):
                self.warnings.append(str(error))
            return None

    def number_if_told(self, path: str) -> int | None:
        """Return the number in a file that the kernel may leave empty or refuse to answer, or None."""
        text = self.if_told(path)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            self.warn(path, f"{text[:80]!r} is not a number")
            return None

    def warn(self, path: str, cause: str) -> None:
        """Add a warning about a path."""
        self.warnings.append(f"cannot read {self.sysfs.path(path)}: {cause}")


def _declined(error: HostError) -> bool:
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in _UNSAID
