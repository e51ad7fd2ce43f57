"""`nodeagent place`: where a request would go, without granting anything. One request, or one per line."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from nodeagent.cli.source import LARGEST_FILE_BYTES, add_root, read_file, read_root
from nodeagent.cli.tables import print_table
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import POLICIES, check_options, check_policy
from nodeagent.core.model.quantity import format_size, parse_size
from nodeagent.core.model.request import BEST_EFFORT, Pages, Placement, Request
from nodeagent.core.model.topology import DRAM, MEMORY_KINDS
from nodeagent.core.placement.describe import describe
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused

DONE, REFUSED = 0, 3
MOST = 1 << 40
T = TypeVar("T")


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One request of a batch, as written."""

    cpus: int = 0
    held: str = ""
    reserved: str = ""
    options: list[str] = []
    numa: str = BEST_EFFORT
    hugepages: dict[str, int] = {}
    memory: str = ""
    memory_kind: str = DRAM
    devices: dict[str, int] = {}
    near: list[str] = []


class _HeldPages(msgspec.Struct):
    size: str
    numa_node: int
    pages: Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class _HeldMemory(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    numa_node: int


class _Held(msgspec.Struct):
    """What a placement needs of a grant."""

    id: str
    api: str = ""
    resource: str = ""
    cpus: str = ""
    hugepages: list[_HeldPages] = []
    memory: list[_HeldMemory] = []
    devices: list[str] = []
    things: list[tuple[str, str]] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent place`."""
    add_root(parser)
    parser.add_argument("--inventory", metavar="FILE", help="read what `nodeagent inventory -o json` (or yaml) wrote")
    parser.add_argument("--cpus", metavar="N", default="0", help="exclusive CPUs")
    parser.add_argument("--held", metavar="LIST", default="", help="CPUs that others hold, such as 0-3,8")
    parser.add_argument("--state", metavar="FILE", help="what is held, as `nodeagent grants -o json` writes it")
    parser.add_argument("--reserved", metavar="LIST", default="", help="CPUs that are never granted")
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
    parser.add_argument("--batch", metavar="FILE", help="one request object a line; - is standard input")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.inventory is not None and args.root is not None:
        raise InputError("cannot use --inventory and --root together: expected one of them")
    inventory = read_file(args.inventory) if args.inventory is not None else read_root(args.root)
    line = _line_of(args)
    state = _read_state(args.state) if args.state is not None else ()
    if args.batch is not None:
        return _batch(inventory, args.batch, line, state)
    return _one(inventory, line, state, args.output)


# ---------------------------------------------------------------- one request


def _line_of(args: argparse.Namespace) -> Line:
    """Return the command-line options, checked; each error names its option."""
    return Line(
        cpus=_option("--cpus", args.cpus, "a whole number of 0 or more", _count),
        held=args.held,
        reserved=args.reserved,
        options=args.option,
        numa=args.numa,
        hugepages=_pairs("--hugepages", args.hugepages, "SIZE=COUNT, such as 2Mi=512"),
        memory=args.memory,
        memory_kind=args.memory_kind,
        devices=_pairs("--devices", args.devices, "KIND=N, such as gpu=2"),
        near=args.near,
    )


def _option(name: str, value: str, expected: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(value)
    except ValueError:
        raise InputError(f"cannot use {name} {_short(value)}: expected {expected}") from None


def _short(value: str) -> str:
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
            raise InputError(f"cannot use {name} {_short(value)}: expected {expected}")
        pairs[key] = pairs.get(key, 0) + _option(name, value, expected, lambda _, count=count: _count(count))  # type: ignore[misc]
    return pairs


def _one(inventory: Inventory, line: Line, state: Sequence[Grant], form: str) -> int:
    request, ledger = _request(inventory, line), _ledger(inventory, line, state)
    try:
        placement = place(inventory, ledger, request)
    except Refused as refusal:
        if form == "json":
            print(json.dumps(_refusal(refusal)))
        else:
            print(f"refused: {refusal}")
        return REFUSED
    document = _document(inventory, request, placement)
    if form == "json":
        print(json.dumps(document))
    else:
        print_table(("WHAT", "WHERE"), _rows(document))
    return DONE


def _request(inventory: Inventory, line: Line) -> Request:
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
        raise InputError(f"cannot use memory kind {_short(line.memory_kind)}: expected {', '.join(MEMORY_KINDS)}")
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


def _ledger(inventory: Inventory, line: Line, state: Sequence[Grant]) -> Ledger:
    """Return a ledger with what is held and reserved."""
    held, reserved = _cpus(inventory, line.held, "held"), _cpus(inventory, line.reserved, "reserved")
    grants = {one.id: one for one in state}
    if held:
        grants["--held"] = Grant(id="--held", holder=Holder(api=DEVICE_PLUGIN), cpus=held)
    return Ledger(grants=grants, reserved=reserved)


def _cpus(inventory: Inventory, text: str, name: str) -> CpuSet:
    """Return the online CPUs of a list. Raise InputError if it names CPUs that this machine cannot have."""
    named = CpuSet.parse(text, source=name)
    possible = inventory.cpus_possible | inventory.cpus_online | inventory.cpus_offline
    if strange := named - possible:
        raise InputError(f"cannot use {name} {_short(text)}: this machine can have CPUs {possible}, not {strange}")
    return named & inventory.cpus_online


def _read_state(path: str) -> tuple[Grant, ...]:
    """Return the grants of a file as `nodeagent grants -o json` writes it."""
    try:
        with Path(path).open("rb") as file:
            found = msgspec.json.decode(file.read(LARGEST_FILE_BYTES + 1), type=list[_Held])
        grants = tuple(_grant(one) for one in found)
    except OSError as error:
        raise InputError(f"cannot read --state {path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError, InputError) as error:
        raise InputError(f"cannot read --state {path}: {' '.join(str(error).split())}") from None
    if twice := [one for one, count in Counter(grant.id for grant in grants).items() if count > 1]:
        raise InputError(f"cannot read --state {path}: grant {twice[0]!r} stands twice")
    return grants


def _grant(held: _Held) -> Grant:
    pages = (Pages(node=one.numa_node, page_bytes=parse_size(one.size), pages=one.pages) for one in held.hugepages)
    return Grant(
        id=held.id,
        holder=Holder(api=held.api, resource=held.resource),
        cpus=CpuSet.parse(held.cpus, source=f"grant {held.id}"),
        hugepages=tuple(pages),
        memory=tuple((one.numa_node, one.bytes) for one in held.memory),
        devices=tuple(held.devices),
        things=tuple(held.things),
    )


# ---------------------------------------------------------------- a batch


def _batch(inventory: Inventory, path: str, defaults: Line, state: Sequence[Grant]) -> int:
    """Answer every line in order; what a line omits is taken from the command line."""
    lines = sys.stdin.buffer if path == "-" else _open(path)
    base = msgspec.structs.asdict(defaults)
    with lines:
        for number, text in enumerate(lines, start=1):
            if text.strip():
                sys.stdout.write(json.dumps(_answer(inventory, text, base, state, number)) + "\n")
    return DONE


def _open(path: str) -> Any:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise InputError(f"cannot read --batch {path}: {error.strerror}") from None


def _answer(
    inventory: Inventory, text: bytes, base: Mapping[str, Any], state: Sequence[Grant], number: int
) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(text)
        if not isinstance(given, dict):
            raise InputError("expected an object")
        line = msgspec.convert({**base, **given}, Line)
        request, ledger = _request(inventory, line), _ledger(inventory, line, state)
        return _document(inventory, request, place(inventory, ledger, request))
    except Refused as refusal:
        return _refusal(refusal)
    except (InputError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return {"error": f"line {number}: {error}", "line": number}


# ---------------------------------------------------------------- answers


def _document(inventory: Inventory, request: Request, placement: Placement) -> dict[str, Any]:
    """Return the answer in its documented form."""
    more = describe(inventory, request, placement)
    pages: dict[str, dict[str, int]] = {}
    for one in placement.hugepages:
        pages.setdefault(format_size(one.page_bytes), {})[str(one.node)] = one.pages
    document: dict[str, Any] = {
        "cpus": str(placement.cpus),
        "packages": list(more.packages),
        "numa_nodes": list(more.numa_nodes),
        "l3": list(more.l3),
        "split_cores": more.split_cores,
        "hugepages": pages,
        "devices": list(placement.devices),
        "cost": list(placement.cost),
        "why": list(more.why),
    }
    if placement.memory:
        document["memory"] = {str(node): size for node, size in placement.memory}
    return document


def _refusal(refusal: Refused) -> dict[str, Any]:
    return {
        "refused": refusal.why,
        "want": refusal.want,
        "free": refusal.free,
        "unit": refusal.unit,
        "would_admit": refusal.would_admit,
    }


def _rows(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in document.items():
        if name == "why":
            yield from ((name, sentence) for sentence in value)
        elif isinstance(value, Mapping):
            yield from (
                (f"{name} {key}", ", ".join(f"{k}: {v}" for k, v in _items(part))) for key, part in value.items()
            )
        else:
            yield name, ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, Mapping) else [("bytes", value)]
