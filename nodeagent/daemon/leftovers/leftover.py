"""What an agent leaves on a host, as values: what is undone together, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from nodeagent.config.schema import Config
from nodeagent.daemon.paths import Paths
from nodeagent.errors import HostError


class Line(NamedTuple):
    """One thing that is undone. `wanted` is "" if it is removed."""

    path: str
    found: str = ""
    wanted: str = ""

    def __str__(self) -> str:
        change = f"{self.found or 'empty'} -> {self.wanted or 'empty'}"
        return f"{self.path}: {change if self.found or self.wanted else 'removed'}"


class Leftover(msgspec.Struct, frozen=True):
    """Things that are undone together. `undo` yields why some stay."""

    lines: Sequence[Line] = ()
    undo: Callable[[], Iterable[str]] = tuple
    notes: Sequence[str] = ()
    """What the agent made and stays as it is, or is left to the admin."""
    unread: str = ""
    """Why it is not known what there is to undo, or ""."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's configuration and paths on a host."""

    config: Config
    where: Paths


def step(act: Callable[[], Mapping[Any, str]]) -> Callable[[], Iterator[str]]:
    """Return an `undo` that is one act, which returns why some things stay, or raises HostError."""

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from act().values()
        yield from errors

    return undo


@contextlib.contextmanager
def kept_going() -> Iterator[list[str]]:
    """Collect the error of one step, so that the others are done all the same."""
    errors: list[str] = []
    try:
        yield errors
    except HostError as error:
        errors.append(str(error))
