"""CPUs that are distributed over NUMA nodes or over cores: equal shares, else those that differ least; distinct cores
before few L3 groups."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent import _fastpath
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.request import Placement, Request
from nodeagent.core.placement.place import place
from tests.builders.inventories import even_distances, even_rows, inventory_of
from tests.oracles import placement as oracle
from tests.unit.core.test_fastpath import ask, random_mask

Rows = list[oracle.Row]


def placed(rows: Rows, free: CpuSet, want: int, *options: str, **more: object) -> Placement:
    nodes = max(row[2] for row in rows) + 1
    machine = inventory_of(rows, distances=even_distances(1, nodes))
    request = Request(cpus=want, options=frozenset(options), within_cpus=free, **more)  # type: ignore[arg-type]
    return place(machine, Ledger(), request)


def shares(rows: Rows, cpus: CpuSet) -> list[int]:
    """How many CPUs each node gives, the most first."""
    return sorted(Counter(row[2] for row in rows if row[0] in cpus).values(), reverse=True)


def first_cores(rows: Rows, *cores: int) -> CpuSet:
    """The CPUs of the first so many cores of each node."""
    on_node = {node: sorted({row[4] for row in rows if row[2] == node})[:count] for node, count in enumerate(cores)}
    return CpuSet(row[0] for row in rows if row[4] in on_node[row[2]])


# ---------------------------------------------------------------- over NUMA nodes


def test_where_equal_shares_are_impossible_they_differ_as_little_as_possible() -> None:
    """90 CPUs in whole cores from nodes with 68 and 34 free are 56 and 34, not 68 and 22."""
    rows = even_rows(1, 2, 5, 10, 2)
    free = first_cores(rows, 34, 17)
    assert shares(rows, placed(rows, free, 90, opt.SPREAD_NUMA, opt.FULL_PCPUS).cpus) == [56, 34]
    assert shares(rows, placed(rows, free, 91, opt.SPREAD_NUMA).cpus) == [57, 34]


def test_even_shares_of_more_nodes_are_preferred_to_uneven_ones_of_fewer() -> None:
    rows = even_rows(1, 3, 1, 10, 1)
    assert shares(rows, placed(rows, first_cores(rows, 10, 4, 4), 12, opt.SPREAD_NUMA).cpus) == [4, 4, 4]
    assert shares(rows, placed(rows, first_cores(rows, 10, 4, 3), 12, opt.SPREAD_NUMA).cpus) == [8, 4]


def test_sockets_count_before_how_much_the_shares_differ() -> None:
    """One socket gives 9 and 2; 7 and 4 would need both."""
    rows = even_rows(2, 2, 1, 9, 1)
    assert shares(rows, placed(rows, first_cores(rows, 9, 2, 4, 0), 11, opt.SPREAD_NUMA).cpus) == [9, 2]


def test_nearness_counts_before_how_much_the_shares_differ() -> None:
    rows = even_rows(1, 2, 5, 10, 2)
    free = first_cores(rows, 34, 17)
    near = placed(rows, free, 90, opt.SPREAD_NUMA, opt.FULL_PCPUS, near_nodes=(0,))
    assert shares(rows, near.cpus) == [68, 22]
    near = placed(rows, free, 90, opt.SPREAD_NUMA, opt.FULL_PCPUS, near_nodes=(1,))
    assert shares(rows, near.cpus) == [56, 34]


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32))
def test_shares_of_real_machines_are_even_or_differ_least(seed: int) -> None:
    """All ways to share the CPUs among all sets of nodes, on machines with up to 40 cores to a node."""
    pick = random.Random(seed)
    packages, per_package = pick.choice([(1, 2), (2, 1), (1, 3), (2, 2)])
    cores, threads = pick.choice([4, 12, 40]), pick.choice([1, 2])
    rows = even_rows(packages, per_package, 1, cores, threads)
    there = [pick.choice([0, cores, pick.randint(0, cores)]) for _ in range(packages * per_package)]
    if not any(there):
        return
    want = pick.randint(1, sum(there)) * threads
    options = (opt.SPREAD_NUMA, opt.FULL_PCPUS) if threads == 2 else (opt.SPREAD_NUMA,)
    found = placed(rows, first_cores(rows, *there), want, *options)
    given_by = Counter(row[2] for row in rows if row[0] in found.cpus)
    counts = tuple(given_by[node] // threads for node in range(len(there)))
    assert rank(counts, per_package) == min(rank(one, per_package) for one in all_shares(there, want // threads))


def all_shares(there: list[int], want: int) -> Iterator[tuple[int, ...]]:
    """All ways in which nodes with so many free cores can give `want` of them."""
    for counts in itertools.product(*(range(most + 1) for most in there[:-1])):
        if 0 <= want - sum(counts) <= there[-1]:
            yield (*counts, want - sum(counts))


def rank(counts: tuple[int, ...], per_package: int) -> tuple[bool, int, int, int]:
    """Whether shares are uneven, then packages, nodes and how much they differ."""
    used = [count for count in counts if count]
    difference = max(used) - min(used)
    packages = len({node // per_package for node, count in enumerate(counts) if count})
    return difference > 1, packages, len(used), difference if difference > 1 else 0


def random_case(seed: int) -> oracle.Case | None:
    """A small machine with nodes of different sizes, nested, crossed or with several packages to a node, whose cores
    may have different numbers of threads."""
    pick = random.Random(seed)
    count, nodes, packages = pick.randint(4, 12), pick.randint(2, 4), pick.randint(1, 2)
    shape, threads = pick.choice(["nested", "nested", "crossed", "packages in nodes"]), pick.choice([1, 2, 2, 0])
    weights = [pick.choice([1, 1, 2, 5]) for _ in range(nodes)]
    rows = []
    for cpu in range(count):
        core = cpu // threads if threads else pick.randint(0, count // 2 + 1)
        of_core = random.Random(seed * 1000 + core)
        node = of_core.choices(range(nodes), weights)[0]
        package = {"nested": node % packages, "crossed": of_core.randint(0, packages - 1)}.get(
            shape, 2 * node + core % 2
        )
        rows.append((cpu, package, node, 100 * package + 10 * node + of_core.randint(0, 2), core))
    index = {node: i for i, node in enumerate(sorted({row[2] for row in rows}))}
    rows = [(cpu, package, index[node], l3, core) for cpu, package, node, l3, core in rows]
    far = pick.choice([[20], [11, 12, 20, 21]])
    odds = pick.choice([0.8, 1])
    free = frozenset(row[0] for row in rows if pick.random() < odds)
    if not free:
        return None
    want, whole = pick.randint(1, len(free)), pick.random() < 0.4
    return oracle.Case(
        rows=tuple(rows),
        distances=tuple(10 if a == b else pick.choice(far) for a in range(len(index)) for b in range(len(index))),
        free=free,
        want=want,
        must=frozenset(pick.sample(sorted(free), min(want, pick.choice([0, 0, 0, 1, 2])))),
        whole_cores=whole,
        spread_cores=not whole and pick.random() < 0.3,
        spread_nodes=pick.random() < 0.9,
        most_packages=pick.choice([0, 0, 0, 0, 1, 2]),
        most_nodes=pick.choice([0, 0, 0, 0, 2, 3]),
        near=tuple((random_mask(pick, rows), pick.randint(1, 5)) for _ in range(pick.choice([0, 0, 1, 2]))),
        taste=((random_mask(pick, rows), 1),) if pick.random() < 0.2 else (),
    )


@settings(max_examples=3000, deadline=None)
@given(st.integers(0, 2**32))
def test_the_distributed_choice_costs_what_the_best_of_all_choices_costs(seed: int) -> None:
    case = random_case(seed)
    if case is None:
        return
    found, expected = ask(case), oracle.best(case)
    assert (found is None) == (expected is None)
    if found is None:
        return
    chosen = _fastpath.ids(found[0])
    assert len(chosen) == case.want
    assert oracle.cost(case, chosen) == expected
    assert oracle.ordered(case, oracle.Parts(*found[1:12], found[13])) == expected
    assert found[12] is True


def test_uneven_shares_of_thirty_two_nodes_with_odd_distances_still_end() -> None:
    pick = random.Random(7)
    rows = [(cpu, cpu % 2, cpu // 8, cpu // 8, cpu // 2) for cpu in range(256)]
    distances = [10 if a == b else pick.randint(11, 40) for a in range(32) for b in range(32)]
    layout = _fastpath.Layout(rows, 32, distances)
    free = sum(1 << cpu for cpu in range(256) if pick.random() < (0.9, 0.3, 0.5, 0.8)[cpu // 8 % 4])
    for near in ((), (((1 << 64) - 1, 3),)):
        found = layout.choose(free, 100, spread_nodes=True, near=near)
        assert found is not None
        assert found[0].bit_count() == 100


# ---------------------------------------------------------------- over cores


def test_distinct_cores_count_before_few_l3_groups() -> None:
    """36 CPUs where 70 cores are free are on 36 cores."""
    rows = even_rows(1, 1, 8, 10, 2)
    free = CpuSet(row[0] for row in rows if row[4] % 8)
    found = placed(rows, free, 36, opt.SPREAD_CORES)
    assert len({row[4] for row in rows if row[0] in found.cpus}) == 36
    assert (found.cost.split_cores, found.cost.l3) == (0, 4)


def test_nodes_and_distance_count_before_distinct_cores() -> None:
    rows = even_rows(1, 2, 2, 4, 2)
    found = placed(rows, CpuSet(range(32)), 12, opt.SPREAD_CORES)
    assert (found.cost.numa_nodes, found.cost.split_cores, found.cost.l3) == (1, 4, 2)
