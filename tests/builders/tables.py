"""The /sys and /proc of recorded machines, written again from the small tables in tests/data/machines.

    root = build(tmp_path, load("48amd64-4pa2n6c-sparse"))

A table has the facts that the agent reads, grouped by value: which CPUs share what, what each NUMA node has, where the
devices are. tests/builders/captures.py makes a table from a captured tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from tests.builders.tree_writer import TreeWriter
from tests.support.paths import DATA

TABLES = DATA / "machines"
TREES = DATA / "trees"
"""Small trees of which a table has every file."""
CPU, NODE = "sys/devices/system/cpu", "sys/devices/system/node"
PAGES, BUS = "sys/kernel/mm/hugepages", "sys/bus/pci/devices"
MASKS = ("package_cpus", "core_siblings", "die_cpus", "cluster_cpus", "core_cpus", "thread_siblings", "shared_cpu_map")
"""Files of a CPU that hold a hexadecimal mask; a table has its members in list syntax, as in "0-3,8"."""

Grouped = dict[str, dict[str, str] | list[str]]
"""Files with equal content, separated by spaces -> what they hold and which CPUs or nodes hold it. A list has the sets
of CPUs that each of their members names."""


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A PCI function, as the files of its folder say."""

    pci_class: str
    vendor: str
    device: str
    numa_node: int | None = None
    local_cpus: str | None = None
    driver: str | None = None
    max_vfs: int | None = None


class NodeAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A NUMA node as hwloc shows it. pages: bytes of a page -> how many."""

    cpus: str
    memory_bytes: int
    pages: dict[int, int]


class Distances(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A square matrix of distances, in order of `nodes`."""

    nodes: list[int]
    rows: list[list[int]]


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A PCI function as hwloc lists it; class and ids as in "0200 [8086:1572]"."""

    address: str
    type: str
    local_cpus: str


class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What hwloc 2.9 made of the machine."""

    online: str
    offline: list[int]
    levels: dict[str, list[str]]
    """package, core, l2, l3 -> sets of CPUs."""
    nodes: dict[int, NodeAnswer]
    distances: list[Distances]
    kinds: list[str]
    """CPUs of each kind, the slowest first."""
    pci: list[Listed]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The facts of one machine."""

    source: str
    cpu_lists: dict[str, str] = {}
    """Files next to the folders of CPUs."""
    cpus: Grouped = {}
    """Files of CPUs; "node" is the number of the link to the node."""
    node_lists: dict[str, str] = {}
    nodes: Grouped = {}
    """Files of NUMA nodes; meminfo is MemTotal in kB."""
    meminfo_kib: int | None = None
    """MemTotal of the whole machine."""
    pages: dict[str, dict[str, int]] = {}
    """Hugepage pools of the whole machine."""
    pci: dict[str, Function] = {}
    """Folder below sys/devices -> what it is."""
    members: dict[str, dict[str, dict[str, str]]] = {}
    """Class of devices -> folder below sys/devices -> its files."""
    files: dict[str, str] = {}
    folders: list[str] = []
    """Empty ones."""
    links: dict[str, str] = {}
    """Path -> path of what it points to, both below the root."""
    hwloc: Answers | None = None


def names(*, answered: bool = True) -> list[str]:
    """The machines that there are tables of; `answered`: only those that hwloc's answers are known of."""
    found = sorted(path.stem for path in TABLES.glob("*.json"))
    return [name for name in found if not answered or load(name).hwloc is not None]


def load(name: str, folder: Path = TABLES) -> Table:
    return msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=Table)


def build(root: Path, table: Table) -> Path:
    """Write the machine below `root`; returns `root`."""
    numbers = (*table.cpu_lists.values(), *_holders(table.cpus))
    width = max((CpuSet.parse(text).mask.bit_length() for text in numbers), default=0)
    tree = TreeWriter(root)
    for path, text in _texts(table, width):
        tree.write(path, text)
    for path, target in _links(table):
        tree.link(path, os.path.relpath(target, os.path.dirname(path)))
    for path in table.folders:
        tree.folder(path)
    return root


def _holders(grouped: Grouped) -> Iterator[str]:
    for by_value in grouped.values():
        yield from by_value.values() if isinstance(by_value, dict) else by_value


def _texts(table: Table, width: int) -> Iterator[tuple[str, str]]:
    """Path and content of every file."""
    yield from ((f"{CPU}/{name}", text) for name, text in table.cpu_lists.items())
    yield from ((f"{NODE}/{name}", text) for name, text in table.node_lists.items())
    yield from _of_cpus(table.cpus, width)
    yield from _of_nodes(table.nodes, width)
    if table.meminfo_kib is not None:
        yield "proc/meminfo", f"MemTotal: {table.meminfo_kib} kB"
    for size, counts in table.pages.items():
        yield from ((f"{PAGES}/hugepages-{size}/{name}", str(count)) for name, count in counts.items())
    for folder, function in table.pci.items():
        yield from _of_function(f"sys/devices/{folder}", function, width)
    for folders in table.members.values():
        for folder, files in folders.items():
            yield from ((f"sys/devices/{folder}/{name}", text) for name, text in files.items())
    yield from table.files.items()


def _each(grouped: Grouped) -> Iterator[tuple[str, int, str]]:
    """Name of the file, number of the CPU or node, and content."""
    for written, by_value in grouped.items():
        values = by_value if isinstance(by_value, dict) else dict(zip(by_value, by_value, strict=True))
        for value, numbers in values.items():
            for number in CpuSet.parse(numbers):
                yield from ((name, number, value) for name in written.split())


def _of_cpus(grouped: Grouped, width: int) -> Iterator[tuple[str, str]]:
    for name, cpu, text in _each(grouped):
        if name != "node":
            yield f"{CPU}/cpu{cpu}/{name}", mask(text, width) if name.endswith(MASKS) else text


def _of_nodes(grouped: Grouped, width: int) -> Iterator[tuple[str, str]]:
    for name, node, text in _each(grouped):
        if name == "cpumap":
            text = mask(text, width)
        elif name == "meminfo":
            text = f"Node {node} MemTotal: {text} kB"
        yield f"{NODE}/node{node}/{name}", text


def _of_function(folder: str, function: Function, width: int) -> Iterator[tuple[str, str]]:
    yield f"{folder}/class", f"0x{function.pci_class}"
    yield f"{folder}/vendor", f"0x{function.vendor}"
    yield f"{folder}/device", f"0x{function.device}"
    for name, number in (("numa_node", function.numa_node), ("sriov_totalvfs", function.max_vfs)):
        if number is not None:
            yield f"{folder}/{name}", str(number)
    if function.local_cpus is not None:
        yield f"{folder}/local_cpus", mask(function.local_cpus, width)


def _links(table: Table) -> Iterator[tuple[str, str]]:
    """Path of every link, and where it leads."""
    for name, cpu, node in _each(table.cpus):
        if name == "node":
            yield f"{CPU}/cpu{cpu}/node{node}", f"{NODE}/node{node}"
    for folder, function in table.pci.items():
        yield f"{BUS}/{os.path.basename(folder)}", f"sys/devices/{folder}"
        if function.driver is not None:
            yield f"sys/devices/{folder}/driver", f"sys/bus/pci/drivers/{function.driver}"
    for kind, folders in table.members.items():
        yield from ((f"sys/class/{kind}/{os.path.basename(folder)}", f"sys/devices/{folder}") for folder in folders)
    yield from table.links.items()


def mask(cpus: str, width: int) -> str:
    """The kernel's %*pb of a CPU list: words of 32 bits, as many as `width` CPUs need."""
    digits = f"{CpuSet.parse(cpus).mask:0{8 * ((width + 31) // 32)}x}"
    digits = digits.zfill(-(-len(digits) // 8) * 8)
    return ",".join(digits[at : at + 8] for at in range(0, len(digits), 8))
