"""Reports at once which pod cgroups appeared, disappeared or were written to by any process.

One inotify watch per cgroup, on its folder, reports its subfolders and writes to its files, including the kernel's own
notifications (cgroup.events, hugetlb.SIZE.events). Effective values change without an event when a parent changes, so a
write to a parent counts for everything below. Nothing is missed: a folder is watched before its arrival is reported,
its content is then listed, and if the kernel lost events everything is checked again. Nothing below containers is
watched: a container could otherwise use up all watches.

If inotify is unavailable or its watches run out, this is logged once and only the poll remains.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from collections.abc import Iterable
from typing import Self

import msgspec
import structlog
from asyncinotify import Event, Inotify, Mask

from nodeagent.errors import HostError
from nodeagent.host.cgroup.layout import LEAVES, Cgroup, CgroupLayout
from nodeagent.host.cgroup.read import folders

log = structlog.get_logger()

CAME, GONE, WRITTEN, LOOK = "came", "gone", "written", "look"
"""Values of CgroupChange.what. LOOK: anything may have changed anywhere; sent with every poll and after lost events."""

_MASK = Mask.CREATE | Mask.DELETE | Mask.MODIFY | Mask.ONLYDIR
_FILES = ("cpuset.", "hugetlb.")
IO_FILES = frozenset({"io.max", "io.latency", "io.weight", "io.bfq.weight"})
"""Limits of I/O. The others that start with io. are not theirs: io.pressure is written to by programs that watch it."""
UCLAMP_FILES = frozenset({"cpu.uclamp.min", "cpu.uclamp.max"})
LIMIT_FILES = IO_FILES | UCLAMP_FILES
"""What is kept in force besides CPUs, memory nodes and pages."""
_OTHER_FILES = frozenset({"cgroup.subtree_control", "cgroup.events", "cpu.max"}) | LIMIT_FILES
_AT_ONCE = 64
"""Folders visited before the loop gets a turn."""
_EVENTS_A_READ = 64


class CgroupChange(msgspec.Struct, frozen=True, kw_only=True):
    """A change to a cgroup."""

    path: str
    """Relative to the mount; empty with LOOK."""
    what: str
    file: str = ""
    """The file written to; only with WRITTEN."""
    cgroup: Cgroup | None = None
    """What the path refers to, or None for a cgroup above kubepods that was written to."""


class Watch:
    """Watches the cgroups of `layouts` below `mount`. kubepods, and everything above it, may appear later."""

    def __init__(self, mount: str, layouts: Iterable[CgroupLayout], *, poll_s: float) -> None:
        self._mount = mount
        self._layouts = tuple(layouts)
        self._above = frozenset(path for layout in self._layouts for path in _parents(layout.top))
        self._poll_s = poll_s
        self._next_poll = 0.0
        self._inotify: Inotify | None = None
        self._known: dict[str, Cgroup | None] = {}
        self._path_of: dict[int, str] = {}
        self._to_visit: deque[str] = deque()
        self._news: dict[CgroupChange, None] = {}
        self._said = False

    def __enter__(self) -> Self:
        try:
            self._inotify = Inotify(cache_size=_EVENTS_A_READ, sync_timeout=0)
        except OSError as error:
            self._say(self._mount, error.strerror)
        self._to_visit.append("")
        return self

    def __exit__(self, *_: object) -> None:
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    async def changes(self) -> tuple[CgroupChange, ...]:
        """Wait for the first change, then return all changes since the last call, each once, in order.

        The first call returns everything that exists. A LOOK is included at the latest poll_s seconds after the
        previous one. Cancelling loses nothing.
        """
        loop = asyncio.get_running_loop()
        self._next_poll = self._next_poll or loop.time() + self._poll_s
        while True:
            await self._visit()
            self._drain()
            if self._to_visit:
                continue
            if loop.time() >= self._next_poll:
                self._next_poll = loop.time() + self._poll_s
                self._look_again()
            elif self._news:
                news, self._news = tuple(self._news), {}
                return news
            else:
                await self._readable(self._next_poll)

    async def _visit(self) -> None:
        visited = 0
        while self._to_visit:
            self._enter(self._to_visit[0])
            self._to_visit.popleft()
            visited += 1
            if visited % _AT_ONCE == 0:
                await asyncio.sleep(0)

    def _enter(self, path: str) -> None:
        """Watch a folder, report it if it is new, then queue its subfolders."""
        cgroup = self._cgroup_at(path)
        if cgroup is None and path not in self._above:
            return
        inside = self._inside(path) if self._add(path) else None
        if inside is None:
            self._forget(path)
            return
        if path not in self._known:
            self._known[path] = cgroup
            if cgroup is not None:
                self._tell(path, CAME)
        if cgroup is None or cgroup.kind not in LEAVES:
            self._to_visit.extend(_join(path, name) for name in inside)

    def _add(self, path: str) -> bool:
        """Return whether the folder exists. If it cannot be watched, only the poll covers it."""
        if self._inotify is not None:
            try:
                self._path_of[self._inotify.add_watch(self._full(path), _MASK).wd] = path
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    return False
                self._say(self._full(path), error.strerror)
        return True

    def _inside(self, path: str) -> tuple[str, ...] | None:
        try:
            return folders(self._full(path))
        except HostError as error:
            self._say(self._full(path), str(error))
            return ()

    def _look_again(self) -> None:
        """List everything again; what is known but no longer exists is gone."""
        for path in [path for path in self._known if not os.path.isdir(self._full(path))]:  # noqa: PTH112
            self._forget(path)
        self._to_visit.append("")
        self._news[CgroupChange(path="", what=LOOK)] = None

    async def _readable(self, until: float) -> None:
        """Wait until events are readable. They are not read here, so cancelling loses none."""
        if self._inotify is None:
            await asyncio.sleep(max(0.0, until - asyncio.get_running_loop().time()))
            return
        loop, handle = asyncio.get_running_loop(), self._inotify.fd
        readable = asyncio.Event()
        loop.add_reader(handle, readable.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await readable.wait()
        finally:
            loop.remove_reader(handle)

    def _drain(self) -> None:
        while self._inotify is not None and (event := self._inotify.sync_get()) is not None:
            self._take(event)

    def _take(self, event: Event) -> None:
        if event.mask & Mask.Q_OVERFLOW:
            log.warning("cgroup-events-lost", mount=self._mount)
            self._look_again()
            return
        watch = event.watch
        path = self._path_of.get(watch.wd) if watch is not None else None
        if watch is None or path is None:
            return
        if event.mask & Mask.IGNORED:
            del self._path_of[watch.wd]
        elif event.name is not None:
            self._take_entry(path, str(event.name), event.mask)

    def _take_entry(self, folder: str, name: str, mask: Mask) -> None:
        path = _join(folder, name)
        if mask & Mask.ISDIR and mask & Mask.CREATE:
            self._to_visit.append(path)
        elif mask & Mask.ISDIR and mask & Mask.DELETE:
            self._forget(path)
        elif mask & Mask.MODIFY and (name.startswith(_FILES) or name in _OTHER_FILES):
            self._tell(folder, WRITTEN, name)

    def _forget(self, path: str) -> None:
        """Report a cgroup and everything below it as gone."""
        cgroup = self._known.get(path)
        inside = () if cgroup is not None and cgroup.kind in LEAVES else self._known_below(path)
        for one in (*inside, path):
            if self._known.get(one) is not None:
                self._tell(one, GONE)
            self._known.pop(one, None)

    def _known_below(self, path: str) -> list[str]:
        """Return the known paths below a path, the deepest first."""
        head = f"{path}/" if path else ""
        return [one for one in reversed(self._known) if one.startswith(head) and one != path]

    def _tell(self, path: str, what: str, file: str = "") -> None:
        change = CgroupChange(path=path, what=what, file=file, cgroup=self._known.get(path))
        self._news.pop(change, None)
        self._news[change] = None

    def _cgroup_at(self, path: str) -> Cgroup | None:
        return next((found for layout in self._layouts if (found := layout.parse(path)) is not None), None)

    def _full(self, path: str) -> str:
        return f"{self._mount}/{path}" if path else self._mount

    def _say(self, path: str, error: str | None) -> None:
        if not self._said:
            self._said = True
            log.warning("cgroup-not-watched", path=path, error=error, poll_s=self._poll_s)


def _parents(path: str) -> Iterable[str]:
    """Return all parent folders of a path, including the root ""."""
    parts = path.split("/")
    return ("/".join(parts[:end]) for end in range(len(parts)))


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
