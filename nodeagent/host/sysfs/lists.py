"""The lenient reader of the machine's topology: CPU lists and masks, numbered folders, files that must exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nodeagent.core.model.cpuset import MAX_ID, CpuSet
from nodeagent.errors import HostError
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

T = TypeVar("T")
_LISTS = ("list", "/online")


class ListReader(Tolerant):
    """Never raises. `warnings` is the caller's list and only grows."""

    def __init__(self, sysfs: SysFs, warnings: list[str]) -> None:
        super().__init__(sysfs)
        self.warnings = warnings

    def number(self, path: str, missing: int | None = None) -> int | None:
        """Return a number, `missing` if the file is missing or empty, or None if it is malformed."""
        return self.read(lambda one: self.sysfs.number(one, missing), path)

    def cpus(self, path: str) -> CpuSet | None:
        """Return the CPUs in a list file, or, if the name is not that of a list, a mask file.
        None if missing or malformed."""
        return self.read(self.sysfs.cpus if path.endswith(_LISTS) else self.sysfs.cpu_mask, path)

    def need(self, path: str, convert: Callable[[str], T]) -> T | None:
        """Return a file's text through `convert`, or None with a warning; a missing or empty file is a warning too."""
        return self._through(lambda: self.sysfs.text(path), path, convert)

    def given(self, path: str, convert: Callable[[str], T]) -> T | None:
        """Return a file's text through `convert`, or None if the kernel does not have it. An
        empty file is converted too."""
        return self._through(lambda: self.sysfs.text(path, None), path, convert)

    def _through(self, ask: Callable[[], str | None], path: str, convert: Callable[[str], T]) -> T | None:
        text: str | None = None
        try:
            text = ask()
            return None if text is None else convert(text)
        except HostError as error:
            self.warnings.append(str(error))
        except ValueError as error:
            self.refuse(path, text or "", f"is not valid ({error})")
        return None

    def numbered(self, path: str, prefix: str) -> list[int]:
        """Return the numbers N of a folder's entries "prefixN", sorted."""
        found = self.read(lambda one: [number for number, _ in self.sysfs.numbered(one, prefix)], path) or []
        for number in found:
            if number > MAX_ID:
                self.refuse(path, f"{prefix}{number}", f"is beyond the largest id {MAX_ID}")
        return [number for number in found if number <= MAX_ID]

    def refuse(self, path: str, value: str, why: str) -> None:
        """Record that a file holds a value that cannot be used."""
        self.warn(path, f"{value[:80]!r} {why}")
