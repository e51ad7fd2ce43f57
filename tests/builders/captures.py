"""Makes a table of tests/data/machines from a captured tree, and from what hwloc found in it.

    python -m tests.builders.captures NAME.tar.bz2 [NAME.json] > tests/data/machines/NAME.json
    python -m tests.builders.captures --whole NAME.tar.xz > tests/data/trees/NAME.json

Facts that the agent does not read are left out, as are files that cannot be read.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.tables import (
    BUS,
    CPU,
    MASKS,
    NODE,
    PAGES,
    Answers,
    Distances,
    Function,
    Grouped,
    Listed,
    NodeAnswer,
    Table,
)

CPU_LISTS = ("possible", "present", "online", "offline", "isolated", "nohz_full")
NODE_LISTS = ("possible", "online", "has_cpu", "has_memory", "has_normal_memory")
CPU_FILES = (
    "online",
    *(f"topology/{name}_id" for name in ("physical_package", "die", "cluster", "core", "book", "drawer")),
    "cache/index*/level",
    "cache/index*/type",
    "cache/index*/size",
    "cpu_capacity",
    "cpufreq/base_frequency",
    "cpufreq/cpuinfo_max_freq",
)
FORMS = (
    ("topology/package_cpus_list", "topology/core_siblings_list", "topology/package_cpus", "topology/core_siblings"),
    ("topology/core_cpus_list", "topology/thread_siblings_list", "topology/core_cpus", "topology/thread_siblings"),
    ("topology/die_cpus_list", "topology/die_cpus"),
    ("topology/cluster_cpus_list", "topology/cluster_cpus"),
    *((f"cache/index{index}/shared_cpu_map", f"cache/index{index}/shared_cpu_list") for index in range(8)),
)
"""Files of a CPU with the same sets, under a newer and an older name and in two forms. Where they agree, a table has
only the first of them."""
NODE_FILES = (
    "cpulist",
    "cpumap",
    "distance",
    "access[01]/initiators/read_bandwidth",
    "hugepages/*/*_hugepages",
    "x86/sgx_total_bytes",
)
MEMBERS = {
    "net": ("operstate", "flags", "carrier", "speed", "mtu", "address", "type", "phys_port_name", "phys_switch_id"),
    "block": ("size", "dev", "removable", "partition", "serial", "queue/rotational", "device/model"),
    "infiniband": (),
    "ve": (),
}
"""Classes of devices, and the files of each."""
DAX, DSA, VDPA = "sys/bus/dax/devices", "sys/bus/dsa/devices", "sys/bus/vdpa/devices"
DSA_FILES = (
    *("state", "type", "mode", "size", "priority", "group_id", "threshold", "max_batch_size", "max_transfer_size"),
    *("name", "driver_name", "max_work_queues", "max_groups", "max_engines"),
)
"""Of accelerators and of their queues."""
OTHERS = (
    "sys/devices/cpu_*/cpus",
    "sys/devices/virtual/memory_tiering/memory_tier*/nodelist",
    "proc/driver/nvidia/gpus/*/numa_status",
)


_REFUSE = object()


class Capture(SysFs):
    """A captured tree, read from its archive without unpacking it."""

    def __init__(self, archive: Path) -> None:
        super().__init__("/captured")
        self._files: dict[str, bytes] = {}
        self._links: dict[str, str] = {}
        self._folders: dict[str, set[str]] = {}
        with tarfile.open(archive) as tar:
            for one in tar:
                self._add(tar, one)

    def _add(self, tar: tarfile.TarFile, one: tarfile.TarInfo) -> None:
        path = re.sub(r"^(\./)?(?!(sys|proc)(/|$))[^/]+(/|$)", "", one.name)
        content = tar.extractfile(one) if one.isfile() else None
        if content is not None:
            self._files[path] = content.read()
        elif one.issym():
            self._links[path] = one.linkname
        elif one.isdir():
            self._folders.setdefault(path, set())
        while path:
            path, _, name = path.rpartition("/")
            self._folders.setdefault(path, set()).add(name)

    def real(self, path: str) -> str:
        done: list[str] = []
        left = path.split("/")[::-1]
        while left:
            part = left.pop()
            if part == "..":
                done.pop()
            elif part not in ("", "."):
                done.append(part)
                target = self._links.get("/".join(done))
                if target is not None:
                    done.pop()
                    left += target.split("/")[::-1]
        return "/".join(done)

    def exists(self, path: str) -> bool:
        real = self.real(path)
        return real in self._files or real in self._folders

    def content(self, path: str) -> bytes:
        found = self._files.get(self.real(path))
        if found is None:
            raise HostError(f"cannot read {self.path(path)}: it is not captured")
        return found

    def text(self, path: str, default: object = _REFUSE) -> Any:
        if default is not _REFUSE and self.real(path) not in self._files:
            return default
        return self.content(path).decode("utf-8", "backslashreplace").strip("\0 \t\r\n")

    def names(self, path: str) -> list[str]:
        return sorted(self._folders.get(self.real(path), ()))

    def link(self, path: str) -> str | None:
        folder, _, name = path.rpartition("/")
        return self._links.get(f"{self.real(folder)}/{name}")

    def whole(self, source: str) -> Table:
        """Every file, link and empty folder of a small tree."""
        links = {path: os.path.join(os.path.dirname(path), target) for path, target in self._links.items()}
        return Table(
            source=source,
            files={path: self.text(path) for path in sorted(self._files)},
            folders=sorted(path for path, names in self._folders.items() if not names and path),
            links={path: os.path.normpath(target) for path, target in sorted(links.items())},
        )


def table_of(tree: SysFs, source: str, answers: Answers | None = None) -> Table:
    """The facts of a captured tree."""
    return Table(
        source=source,
        cpu_lists=_texts(tree, CPU, CPU_LISTS),
        cpus=_grouped({**_found(tree, CPU, "cpu", CPU_FILES, _cpu_fact), **_sets(tree), **_node_links(tree)}),
        node_lists=_texts(tree, NODE, NODE_LISTS),
        nodes=_grouped(_found(tree, NODE, "node", (*NODE_FILES, "meminfo"), _node_fact)),
        meminfo_kib=_memory_kib(tree.text("proc/meminfo", None)),
        pages=_pages(tree),
        pci={_below(folder): _function(tree, folder) for folder in _resolved(tree, BUS)},
        members={kind: found for kind in MEMBERS if (found := _members(tree, kind))},
        files=dict(_other_files(tree)),
        links=dict(_bus_links(tree)),
        hwloc=answers,
    )


def _texts(tree: SysFs, folder: str, names: Iterable[str]) -> dict[str, str]:
    return {name: text for name in names if (text := tree.text(f"{folder}/{name}", None)) is not None}


def _matches(tree: SysFs, folder: str, pattern: str) -> list[str]:
    """The files below a folder whose path matches, in order of name."""
    found = [folder]
    for part in pattern.split("/"):
        found = [f"{one}/{name}".lstrip("/") for one in found for name in fnmatch.filter(tree.names(one), part)]
    return found


# ---------------------------------------------------------------- CPUs and nodes

Facts = dict[str, dict[int, str]]
"""File -> CPU or node -> what it says."""


def _found(tree: SysFs, folder: str, prefix: str, patterns: Iterable[str], fact: Callable[[str, str], str]) -> Facts:
    facts: Facts = {}
    for number, entry in tree.numbered(folder, prefix):
        for path in (path for pattern in patterns for path in _matches(tree, entry, pattern)):
            if (text := tree.text(path, None)) is not None:
                name = path.removeprefix(f"{entry}/")
                facts.setdefault(name, {})[number] = fact(name, text)
    return facts


def _sets(tree: SysFs) -> Facts:
    sets: Facts = {}
    for forms in FORMS:
        found = _found(tree, CPU, "cpu", forms, _cpu_fact)
        agree = all(one == first for first in [*found.values()][:1] for one in found.values())
        sets |= dict([*found.items()][: 1 if agree else None])
    return sets


def _cpu_fact(name: str, text: str) -> str:
    return str(CpuSet.parse_mask(text)) if name.endswith(MASKS) else text


def _node_fact(name: str, text: str) -> str:
    if name == "meminfo":
        return str(_memory_kib(text))
    return str(CpuSet.parse_mask(text)) if name == "cpumap" else text


def _memory_kib(text: str | None) -> int | None:
    match = re.search(r"\bMemTotal:\s*(\d+) kB", text or "")
    return int(match[1]) if match else None


def _node_links(tree: SysFs) -> Facts:
    links = {cpu: str(node) for cpu, entry in tree.numbered(CPU, "cpu") for node, _ in tree.numbered(entry, "node")}
    return {"node": links} if links else {}


def _grouped(facts: Facts) -> Grouped:
    """Files that say the same of everything stand together."""
    alike: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for name, values in facts.items():
        alike.setdefault(tuple(sorted(values.items())), []).append(name)
    return {" ".join(names): _by_value(dict(values)) for values, names in alike.items()}


def _by_value(values: Mapping[int, str]) -> dict[str, str] | list[str]:
    numbers: dict[str, list[int]] = {}
    for number, value in values.items():
        numbers.setdefault(value, []).append(number)
    found = {value: str(CpuSet(of)) for value, of in numbers.items()}
    return [*found] if all(value == of for value, of in found.items()) else found


def _pages(tree: SysFs) -> dict[str, dict[str, int]]:
    pools: dict[str, dict[str, int]] = {}
    for what in ("nr", "free", "surplus", "resv", "nr_overcommit"):
        for path in _matches(tree, PAGES, f"hugepages-*/{what}_hugepages"):
            size, name = path.removeprefix(f"{PAGES}/hugepages-").split("/")
            pools.setdefault(size, {})[name] = int(tree.text(path))
    return pools


# ---------------------------------------------------------------- devices


def _resolved(tree: SysFs, folder: str) -> list[str]:
    return [tree.real(f"{folder}/{name}") for name in tree.names(folder)]


def _below(folder: str) -> str:
    return folder.removeprefix("sys/devices/")


def _function(tree: SysFs, folder: str) -> Function:
    local_cpus = tree.cpu_mask(f"{folder}/local_cpus")
    return Function(
        pci_class=tree.text(f"{folder}/class")[2:],
        vendor=tree.text(f"{folder}/vendor")[2:],
        device=tree.text(f"{folder}/device")[2:],
        numa_node=tree.number(f"{folder}/numa_node"),
        local_cpus=None if local_cpus is None else str(local_cpus),
        driver=tree.link_name(f"{folder}/driver"),
        max_vfs=tree.number(f"{folder}/sriov_totalvfs"),
    )


def _members(tree: SysFs, kind: str) -> dict[str, dict[str, str]]:
    folders = (folder for folder in _resolved(tree, f"sys/class/{kind}") if folder.startswith("sys/devices/"))
    return {_below(folder): _texts(tree, folder, MEMBERS[kind]) for folder in folders}


def _other_files(tree: SysFs) -> Iterator[tuple[str, str]]:
    of_dsa = (f"{folder}/{name}" for folder in _resolved(tree, DSA) for name in DSA_FILES)
    of_qat = (f"{folder}/qat/{name}" for folder in _resolved(tree, BUS) for name in ("state", "cfg_services"))
    of_vdpa = (f"{folder}/vhost-vdpa-*/dev" for folder in _resolved(tree, VDPA))
    of_dax = (f"{folder}/target_node" for folder in _resolved(tree, DAX))
    patterns = (*OTHERS, *of_dax, *of_dsa, *of_qat, *of_vdpa)
    for path in (path for pattern in patterns for path in _matches(tree, "", pattern)):
        if (text := tree.text(path, None)) is not None:
            yield path, text


def _bus_links(tree: SysFs) -> Iterator[tuple[str, str]]:
    for bus in (DAX, VDPA):
        for folder in _resolved(tree, bus):
            yield f"{bus}/{folder.rpartition('/')[2]}", folder
            if (driver := tree.link_name(f"{folder}/driver")) is not None:
                yield f"{folder}/driver", f"{bus.removesuffix('devices')}drivers/{driver}"
    for folder in _resolved(tree, DSA):
        yield f"{DSA}/{folder.rpartition('/')[2]}", folder


# ---------------------------------------------------------------- what hwloc found


def answers_of(document: Mapping[str, Any]) -> Answers:
    """The part of a recorded listing that tests compare with."""
    levels: dict[str, dict[str, None]] = {level: {} for level in ("package", "core", "l3", "l2")}
    for cpu in document["cpus"].values():
        for level, seen in levels.items():
            seen.update({cpu[level]["cpus"]: None} if level in cpu else {})
    return Answers(
        online=document["online_cpus"],
        offline=document["raw_sysfs"]["offline"],
        levels={level: [*seen] for level, seen in levels.items()},
        nodes={
            int(node): NodeAnswer(
                cpus=told["cpus"],
                memory_bytes=told["memory_bytes"],
                pages={int(size): count for size, count in told["pages"].items()},
            )
            for node, told in document["numa_nodes"].items()
        },
        distances=[_distances(matrix) for matrix in document["distances"]],
        kinds=[kind["cpus"] for kind in document["cpukinds"]],
        pci=[
            Listed(address=one["busid"], type=" ".join(one["type"].split()[:2]), local_cpus=one["locality"])
            for one in document["pci"]
        ],
    )


def _distances(matrix: Mapping[str, Any]) -> Distances:
    nodes, values = [int(index) for index in matrix["indexes"]], matrix["values"]
    return Distances(nodes=nodes, rows=[values[at : at + len(nodes)] for at in range(0, len(values), len(nodes))])


# ---------------------------------------------------------------- as a file


def written(table: Table) -> str:
    """A table as JSON, one line for each of its facts."""
    return _lines(msgspec.to_builtins(table, str_keys=True), 0) + "\n"


def _lines(value: object, depth: int) -> str:
    if not isinstance(value, dict) or depth == _DEEPEST or not value:
        return json.dumps(value)
    inner = ",\n".join(f"{json.dumps(key)}: {_lines(one, depth + 1)}" for key, one in value.items())
    return f"{{\n{inner}\n}}"


_DEEPEST = 2


def main(archive: str, listing: str = "") -> None:
    if archive == "--whole":
        table = Capture(Path(listing)).whole(Path(listing).name)
    else:
        answers = answers_of(json.loads(Path(listing).read_bytes())) if listing else None
        table = table_of(Capture(Path(archive)), Path(archive).name, answers)
    sys.stdout.write(written(table))


if __name__ == "__main__":
    main(*sys.argv[1:])
