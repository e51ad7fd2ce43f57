"""Values of cgroups' cpu.uclamp files, one in each."""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.uclamp.clamps import INITIAL, alike
from nodeagent.host.cgroup.line_keeper import LineKeeper

CONTROLLER = "cpu"
ACT = "clamp utilization"
OPTION = "CONFIG_UCLAMP_TASK_GROUP"
"""What a kernel was built without that lacks the files."""
WHOLE = ""
"""What of a file a line is: all of it."""


class UclampKeeper(LineKeeper):
    """Keeps utilization clamps."""

    controller = CONTROLLER
    act = ACT
    left = "utilization clamps that were set before stay as they are"

    def parsed(self, text: str) -> Mapping[str, str]:
        return {WHOLE: text.strip()} if text.strip() else {}

    def alike(self, one: str, other: str) -> bool:
        return alike(one, other)

    def removed(self, file: str) -> str:
        return INITIAL[file]

    def missing(self, file: str) -> str:
        return f"{super().missing(file)} ({OPTION})"
