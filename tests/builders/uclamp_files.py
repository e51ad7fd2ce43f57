"""The cpu.uclamp files of cgroups as the kernel answers writes to them.

Source: capacity_from_percent, cpu_uclamp_print and cpu_util_update_eff in kernel/sched/core.c, cgroup_parse_float in
kernel/cgroup/cgroup.c.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping

MIN, MAX = "cpu.uclamp.min", "cpu.uclamp.max"
INITIAL = {MIN: "0.00", MAX: "max"}
"""The files of a new cgroup."""
_FLOAT = re.compile(r"([+-]?[0-9]+)(?:\.([+-]?[0-9]+)?)?")
_SCALE, _CAPACITY = 10_000, 1024


def write(value: str) -> str:
    """What a file says after a write. Raise OSError as the kernel does."""
    percent = _SCALE if value.strip() == "max" else _parsed(value.strip())
    if not 0 <= percent <= _SCALE:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return "max" if _share(percent) == _CAPACITY else f"{percent // 100}.{percent % 100:02}"


def _parsed(text: str) -> int:
    """cgroup_parse_float with two places: what follows the number is not looked at."""
    found = _FLOAT.match(text)
    part = found[2] or "" if found is not None else "-1"
    if found is None or int(part or "0") < 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    size = 10 ** max(0, len(part) - 2)
    return int(found[1]) * 100 + (int(part.ljust(2, "0") if part else "0") + size // 2) // size


def _share(percent: int) -> int:
    return (percent * _CAPACITY + _SCALE // 2) // _SCALE


def effective(cgroups: Iterable[Mapping[str, str]]) -> tuple[int, int]:
    """What a cgroup has in effect, of 1024: its files and those above, the highest first."""
    low = high = _CAPACITY
    for files in cgroups:
        asked = {file: _CAPACITY if text == "max" else _share(_parsed(text)) for file, text in files.items()}
        high = min(high, asked[MAX])
        low = min(low, asked[MIN], high)
    return low, high
