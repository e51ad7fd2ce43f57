"""A request on the command line, or in a line of a batch: the options, the checks, and the request they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import POLICIES, check_options, check_policy
from nodeagent.core.model.quantity import parse_size
from nodeagent.core.model.request import BEST_EFFORT, Request
from nodeagent.core.model.topology import DRAM, MEMORY_KINDS
from nodeagent.errors import InputError

MOST = 1 << 40
"""No count of anything is larger."""
T = TypeVar("T")


class RequestLine(msgspec.Struct, forbid_unknown_fields=True):
    """A request as written."""

    cpus: int = 0
    options: list[str] = []
    numa: str = BEST_EFFORT
    hugepages: dict[str, int] = {}
    memory: str = ""
    memory_kind: str = DRAM
    devices: dict[str, int] = {}
    near: list[str] = []


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that state a request."""
    parser.add_argument("--cpus", metavar="N", default="0", help="exclusive CPUs")
    parser.add_argument("--option", metavar="NAME", action="append", default=[], help="a placement option; repeatable")
    parser.add_argument("--numa", metavar="POLICY", default=BEST_EFFORT, help=f"{', '.join(POLICIES)}")
    parser.add_argument("--hugepages", metavar="SIZE=COUNT", action="append", default=[], help="such as 2Mi=512")
    parser.add_argument("--memory", metavar="SIZE", default="", help="such as 4Gi")
    parser.add_argument(
        "--memory-kind",
        metavar="KIND",
        default=DRAM,
        help=f"kind of the nodes that memory and hugepages come from: {', '.join(MEMORY_KINDS)}",
    )
    parser.add_argument("--devices", metavar="KIND=N", action="append", default=[], help="such as gpu=2")
    parser.add_argument("--near", metavar="DEVICE", action="append", default=[], help="id of a device; repeatable")


def written_request(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a RequestLine from the command line. Raise InputError that names the option."""
    return {
        "cpus": _option("--cpus", args.cpus, "a whole number of 0 or more", _count),
        "options": args.option,
        "numa": args.numa,
        "hugepages": _pairs("--hugepages", args.hugepages, "SIZE=COUNT, such as 2Mi=512"),
        "memory": args.memory,
        "memory_kind": args.memory_kind,
        "devices": _pairs("--devices", args.devices, "KIND=N, such as gpu=2"),
        "near": args.near,
    }


def _option(name: str, value: str, expected: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(value)
    except ValueError:
        raise InputError(f"cannot use {name} {shortened(value)}: expected {expected}") from None


def shortened(value: str) -> str:
    """Return a value as errors quote it: at most 60 characters."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) > MOST:
        raise ValueError(text)
    return int(text)


def _pairs(name: str, values: Iterable[str], expected: str) -> dict[str, int]:
    """Return KEY=COUNT values; counts of the same key add up."""
    pairs: dict[str, int] = {}
    for value in values:
        key, equals, count = value.partition("=")
        if not key or not equals:
            raise InputError(f"cannot use {name} {shortened(value)}: expected {expected}")
        pairs[key] = pairs.get(key, 0) + _option(name, value, expected, lambda _, count=count: _count(count))  # type: ignore[misc]
    return pairs


def request_of(inventory: Inventory, line: RequestLine) -> Request:
    """Return a line as a request. Raise InputError if this machine cannot be asked for it."""
    if line.cpus < 0 or line.cpus > MOST:
        raise InputError(f"cannot use cpus {line.cpus}: expected a whole number of 0 or more")
    for name, counts in (("hugepages", line.hugepages), ("devices", line.devices)):
        for key, count in counts.items():
            if not 0 <= count <= MOST:
                raise InputError(f"cannot use {name} {key}={count}: expected a count of 0 or more")
    for one in line.near:
        if one not in inventory.device_by_id:
            raise InputError(f"cannot use near {one!r}: expected the id of a device of this machine")
    if line.memory_kind not in MEMORY_KINDS:
        raise InputError(f"cannot use memory kind {shortened(line.memory_kind)}: expected {', '.join(MEMORY_KINDS)}")
    return Request(
        cpus=line.cpus,
        hugepages={parse_size(size): count for size, count in line.hugepages.items()},
        memory_bytes=parse_size(line.memory) if line.memory else 0,
        memory_kind=line.memory_kind,
        devices={kind: count for kind, count in line.devices.items() if count},
        near=tuple(line.near),
        options=check_options(line.options),
        numa=check_policy(line.numa),
    )
