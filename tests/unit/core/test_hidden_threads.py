"""Hidden hyperthreads: one thread of each granted core runs, the others are held and idle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.dra.prepare import grants_of
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.pinning.pools import exclusive_cpus
from nodeagent.core.pinning.threads import used_cpus
from nodeagent.resources.offer import held_variables
from tests.builders.inventories import inventory_of
from tests.unit.core.test_named_pools import Node, asked, catalog, machine


def test_a_container_runs_on_one_thread_of_each_core_and_the_others_are_nobody_s() -> None:
    """CPU n and n + 8 are siblings; 0 is reserved, so the core of 0 and 8 is never whole."""
    node = Node()
    node.give(asked("a", "", 4, hideHyperthreads=True))
    held, pin = node.held("a"), node.pin("a")
    assert len(held) == 4 and {(cpu + 8) % 16 for cpu in held} == {*held}
    assert pin.cpus == CpuSet(cpu for cpu in held if cpu < 8)
    assert (pin.held, pin.hidden, pin.exclusive) == (held, held - pin.cpus, True)
    assert node.situation.shared.isdisjoint(held) and held <= exclusive_cpus(node.ledger)
    (grant,) = grants_of(node.ledger, "uid-a")
    assert held_variables(node.inventory, [grant])["NODEAGENT_CPUS"] == str(pin.cpus)


def test_half_a_core_is_refused() -> None:
    node = Node()
    assert "full-pcpus-only" in node.prepare(asked("a", "", 3, hideHyperthreads=True))["uid-a"]
    single = Node(of=catalog("individual"))
    why = single.prepare(asked("a", "", 1, "cpu5", hideHyperthreads=True))["uid-a"]
    assert "hideHyperthreads needs whole cores: CPU 5 is one of 2 threads of its core" in why


def test_a_core_of_one_thread_has_nothing_to_hide() -> None:
    rows = [(cpu, 0, 0, 0, cpu) for cpu in range(4)]
    for group, on, count in (("numa-node", "numa0", 2), ("individual", "cpu2", 1)):
        node = Node(inventory_of(rows), catalog(group))
        node.give(asked("a", "", count, on, hideHyperthreads=True))
        assert node.pin("a").cpus == node.held("a") and not node.pin("a").hidden


def test_where_the_first_thread_is_offline_the_next_one_runs() -> None:
    node = Node()
    node.give(asked("a", "", 2, hideHyperthreads=True))
    low, high = node.held("a")
    node.inventory = machine(frozenset({low}))
    pin = node.pin("a")
    assert (pin.cpus, pin.lost, pin.hidden) == (CpuSet([high]), CpuSet([low]), EMPTY)
    node.inventory = machine(frozenset({low, high}))
    assert node.pin("a").cpus == node.situation.shared


def test_a_claim_without_it_runs_on_all_threads() -> None:
    node = Node()
    node.give(asked("a", "", 4, options=["full-pcpus-only"]))
    assert node.pin("a").cpus == node.held("a") and node.pin("a").hidden == EMPTY


@given(
    threads=st.sampled_from([1, 2, 4]),
    wanted=st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=4),
    gone=st.frozensets(st.integers(0, 23), max_size=4),
)
def test_whatever_is_granted_no_core_runs_two_threads_of_who_hides_them(
    threads: int, wanted: list[tuple[int, bool]], gone: frozenset[int]
) -> None:
    """Cores of any number of threads, claims with and without, and CPUs that go offline afterwards."""
    rows = [(cpu, 0, 0, 0, cpu // threads) for cpu in range(24)]
    node = Node(inventory_of(rows))
    hiding = [n for n, (count, hides) in enumerate(wanted) if _given(node, n, count, hides=hides) and hides]
    before = {n: node.pin(f"c{n}") for n in hiding}
    node.inventory = inventory_of([row for row in rows if row[0] not in gone])
    for n in hiding:
        (grant,) = grants_of(node.ledger, f"uid-c{n}")
        used = used_cpus(node.inventory, grant)
        cores = {cpu // threads for cpu in grant.cpus}
        assert len(before[n].held) == threads * len(cores) and before[n].cpus is not None
        assert sorted(cpu // threads for cpu in before[n].cpus) == sorted(cores)
        left = grant.cpus - CpuSet(gone)
        assert used <= left and sorted(cpu // threads for cpu in used) == sorted({cpu // threads for cpu in left})
        pin = node.pin(f"c{n}")
        assert pin.cpus == (used or node.situation.shared)
        assert pin.hidden | used | pin.lost == grant.cpus and pin.hidden.isdisjoint(used)


def _given(node: Node, number: int, count: int, *, hides: bool) -> bool:
    return not node.prepare(asked(f"c{number}", "", count, hideHyperthreads=hides))


@pytest.mark.parametrize("said", ['{"hide_hyperthreads":true,"what_is_this":1}', ""])
def test_settings_that_cannot_be_read_hide_nothing(said: str) -> None:
    node = Node()
    node.give(asked("a", "", 2, hideHyperthreads=True))
    (grant,) = grants_of(node.ledger, "uid-a")
    assert used_cpus(node.inventory, replace(grant, settings=said)) == grant.cpus
