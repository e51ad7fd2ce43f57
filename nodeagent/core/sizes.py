"""Sizes as Kubernetes writes them: "2Mi", "1Gi", "512Ki"; bytes inside."""

from __future__ import annotations

import re

from nodeagent.errors import InputError

_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9}
_SIZE = re.compile(r"([1-9][0-9]{0,17})(Ki|Mi|Gi|Ti|k|M|G|kB|)")


def parse_size(text: str) -> int:
    """Bytes of "2Mi"; the kernel's "2048kB" is taken too (its kB is 1,024 bytes). InputError names the text."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InputError(f'cannot read size "{text[:40]}": expected a number with Ki, Mi, Gi or Ti, such as 2Mi')
    unit = found[2]
    return int(found[1]) * (1024 if unit == "kB" else _UNITS[unit])


def format_size(size_bytes: int) -> str:
    """The shortest exact form: 2097152 is "2Mi"."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if size_bytes and size_bytes % _UNITS[unit] == 0:
            return f"{size_bytes // _UNITS[unit]}{unit}"
    return str(size_bytes)
