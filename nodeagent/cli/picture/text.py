"""A picture as lines of text: one character for each CPU.

A column of characters is a core, a row its threads; cores with a common L3 cache stand together. A letter is a holder,
which the legend names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from nodeagent.cli.picture.lines import NARROWEST, Item, Line, Span, plain, printable, words, wrapped
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import NO_NODE
from nodeagent.core.picture.document import cpus_by_state
from nodeagent.core.picture.values import (
    EXCLUDED,
    FREE,
    OUTSIDE,
    PLACED,
    RESERVED,
    PartState,
    Picture,
    PictureCore,
    PictureDevice,
    PictureHolder,
    PictureNode,
    PicturePackage,
)

MARKS = {FREE: ".", RESERVED: "-", OUTSIDE: "/", EXCLUDED: "~", PLACED: "*"}
SHARED_MARK = "+"
"""A CPU or device with more than one holder."""
ILL = "!"
MOST_NAMED = 8
"""Devices of one kind on one node that are named; of more, each is one character."""
_MEANINGS = {
    MARKS[FREE]: "free",
    MARKS[RESERVED]: "reserved for the system",
    MARKS[OUTSIDE]: "not for pods",
    MARKS[EXCLUDED]: "excluded by a device that is held",
    SHARED_MARK: "several holders",
    ILL: "not healthy",
}


def picture_lines(picture: Picture, width: int) -> Iterator[Line]:
    """Return the lines of a picture, none wider than `width` columns (at least NARROWEST)."""
    width = max(width, NARROWEST)
    yield from wrapped(words(_summary(picture)), width, rest="  ")
    for package in picture.packages:
        yield ()
        yield from _package(picture, package, width)
    if picture.holders:
        yield ()
        for index, holder in enumerate(picture.holders):
            yield from _legend(index, holder, width)
    if marks := _marks(picture):
        yield ()
        yield from _key(marks, width)


def part_mark(picture: Picture, state: PartState, holders: Sequence[int]) -> Span:
    """Return the character of a CPU or device."""
    if not holders:
        return plain(MARKS[state])
    if len(holders) > 1:
        return Span(SHARED_MARK, holders[0])
    return Span(picture.holders[holders[0]].letter, holders[0])


def summary_parts(picture: Picture) -> Iterator[str]:
    """Return how many CPUs are in each state, such as "12 held"."""
    yield from (f"{len(cpus)} {state}" for state, cpus in cpus_by_state(picture).items() if cpus)
    if picture.offline:
        yield f"{len(picture.offline)} offline ({picture.offline})"


def _summary(picture: Picture) -> str:
    return f"{sum(1 for _ in picture.cpus())} CPUs: {', '.join(summary_parts(picture))}"


# ---------------------------------------------------------------- the machine


def _package(picture: Picture, package: PicturePackage, width: int) -> Iterator[Line]:
    if package.packages:
        yield (plain(package_title(package)),)
    for node in package.nodes:
        yield from _node(picture, node, width)


def _node(picture: Picture, node: PictureNode, width: int) -> Iterator[Line]:
    yield from wrapped(words(node_title(node)), width, first=" ", rest="       ")
    digits = _digits(picture)
    for block in _blocks(node, width - 3 - digits):
        yield from _rows(picture, block, digits)
    by_kind: dict[str, list[PictureDevice]] = {}
    for device in node.devices:
        by_kind.setdefault(device.kind, []).append(device)
    for kind, devices in by_kind.items():
        yield from _devices(picture, kind, devices, width)


def package_title(package: PicturePackage) -> str:
    """Return the number of a package, or those of several."""
    return f"package{'s' * (len(package.packages) > 1)} {CpuSet(package.packages)}"


def node_title(node: PictureNode) -> str:
    """Return a NUMA node in words: its CPUs, its memory and its hugepages."""
    cpus = CpuSet(cpu.id for cpu in node.cpus())
    name = f"node {node.node}" if node.node != NO_NODE else "without a NUMA node"
    what = [f"CPUs {cpus}"] if cpus else [] if node.node == NO_NODE else ["no CPUs"]
    return ": ".join(filter(None, (name, ", ".join([*what, *node_stock(node)]))))


def node_stock(node: PictureNode) -> Iterator[str]:
    """Return the memory and the hugepages of a node in words."""
    if node.memory_bytes:
        held = sum(size for _, size in node.memory_held)
        yield f"{_gib(node.memory_bytes)} {node.kind}" + (f" ({_gib(held)} held)" if held else "")
    for pool in node.hugepages:
        if pool.total_pages:
            held = sum(pages for _, pages in pool.held)
            yield f"{pages_of(pool.total_pages, pool.page_bytes)} ({held} held)"


def pages_of(count: int, page_bytes: int) -> str:
    """Return a number of hugepages in words."""
    return f"{count} page{'s' * (count != 1)} of {format_size(page_bytes)}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.4g}Gi"


Block = list[tuple[PictureCore, ...]]
"""Cores side by side in groups, as wide as a line allows."""


def _blocks(node: PictureNode, room: int) -> Iterator[Block]:
    """Return a node's groups of cores, as many side by side as fit into `room` columns; a group that is too wide is
    cut."""
    block: Block = []
    used = 0
    for group in node.groups:
        for start in range(0, len(group.cores), room - 1):
            cores = group.cores[start : start + room - 1]
            if block and used + 1 + len(cores) > room:
                yield block
                block, used = [], 0
            block.append(cores)
            used += 1 + len(cores)
    if block:
        yield block


def _digits(picture: Picture) -> int:
    """Return how many columns the number of any CPU takes, so that all rows begin in the same one."""
    cpus = (cpu.id for package in picture.packages for node in package.nodes for cpu in node.cpus())
    return max((len(str(one)) for one in cpus), default=1)


def _rows(picture: Picture, block: Block, digits: int) -> Iterator[Line]:
    """Return one line for each thread of a block's cores, which starts with the number of its first CPU."""
    cores = [core for group in block for core in group]
    for thread in range(max(len(core.cpus) for core in cores)):
        first = next(core.cpus[thread].id for core in cores if thread < len(core.cpus))
        line = [plain(f"   {first:>{digits}}")]
        for group in block:
            line.append(plain(" "))
            line.extend(_cell(picture, core, thread) for core in group)
        yield _merged(line)


def _cell(picture: Picture, core: PictureCore, thread: int) -> Span:
    if thread >= len(core.cpus):
        return plain(" ")
    cpu = core.cpus[thread]
    return part_mark(picture, cpu.state, cpu.holders)


def _merged(line: Sequence[Span]) -> Line:
    """Return a line in which neighbours of the same look are one span."""
    done: list[Span] = []
    for span in line:
        if done and done[-1].holder == span.holder:
            done[-1] = Span(done[-1].text + span.text, span.holder)
        else:
            done.append(span)
    return tuple(done)


def _devices(picture: Picture, kind: str, devices: Sequence[PictureDevice], width: int) -> Iterator[Line]:
    marks = [(part_mark(picture, one.state, one.holders), *_illness(one)) for one in devices]
    if len(devices) > MOST_NAMED:
        between = f"{len(devices)}: {devices[0].id} to {devices[-1].id}"
        items: list[Item] = [tuple(span for mark in marks for span in mark), *words(printable(between))]
    else:
        items = [(*mark, plain(f" {printable(device_label(one))}")) for mark, one in zip(marks, devices, strict=True)]
    gap = " " if len(devices) > MOST_NAMED else "  "
    yield from wrapped(items, width, first=f"   {kind} ", rest="     ", gap=gap)


def device_label(device: PictureDevice) -> str:
    """Return a device's id, and what the kernel calls it."""
    return device.id + (f" ({device.name})" if device.name and device.name not in device.id else "")


def _illness(device: PictureDevice) -> list[Span]:
    return [plain(ILL)] if device.health != "healthy" else []


# ---------------------------------------------------------------- the legend


def _legend(index: int, holder: PictureHolder, width: int) -> Iterator[Line]:
    items = [(plain(printable(word)),) for word in (holder.name + ":", *" ".join(holdings(holder)).split(" "))]
    lines = wrapped(items, width - 2, rest="  ")
    yield (Span(holder.letter, index), plain(" "), *next(lines))
    yield from ((plain("  "), *line) for line in lines)


def holdings(holder: PictureHolder) -> list[str]:
    """Return what a holder has, in phrases with commas between them."""
    parts = [f"CPUs {holder.cpus}"] if holder.cpus else []
    parts += list(holder.devices)
    parts += [f"{pages_of(one.pages, one.page_bytes)} on node {one.node}" for one in holder.hugepages]
    parts += [f"{_gib(size)} on node {node}" for node, size in holder.memory]
    return [*(f"{part}," for part in parts[:-1]), *parts[-1:]] or ["nothing exclusive"]


def _key(marks: Sequence[str], width: int) -> Iterator[Line]:
    """Return what marks mean, on one line if they fit."""
    meanings = [f"{mark} {_MEANINGS[mark]}" for mark in marks]
    lines = ["   ".join(meanings)] if len("   ".join(meanings)) <= width else meanings
    for line in lines:
        yield from wrapped(words(line), width, rest="  ") if line in meanings else [(plain(line),)]


def _marks(picture: Picture) -> list[str]:
    """Return the marks that are used, in a fixed order."""
    devices = [device for node in picture.nodes() for device in node.devices]
    parts = [(one.state, one.holders) for one in picture.cpus()] + [(one.state, one.holders) for one in devices]
    used = Counter(part_mark(picture, state, holders).text for state, holders in parts)
    if any(device.health != "healthy" for device in devices):
        used[ILL] += 1
    return [mark for mark in _MEANINGS if used[mark]]
