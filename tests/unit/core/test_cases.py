"""Recorded cases: kubelet's own tables, the bugs found in kubelet and in a CPU driver, and the golden list syntax.

Of kubelet's tables those run that say which CPUs a request gets. The other ones (TestCPUAccumulator*) list in which
order kubelet's allocator visits free sockets, nodes and cores, and what its accumulator says of itself while it works:
inner steps that an exact search does not have, so there is nothing of ours to hold against them.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import MAX_ID, CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, SINGLE, Request
from nodeagent.core.model.topology import EFFICIENCY, PERFORMANCE
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of
from tests.conftest import shared_path
from tests.oracles import placement as oracle
from tests.support.paths import DATA

TABLES = (
    "TestTakeByTopologyNUMAPacked",
    "TestTakeByTopologyWithSpreadPhysicalCPUsPreferredOption",
    "TestTakeByTopologyNUMADistributed",
)
OPTION_NAMES = {
    "AlignBySocket": opt.ALIGN_SOCKET,
    "DistributeCPUsAcrossCores": opt.SPREAD_CORES,
    "DistributeCPUsAcrossNUMA": opt.SPREAD_NUMA,
    "FullPhysicalCPUsOnly": opt.FULL_PCPUS,
    "PreferAlignByUncoreCacheOption": opt.PREFER_L3,
    "StrictCPUReservation": opt.STRICT_RESERVATION,
}


@functools.cache
def recorded(name: str) -> Mapping[str, Any]:
    """A file of cases."""
    found: Mapping[str, Any] = json.loads((DATA / name).read_bytes())
    return found


def expanded(cpus: str) -> list[int]:
    """The numbers of a list such as "0-3,8", read plainly."""
    ranges = [part.split("-") for part in cpus.split(",") if part]
    return [cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)]


def kubelet_rows() -> list[Any]:
    tests = recorded("cpu_assignment.json")["tests"]
    return [
        pytest.param(table, row, id=f"{table.removeprefix('TestTakeByTopology')}-{number}")
        for table in TABLES
        for number, row in enumerate(tests[table])
    ]


def topology(name: str) -> list[oracle.Row]:
    levels = recorded("cpu_assignment.json")["topologies"][name]
    at = {
        level: {cpu: int(number) for number, cpus in groups.items() for cpu in expanded(cpus)}
        for level, groups in levels.items()
    }
    return [(cpu, at["socket"][cpu], at["numa"][cpu], at["uncore"][cpu], at["core"][cpu]) for cpu in at["core"]]


def options_of(table: str, row: Mapping[str, Any]) -> frozenset[str]:
    """What the row's call amounts to in our options."""
    names = {OPTION_NAMES[name] for name in row["options"]}
    if table == "TestTakeByTopologyNUMADistributed":
        names.add(opt.SPREAD_NUMA)
    if row["group"] > 1:
        names.add(opt.FULL_PCPUS)
    return frozenset(names)


def case_of(rows: Iterable[oracle.Row], free: CpuSet, want: int, options: frozenset[str]) -> oracle.Case:
    """The same question to the plain oracle."""
    rows = tuple(rows)
    nodes = max(row[2] for row in rows) + 1
    return oracle.Case(
        rows=rows,
        distances=tuple(10 if a == b else 20 for a in range(nodes) for b in range(nodes)),
        free=frozenset(free),
        want=want,
        whole_cores=opt.FULL_PCPUS in options,
        spread_cores=opt.SPREAD_CORES in options,
        spread_nodes=opt.SPREAD_NUMA in options,
    )


def test_the_recorded_tables_are_all_there() -> None:
    assert len(kubelet_rows()) == 62


def test_the_tables_are_those_that_were_recorded() -> None:
    """Compared with the whole recording, where it is."""
    whole = json.loads(shared_path("cases/cpu_assignment.json").read_bytes())
    for name in recorded("cpu_assignment.json")["topologies"]:
        cpus = whole["topologies"][name]["cpus"].items()
        rows = [(int(cpu), at["socket"], at["numa"], at["uncore"], at["core"]) for cpu, at in cpus]
        assert sorted(topology(name)) == sorted(rows)
    for table, rows in recorded("cpu_assignment.json")["tests"].items():
        told = [
            {
                "topology": row["topo"]["$topology"],
                "options": [name for name, on in row.get("opts", {}).items() if on],
                "group": row.get("cpuGroupSize", 1),
                "free": row["availableCPUs"]["$cpuset"],
                "want": row["numCPUs"],
                "result": row["expResult"]["$cpuset"],
                "fails": bool(row["expErr"]),
            }
            for row in whole["tests"][table]
        ]
        assert rows == told
    bugs = json.loads(shared_path("cases/known_bugs.json").read_bytes())["cases"]
    assert list(recorded("known_bugs.json")) == [bug["id"] for bug in bugs]
    golden = json.loads(shared_path("cases/cpuset_golden.json").read_bytes())
    assert recorded("cpuset_golden.json")["parse"] == [
        {"in": row["in"], "out": row.get("out")} for row in golden["parse"]
    ]


@pytest.mark.parametrize(("table", "row"), kubelet_rows())
def test_our_choice_is_valid_and_never_costs_more_than_kubelets(table: str, row: Mapping[str, Any]) -> None:
    rows = topology(row["topology"])
    free, want = CpuSet.parse(row["free"]), row["want"]
    options = options_of(table, row)
    case = case_of(rows, free, want, options)
    theirs = CpuSet.parse(row["result"])
    request = Request(cpus=want, options=options, within_cpus=free)
    if not feasible(case):
        with pytest.raises(Refused) as refused:
            place(inventory_of(rows), Ledger(), request)
        assert refused.value.want == want
        return
    ours = place(inventory_of(rows), Ledger(), request).cpus
    assert ours <= free
    assert len(ours) == want
    if want:
        mine, yours = oracle.cost(case, tuple(ours)), oracle.cost(case, tuple(theirs)) if theirs else None
        assert mine is not None, "not valid under its own options"
        assert yours is None or mine <= yours
        assert not row["fails"] or yours is None


def feasible(case: oracle.Case) -> bool:
    """Whether any set will do: enough CPUs or, where only whole cores will, whole free cores that add up."""
    cores = [len(core) for core in case.members(4).values() if not case.whole_cores or core <= case.free]
    if not case.whole_cores:
        return len(case.free) >= case.want
    sums = {0}
    for size in cores:
        sums |= {one + size for one in sums}
    return case.want in sums


# ---------------------------------------------------------------- known bugs, one test each


def bug(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = recorded("known_bugs.json")[name]
    return found


def numbered(packages: int, nodes: int, cores: int) -> list[oracle.Row]:
    """cpu = core + thread * cores; nodes per package, cores per node, two threads."""
    return even_rows(packages, nodes, 1, cores, 2)


def test_every_known_bug_has_its_test() -> None:
    named = {name.removeprefix("test_bug_").replace("_", "-") for name in globals() if name.startswith("test_bug_")}
    assert named == set(recorded("known_bugs.json"))


def test_bug_hang_distribute_full_pcpus() -> None:
    """14 CPUs in whole cores from 7 free whole cores; it ends."""
    case, rows = bug("hang-distribute-full-pcpus"), numbered(1, 4, 4)
    free, options = CpuSet.parse(case["available"]), frozenset({opt.SPREAD_NUMA, opt.FULL_PCPUS})
    found = place(inventory_of(rows), Ledger(), Request(cpus=case["n"], options=options, within_cpus=free)).cpus
    assert len(found) == 14
    assert found <= free
    assert oracle.cost(case_of(rows, free, 14, options), tuple(found)) is not None


def test_bug_aliasing_cross_socket() -> None:
    """Four NUMA nodes of one socket."""
    case, rows = bug("aliasing-cross-socket"), numbered(2, 4, 16)
    inventory = inventory_of(rows, distances=even_distances(2, 4))
    found = place(inventory, Ledger(), Request(cpus=case["n"], options=frozenset({opt.SPREAD_NUMA}))).cpus
    used = [inventory.cpu_by_id[one] for one in found]
    assert {cpu.package for cpu in used} == {0}
    assert [sum(cpu.numa_node == node for cpu in used) for node in range(4)] == [32] * 4


def test_bug_aliasing_spurious_error() -> None:
    """25 CPUs where more are free."""
    case, rows = bug("aliasing-spurious-error"), numbered(4, 2, 4)
    free = CpuSet.parse(case["available"])
    assert len(free) > case["n"]
    request = Request(cpus=case["n"], options=frozenset({opt.SPREAD_NUMA}), within_cpus=free)
    found = place(inventory_of(rows), Ledger(), request).cpus
    assert len(found) == 25
    assert found <= free


def test_bug_hybrid_smt_misdetected() -> None:
    """Threads are counted per core; core kinds are chosen by; full-pcpus-only looks at real siblings."""
    bug("hybrid-smt-misdetected")
    rows = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (2, 0, 0, 0, 1), (3, 0, 0, 0, 1)]
    rows += [(cpu, 0, 0, 0, cpu - 2) for cpu in range(4, 8)]
    kinds = {cpu: PERFORMANCE if cpu < 4 else EFFICIENCY for cpu in range(8)}
    inventory = inventory_of(rows, core_kinds=kinds)

    def cpus(count: int, *options: str, held: str = "") -> str:
        ledger = Ledger(reserved=CpuSet.parse(held))
        return str(place(inventory, ledger, Request(cpus=count, options=frozenset(options))).cpus)

    assert cpus(2, "require-performance-cores") == "0-1"
    assert cpus(2, "prefer-efficiency-cores") == "4-5"
    assert cpus(6, "prefer-performance-cores") == "0-5"
    assert cpus(1, opt.FULL_PCPUS) == "4"
    assert cpus(2, opt.FULL_PCPUS, "require-performance-cores", held="1") == "2-3"
    with pytest.raises(Refused):
        cpus(1, opt.FULL_PCPUS, "require-performance-cores")
    with pytest.raises(Refused):
        cpus(4, opt.FULL_PCPUS, "require-performance-cores", held="1")


def test_bug_offline_sibling() -> None:
    """One whole core for two CPUs, not two halves, though CPU 7 is offline."""
    case = bug("offline-sibling")
    rows = [row for row in numbered(1, 1, 4) if row[0] != 7]
    for options in (frozenset[str](), frozenset({opt.FULL_PCPUS})):
        assert str(place(inventory_of(rows), Ledger(), Request(cpus=case["request"], options=options)).cpus) == "0,4"


def test_bug_sparse_numa_ids_closest() -> None:
    """Distances go by node id, and the nearest of the others is taken."""
    case = bug("sparse-numa-ids-closest")
    ids, table = case["numa_ids"], case["distances"]
    distances = {(a, b): table[str(a)][at] for a in ids for at, b in enumerate(ids)}
    inventory = inventory_of(numbered(1, 2, 2), ids=dict(enumerate(ids)), distances=distances)
    placement = place(inventory, Ledger(), Request(cpus=6))
    assert (placement.cost.numa_nodes, placement.cost.numa_distance) == (2, 80)
    further = {(a, b): 10 if a == b else 40 if 16 in (a, b) else 21 for a in (0, 8, 16) for b in (0, 8, 16)}
    inventory = inventory_of(numbered(1, 3, 2), ids={0: 0, 1: 16, 2: 8}, distances=further)
    used = {inventory.cpu_by_id[one].numa_node for one in place(inventory, Ledger(), Request(cpus=8)).cpus}
    assert used == {0, 8}


def test_bug_numa_id_ge_64() -> None:
    """Any node id will do: those of the case, and 250 to 255."""
    case = bug("numa-id-ge-64")
    for ids in (case["numa_ids"], [72, 73], [250, 255]):
        inventory = inventory_of(numbered(1, 2, 2), ids=dict(enumerate(ids)), pages={(ids[1], GIB): 2})
        placement = place(inventory, Ledger(), Request(cpus=2, hugepages={GIB: 1}, numa=SINGLE))
        assert {inventory.cpu_by_id[one].numa_node for one in placement.cpus} == {ids[1]}


def gpus(nodes: int) -> list[Device]:
    return [Device(kind="gpu", id=f"gpu{node:02}", numa_node=node) for node in range(nodes)]


def test_bug_hint_explosion_16_numa() -> None:
    """One CPU on 16 NUMA nodes and all sorts of requests on 36 nodes: bounded work for any number of nodes."""
    bug("hint-explosion-16-numa")
    start = time.monotonic()
    sixteen = inventory_of(numbered(2, 8, 8), distances=even_distances(2, 8))
    assert str(place(sixteen, Ledger(), Request(cpus=1)).cpus) == "0"
    pages = {(node, size): 4 for node in range(36) for size in (2 << 20, GIB)}
    many = inventory_of(numbered(2, 18, 2), distances=even_distances(2, 18), pages=pages, devices=gpus(36))
    for numa, cpus in itertools.product((SINGLE, RESTRICTED, BEST_EFFORT), (1, 4, 64)):
        for request in (
            Request(cpus=cpus, numa=numa),
            Request(cpus=cpus, numa=numa, hugepages={2 << 20: 4, GIB: 3}),
            Request(cpus=cpus, numa=numa, hugepages={GIB: 64}, memory_bytes=8 * GIB),
            Request(cpus=cpus, numa=numa, hugepages={GIB: 3}, devices={"gpu": 3}),
        ):
            answer_or_refusal(many, request)
    # Generous: kubelet takes 3 s for the first of them and years for the last.
    assert time.monotonic() - start < 30


def answer_or_refusal(inventory: Inventory, request: Request) -> None:
    try:
        assert len(place(inventory, Ledger(), request).cpus) == request.cpus
    except Refused as refused:
        assert request.numa == SINGLE, refused


def test_bug_dra_driver_cpu_foreign_socket() -> None:
    """2000 random requests from socket 1, whose core numbers repeat those of socket 0: always CPUs that are free."""
    bug("dra-driver-cpu-foreign-socket")
    rows = even_rows(2, 1, 12, 8, 2)
    inventory = inventory_of(rows)
    cores = [(row[0], row[0] + 192) for row in rows if row[1] == 1 and row[0] < 192]
    pick = random.Random(1)
    for _ in range(2000):
        chosen = pick.sample(cores, pick.randint(1, len(cores)))
        free = CpuSet(itertools.chain.from_iterable(chosen))
        want = 2 * pick.randint(1, len(chosen))
        options = frozenset({opt.FULL_PCPUS, opt.PREFER_L3})
        found = place(inventory, Ledger(), Request(cpus=want, options=options, within_cpus=free)).cpus
        assert found <= free
        assert len(found) == want
        assert all(one % 192 + 192 in found and one % 192 in found for one in found)


# ---------------------------------------------------------------- list syntax

TOO_LARGE = {"4294967296"}
"""Read by kubelet, refused here: no kernel has such a CPU."""


def golden_lists() -> list[Any]:
    return [pytest.param(row, id=repr(row["in"])) for row in recorded("cpuset_golden.json")["parse"]]


@pytest.mark.parametrize("row", golden_lists())
def test_a_list_is_read_as_the_golden_reader_reads_it(row: Mapping[str, Any]) -> None:
    if row["out"] is None or row["in"] in TOO_LARGE:
        with pytest.raises(InputError, match="cannot read CPU list"):
            CpuSet.parse(row["in"])
        return
    found = CpuSet.parse(row["in"])
    assert list(found) == expanded(row["out"])
    assert str(found) == row["out"]


def test_what_is_refused_on_purpose_is_out_of_range() -> None:
    accepted = {row["in"] for row in recorded("cpuset_golden.json")["parse"] if row["out"] is not None}
    assert accepted >= TOO_LARGE
    assert all(int(one) > MAX_ID for one in TOO_LARGE)


def test_set_algebra_agrees_with_the_golden_answers() -> None:
    for row in recorded("cpuset_golden.json")["sets"]:
        a, b = CpuSet(expanded(row["a"])), CpuSet(expanded(row["b"]))
        assert (str(a), str(b)) == (row["a"], row["b"])
        assert len(a) == len(expanded(row["a"]))
        assert str(a | b) == row["union"]
        assert str(a & b) == row["intersection"]
        assert str(a - b) == row["difference"]
        assert (a <= b) == row["subset"]
        assert (a == b) == row["equal"]
        assert CpuSet.parse(row["union"]) == a | b
