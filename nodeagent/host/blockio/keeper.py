"""Lines of cgroups' io files, one for each disk."""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.blockio.limits import REMOVED, alike, parse
from nodeagent.host.blockio.disks import is_there
from nodeagent.host.cgroup.line_keeper import LineKeeper

CONTROLLER = "io"


class IoKeeper(LineKeeper):
    """Keeps limits of I/O: lines by the numbers of disks."""

    controller = CONTROLLER
    act = "limit I/O"
    left = "limits of I/O that were set before stay as they are"

    def parsed(self, text: str) -> Mapping[str, str]:
        return parse(text)

    def alike(self, one: str, other: str) -> bool:
        return alike(one, other)

    def removed(self, file: str) -> str:
        return REMOVED[file]

    def is_there(self, number: str) -> bool:
        return is_there(self._sysfs, number)
