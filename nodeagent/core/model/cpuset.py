"""CpuSet: an immutable set of small ids (CPUs, NUMA nodes, page blocks) that reads and writes the kernel's list syntax.

The syntax is that of the kernel's `%*pbl` ("0-3,8"), read strictly: no blanks, strides or empty items. Input may be in
any order and contain duplicates; the output is sorted and uses the fewest ranges. Source: Documentation/admin-guide/
cputopology.rst and kernel-parameters.rst, "CPU lists".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import nodeagent._fastpath as _fastpath
from nodeagent.errors import InputError

MAX_ID = _fastpath.MAX_ID
"""The largest id that a set can hold: kernels are built for at most 8,192 CPUs (NR_CPUS)."""


class CpuSet:
    """A set of ids in 0..MAX_ID, hashable and ordered by id.

    `mask` is the set as one integer: bit N is set if id N is in the set.
    """

    __slots__ = ("mask",)
    mask: int

    def __init__(self, ids: Iterable[int] = ()) -> None:
        mask = 0
        for one in ids:
            if not 0 <= one <= MAX_ID:
                raise InputError(f"cannot build a CPU set: id {one} is not in 0 to {MAX_ID}")
            mask |= 1 << one
        self.mask = mask

    @classmethod
    def of_mask(cls, mask: int) -> CpuSet:
        """Return the set of the ids whose bits are set in `mask`."""
        new = _new(CpuSet)
        new.mask = mask
        return new

    @classmethod
    def parse(cls, text: str, *, source: str = "") -> CpuSet:
        """Parse a list such as "0-3,8". Raise InputError naming the text and `source` if it is malformed."""
        try:
            return cls.of_mask(_fastpath.parse_list(text))
        except ValueError as bad:
            raise InputError(f"cannot read CPU list {_short(text)}{_at(source)}: {bad}") from None

    @classmethod
    def parse_mask(cls, text: str, *, source: str = "") -> CpuSet:
        """Parse the older mask form (`%*pb`) such as "ffffffff,00000001": 32-bit hexadecimal words, most significant
        first.

        Raise InputError naming the text and `source` if it is malformed.
        """
        words = text.split(",")
        try:
            mask = 0
            for word in words:
                if not 1 <= len(word) <= 8 or not set(word) <= _HEX:
                    raise ValueError(f"{word!r} is not a hexadecimal word of 1 to 8 digits")
                mask = mask << 32 | int(word, 16)
            if mask.bit_length() > MAX_ID + 1:
                raise ValueError(f"id {mask.bit_length() - 1} is not in 0 to {MAX_ID}")
        except ValueError as bad:
            raise InputError(f"cannot read CPU mask {_short(text)}{_at(source)}: {bad}") from None
        return cls.of_mask(mask)

    def __str__(self) -> str:
        return _fastpath.format_list(self.mask)

    def __repr__(self) -> str:
        return f"CpuSet({str(self)!r})"

    def __iter__(self) -> Iterator[int]:
        return iter(_fastpath.ids(self.mask))

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __bool__(self) -> bool:
        return self.mask != 0

    def __contains__(self, one: object) -> bool:
        return isinstance(one, int) and one >= 0 and bool(self.mask >> one & 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuSet) and self.mask == other.mask

    def __hash__(self) -> int:
        return hash(self.mask)

    def __or__(self, other: CpuSet) -> CpuSet:
        new = _new(CpuSet)
        new.mask = self.mask | other.mask
        return new

    def __and__(self, other: CpuSet) -> CpuSet:
        new = _new(CpuSet)
        new.mask = self.mask & other.mask
        return new

    def __sub__(self, other: CpuSet) -> CpuSet:
        new = _new(CpuSet)
        new.mask = self.mask & ~other.mask
        return new

    def __le__(self, other: CpuSet) -> bool:
        return self.mask & ~other.mask == 0

    def isdisjoint(self, other: CpuSet) -> bool:
        """Return whether the two sets have no member in common."""
        return self.mask & other.mask == 0

    def first(self) -> int:
        """Return the lowest id, or -1 if the set is empty."""
        return (self.mask & -self.mask).bit_length() - 1

    def last(self) -> int:
        """Return the highest id, or -1 if the set is empty."""
        return self.mask.bit_length() - 1


_new = object.__new__
_HEX = frozenset("0123456789abcdefABCDEF")
EMPTY = CpuSet()


def union(sets: Iterable[CpuSet]) -> CpuSet:
    """Return the ids that are in at least one of the sets."""
    mask = 0
    for one in sets:
        mask |= one.mask
    return CpuSet.of_mask(mask)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _at(source: str) -> str:
    return f" of {source}" if source else ""
