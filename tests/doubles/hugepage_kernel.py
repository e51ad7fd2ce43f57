"""The kernel's part of hugepage pools, on a tree of files: what becomes of a number written to nr_hugepages.

As in mm/hugetlb.c: a pool grows by what memory there is, surplus pages become lasting ones first; it shrinks by free
pages that no mapping waits for, and what is taken beyond them becomes surplus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_POOL = re.compile(r".*/node/node(\d+)/hugepages/hugepages-(\d+)kB/nr_hugepages")
Key = tuple[int, int]
"""Node and bytes of a page."""


@dataclass
class PageKernel:
    """`put` is to be given to what writes pools."""

    root: Path
    memory: Mapping[Key, int] = field(default_factory=dict)
    """The most pages that a pool can have, where not any number."""
    fragmented: dict[Key, list[int]] = field(default_factory=dict)
    """The same by how often memory was compacted; the last one stays."""
    written: list[tuple[str, str]] = field(default_factory=list)

    def put(self, path: str, value: str) -> None:
        """Take what is written to a file."""
        self.written.append((path.removeprefix(str(self.root)), value))
        if path.endswith("/compact"):
            for most in self.fragmented.values():
                del most[: len(most) > 1]
            return
        found = _POOL.fullmatch(path)
        assert found is not None, path
        self._resize((int(found[1]), int(found[2]) << 10), int(value))

    @property
    def sizes(self) -> list[int]:
        """What was written to pools, in order."""
        return [int(value) for path, value in self.written if path.endswith("/nr_hugepages")]

    def counts(self, key: Key) -> tuple[int, int, int]:
        """(total, free, surplus)."""
        node, size = key
        folder = self.root / f"sys/devices/system/node/node{node}/hugepages/hugepages-{size >> 10}kB"
        total, free, surplus = (int((folder / f"{what}_hugepages").read_text()) for what in ("nr", "free", "surplus"))
        return total, free, surplus

    def use(self, key: Key, pages: int) -> None:
        """A process faults pages, or with a negative number gives them back."""
        total, free, surplus = self.counts(key)
        self._write(key, total, free - pages, surplus)

    def add(self, key: Key, pages: int) -> None:
        """Another program resizes the pool."""
        total, free, surplus = self.counts(key)
        self._write(key, total + pages, free + pages, surplus)

    def _resize(self, key: Key, pages: int) -> None:
        total, free, surplus = self.counts(key)
        if pages >= total - surplus:
            lasting = min(surplus, pages - (total - surplus))
            more = max(0, min(pages, self._most(key)) - (total - surplus + lasting))
            self._write(key, total + more, free + more, surplus - lasting)
            return
        gone = min(total - surplus - pages, max(0, min(free, self._free(key[1]) - self._reserved(key[1]))))
        self._write(key, total - gone, free - gone, surplus + (total - surplus - pages - gone))

    def _most(self, key: Key) -> int:
        return self.fragmented.get(key, [self.memory.get(key, 1 << 40)])[0]

    def _machine(self, size: int) -> Path:
        return self.root / f"sys/kernel/mm/hugepages/hugepages-{size >> 10}kB"

    def _free(self, size: int) -> int:
        return int((self._machine(size) / "free_hugepages").read_text())

    def _reserved(self, size: int) -> int:
        return int((self._machine(size) / "resv_hugepages").read_text())

    def _write(self, key: Key, *after: int) -> None:
        node, size = key
        folder = self.root / f"sys/devices/system/node/node{node}/hugepages/hugepages-{size >> 10}kB"
        before = self.counts(key)
        for what, old, new in zip(("nr", "free", "surplus"), before, after, strict=True):
            whole = self._machine(size) / f"{what}_hugepages"
            _replace(whole, int(whole.read_text()) + new - old)
            _replace(folder / f"{what}_hugepages", new)
        self.take(node, (after[0] - before[0]) * size)

    def take(self, node: int, size: int) -> None:
        """A process takes memory of a node, or with a negative number gives it back."""
        of_node = self.root / f"sys/devices/system/node/node{node}/meminfo"
        for path in (of_node, self.root / "proc/meminfo"):
            found = re.sub(r"(MemFree|MemAvailable): +(\d+)", lambda one: _less(one, size >> 10), path.read_text())
            _replace(path, found.rstrip("\n"))


def _less(found: re.Match[str], kib: int) -> str:
    return f"{found[1]}: {max(0, int(found[2]) - kib)}"


def _replace(path: Path, value: int | str) -> None:
    """A reader never sees half a write, as with the kernel."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(f"{value}\n")
    draft.replace(path)
