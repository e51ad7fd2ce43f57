"""The tolerant reader of the machine's shape: lists and masks of CPUs, numbered folders, files that must be there."""

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
    """Never raises. `warnings` is the caller's list and only ever grows."""

    def __init__(self, sysfs: SysFs, warnings: list[str]) -> None:
        super().__init__(sysfs)
        self.warnings = warnings

    def number(self, path: str, missing: int | None = None) -> int | None:
        """A number; `missing` where there is no such file or it is empty, None where it is malformed."""
        return self.read(lambda one: self.sysfs.number(one, missing), path)

    def cpus(self, path: str) -> CpuSet | None:
        """A list file, or a mask file where the name does not say list; None where it is missing or malformed."""
        return self.read(self.sysfs.cpus if path.endswith(_LISTS) else self.sysfs.cpu_mask, path)

    def need(self, path: str, convert: Callable[[str], T]) -> T | None:
        """A file through `convert`; that it is missing or empty is a warning as well."""
        return self._through(lambda: self.sysfs.text(path), path, convert)

    def given(self, path: str, convert: Callable[[str], T]) -> T | None:
        """A file through `convert`; None where the kernel does not have it. An empty one is converted too."""
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
        """The numbers N of the entries "prefixN" of a folder, sorted."""
        found = self.read(lambda one: [number for number, _ in self.sysfs.numbered(one, prefix)], path) or []
        for number in found:
            if number > MAX_ID:
                self.refuse(path, f"{prefix}{number}", f"is beyond the largest id {MAX_ID}")
        return [number for number in found if number <= MAX_ID]

    def refuse(self, path: str, value: str, why: str) -> None:
        """Record that a file holds a value that cannot be used."""
        self.warn(path, f"{value[:80]!r} {why}")
