"""Compiled kernels; see _fastpath.pyx."""

from array import array
from collections.abc import Sequence
from typing import final

MAX_ID: int
COMPILED: bool

Choice = tuple[int, int, int, int, int, int, int, int, int, int, int, int, bool, int]

def parse_list(text: str) -> int: ...
def format_list(mask: int) -> str: ...
def ids(mask: int) -> list[int]: ...

@final
class Layout:
    def __new__(cls, rows: list[tuple[int, int, int, int, int]], nodes: int, distances: list[int]) -> Layout: ...
    def choose(
        self,
        free_mask: int,
        want: int,
        *,
        must: int = 0,
        whole_cores: bool = False,
        spread_cores: bool = False,
        spread_nodes: bool = False,
        groups_first: bool = False,
        most_packages: int = 0,
        most_nodes: int = 0,
        near: Sequence[tuple[int, int]] = (),
        taste: Sequence[tuple[int, int]] = (),
    ) -> Choice | None: ...

def choose_devices(
    classes: list[tuple[int, int, int, int, int, int]],
    need: list[int],
    far: array[int],
    link: array[int],
) -> tuple[int, list[tuple[int, list[int]]], bool] | None: ...
