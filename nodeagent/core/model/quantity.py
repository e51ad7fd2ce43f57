"""Sizes and quantities in Kubernetes notation ("2Mi", "1Gi", "512Ki"); internally, sizes are in bytes."""

from __future__ import annotations

import re

from nodeagent.errors import InputError

_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9}
_SIZE = re.compile(r"([1-9][0-9]{0,17})(Ki|Mi|Gi|Ti|k|M|G|kB|)")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "2Mi". The kernel's "2048kB" is accepted too (its kB is 1,024 bytes).

    Raise InputError naming the text if it is malformed.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InputError(f'cannot read size "{text[:40]}": expected a number with Ki, Mi, Gi or Ti, such as 2Mi')
    unit = found[2]
    return int(found[1]) * (1024 if unit == "kB" else _UNITS[unit])


def format_size(size_bytes: int) -> str:
    """Return the shortest exact form: 2097152 is "2Mi"."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if size_bytes and size_bytes % _UNITS[unit] == 0:
            return f"{size_bytes // _UNITS[unit]}{unit}"
    return str(size_bytes)


LARGEST_QUANTITY = (1 << 63) - 1
_LONGEST_QUANTITY = 128
_QUANTITY = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]*)(?:\.(?P<part>[0-9]*))?(?:[eE](?P<power>[+-]?[0-9]+)|(?P<unit>[KMGTPE]i|[numkMGTPE]?))"
)
_POWERS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_SHIFTS = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_NANO = 9
"""Decimal places that a quantity keeps; finer values are rounded up."""


def parse_quantity(text: str) -> int:
    """Return a Kubernetes quantity (resource.Quantity) as an integer from 0 to 2**63-1: "4", "4000m", "512Mi", "1e3".

    Raise InputError naming the text if it is malformed, negative, too large or not a whole number ("100m").
    """
    found = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST_QUANTITY else None
    if found is None or not (found["whole"] or found["part"]):
        raise _no_quantity(text, "expected a number such as 4, 1500m or 512Mi")
    part = found["part"] or ""
    mantissa = int(found["whole"] + part) << _SHIFTS.get(found["unit"] or "", 0)
    if mantissa and found["sign"] == "-":
        raise _no_quantity(text, "it is negative")
    power = int(found["power"]) if found["power"] else _POWERS.get(found["unit"] or "", 0)
    return _whole(text, mantissa, power - len(part))


def _whole(text: str, mantissa: int, power: int) -> int:
    """Return mantissa * 10**power, without ever computing a large power. Raise InputError unless it is a whole number
    in range."""
    if not mantissa:
        return 0
    if power > len(str(LARGEST_QUANTITY)):
        raise _no_quantity(text, f"it is larger than {LARGEST_QUANTITY}")
    if power < -2 * _LONGEST_QUANTITY:
        raise _no_quantity(text, "it is not a whole number")
    scale: int = 10 ** abs(power + _NANO)
    nanos = mantissa * scale if power >= -_NANO else -(-mantissa // scale)
    value, rest = divmod(nanos, 1_000_000_000)
    if rest:
        raise _no_quantity(text, "it is not a whole number")
    if value > LARGEST_QUANTITY:
        raise _no_quantity(text, f"it is larger than {LARGEST_QUANTITY}")
    return value


def _no_quantity(text: str, why: str) -> InputError:
    return InputError(f'cannot read quantity "{text[:40]}": {why}')


WHOLE_HUNDREDTHS = 10_000
"""100 percent."""
_PERCENT = re.compile(r"([0-9]{1,3})(?:\.([0-9]{1,2}))?")


def parse_percent(said: int | str) -> int:
    """Return hundredths of a percent of 0 to 100 percent with up to two decimals, such as 20 or "12.5"; "max" is all.

    Raise InputError naming what is malformed or out of range.
    """
    if said == "max":
        return WHOLE_HUNDREDTHS
    found = _PERCENT.fullmatch(str(said))
    hundredths = int(found[1]) * 100 + int((found[2] or "").ljust(2, "0")) if found is not None else -1
    if not 0 <= hundredths <= WHOLE_HUNDREDTHS:
        raise InputError(f"cannot read percentage {str(said)[:40]!r}: expected 0 to 100 with two decimals, or max")
    return hundredths
