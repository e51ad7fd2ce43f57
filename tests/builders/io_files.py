"""The io files of cgroups as the kernel answers writes to them, and the disks that it knows.

Source: blkg_conf_open_bdev in block/blk-cgroup.c, tg_set_limit in block/blk-throttle.c, iolatency_set_limit in
block/blk-iolatency.c, ioc_weight_write in block/blk-iocost.c, bfq_io_set_device_weight in block/bfq-cgroup.c.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

FILES = ("io.max", "io.latency", "io.weight", "io.bfq.weight")
_DEVICE = re.compile(r"(\d+):(\d+)(?:\s+(.*))?", re.DOTALL)
_KEYS = ("rbps", "wbps", "riops", "wiops")
_MOST_OPERATIONS = (1 << 32) - 1


@dataclass
class IoDisks:
    """What the kernel knows. Numbers are MAJOR:MINOR."""

    disks: dict[str, str] = field(default_factory=dict)
    """Whole disks by their number: what distributes their time ("iocost", "bfq" or "")."""
    partitions: set[str] = field(default_factory=set)
    files: tuple[str, ...] = FILES
    """What it was built with."""

    def initial(self) -> dict[str, str]:
        """The files of a new cgroup."""
        return {file: "default 100" if file.endswith("weight") else "" for file in self.files}

    def write(self, file: str, text: str, value: str) -> str:
        """What a file says after a write. Raise OSError as the kernel does."""
        if file.endswith("weight") and ":" not in value:
            weight = value.removeprefix("default ").strip()
            _check(weight.isdigit() and 1 <= int(weight) <= 10_000, errno.EINVAL)
            return "\n".join([f"default {weight}", *text.splitlines()[1:]])
        found = _DEVICE.fullmatch(value.strip())
        _check(found is not None, errno.EINVAL)
        assert found is not None
        number, rest = f"{found[1]}:{found[2]}", found[3] or ""
        _check(number in self.disks and number not in self.partitions, errno.ENODEV)
        lines = dict(line.split(" ", 1) for line in text.splitlines())
        line = getattr(self, "_" + file.removeprefix("io.").replace(".", "_"))(number, rest, lines.get(number, ""))
        lines.pop(number, None)
        if line:
            lines[number] = line
        return "\n".join(f"{key} {one}" for key, one in lines.items())

    def _max(self, number: str, rest: str, before: str) -> str:
        now = dict(word.split("=") for word in before.split()) or dict.fromkeys(_KEYS, "max")
        for word in rest.split():
            key, is_pair, amount = word.partition("=")
            _check(bool(is_pair) and (amount == "max" or amount.isdigit()), errno.EINVAL)
            _check(amount == "max" or int(amount) > 0, errno.ERANGE)
            _check(key in _KEYS and amount != "1", errno.EINVAL)
            beyond = key.endswith("iops") and amount != "max" and int(amount) >= _MOST_OPERATIONS
            now[key] = "max" if beyond else amount
        return " ".join(f"{key}={now[key]}" for key in _KEYS) if set(now.values()) != {"max"} else ""

    def _latency(self, number: str, rest: str, before: str) -> str:
        for word in rest.split(" "):
            key, _, amount = word.partition("=")
            _check(key == "target" and (amount == "max" or amount.isdigit()), errno.EINVAL)
            before = "" if amount in ("max", "0") else f"target={amount}"
        return before

    def _weight(self, number: str, rest: str, before: str) -> str:
        _check(self.disks[number] == "iocost", errno.EOPNOTSUPP)
        if rest.startswith("default"):
            return ""
        _check(rest.isdigit() and 1 <= int(rest) <= 10_000, errno.EINVAL)
        return rest

    def _bfq_weight(self, number: str, rest: str, before: str) -> str:
        _check(self.disks[number] == "bfq", errno.EOPNOTSUPP)
        if rest.strip() == "default":
            return ""
        _check(rest.isdigit(), errno.EINVAL)
        _check(1 <= int(rest) <= 1000, errno.ERANGE)
        return rest


def _check(holds: bool, code: int) -> None:
    if not holds:
        raise OSError(code, os.strerror(code))


def add_disk(root: Path, name: str, number: str, *, partitions: tuple[str, ...] = (), queue: bool = True) -> None:
    """What /sys and /dev have of a disk, and of partitions that follow it in number. queue: it takes requests."""
    folder = root / "sys/devices/pci0000:00/block" / name
    major, minor = map(int, number.split(":"))
    for i, one in enumerate((name, *partitions)):
        inside = folder if not i else folder / one
        inside.mkdir(parents=True)
        (inside / "dev").write_text(f"{major}:{minor + i}\n")
        if i:
            (inside / "partition").write_text(f"{i}\n")
        for link in (root / "sys/class/block" / one, root / f"sys/dev/block/{major}:{minor + i}"):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(inside, link.parent))
        node = root / "dev" / one
        node.parent.mkdir(exist_ok=True)
        node.write_text("")
    (folder / "queue").mkdir()
    (folder / "queue/scheduler").write_text("[mq-deadline] none\n" if queue else "none\n")
    if queue:
        (folder / "mq").mkdir()
