"""Compiled kernels; see _fastpath.pyx."""

from array import array
from collections.abc import Collection, Sequence
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

@final
class Pool:
    def __new__(
        cls,
        names: list[str],
        kinds: int,
        classes: list[tuple[int, int, int, int]],
        far: array[int],
        link: array[int],
        cpu_weights: list[list[tuple[int, int]]],
        node_weights: list[list[int]],
        exclusions: list[tuple[list[int], int, int]],
    ) -> Pool: ...

Placed = tuple[int, tuple[int, ...], list[tuple[int, int, int]], tuple[str, ...], bool]

@final
class Machine:
    def __new__(
        cls,
        layout: Layout,
        cpus: list[int],
        packages: list[int],
        distances: list[int],
        units: list[list[int]],
        package_units: list[list[int]],
    ) -> Machine: ...
    def place(
        self,
        want: int,
        *,
        free: int = 0,
        unreserved: int = 0,
        allowed: int = 0,
        must: int = 0,
        whole_cores: bool = False,
        spread_cores: bool = False,
        spread_nodes: bool = False,
        groups_first: bool = False,
        most_packages: int = 0,
        most_nodes: int = 0,
        most_groups: int = 0,
        near: Sequence[tuple[int, int]] = (),
        taste: Sequence[tuple[int, int]] = (),
        node_near: Sequence[int] = (),
        sizes: tuple[int, ...] = (),
        there: tuple[array[int], ...] = (),
        total: tuple[array[int], ...] = (),
        pool: Pool | None = None,
        need: tuple[int, ...] = (),
        held: Collection[str] = (),
        closed: Collection[str] = (),
        must_devices: Collection[str] = (),
        alone: tuple[int, ...] = (),
        most_units: int = -1,
        count_packages: bool = False,
    ) -> Placed | None: ...

def choose_devices(
    classes: list[tuple[int, int, int, int, int, int]],
    need: list[int],
    far: array[int],
    link: array[int],
) -> tuple[int, list[tuple[int, list[int]]], bool] | None: ...
