"""The compiled core answers as the plain oracle does."""

from __future__ import annotations

import itertools
import random
from array import array

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodeagent import _fastpath
from tests.oracles import placement as oracle

SIZES = (1, 63, 64, 65, 127, 128, 129, 4096)


@pytest.mark.parametrize("size", SIZES)
def test_lists_read_back_what_was_written(size: int) -> None:
    for ids in ({0, size - 1}, set(range(size)), set(range(0, size, 2)), set(range(size // 2, size))):
        mask = sum(1 << one for one in ids)
        text = _fastpath.format_list(mask)
        assert _fastpath.parse_list(text) == mask
        assert text == plain_list(sorted(ids))
        assert _fastpath.ids(mask) == sorted(ids)


def plain_list(ids: list[int]) -> str:
    """Ranges, the plain way."""
    parts = []
    for _, run in itertools.groupby(enumerate(ids), lambda pair: pair[1] - pair[0]):
        members = [one for _, one in run]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(parts)


@given(st.sets(st.integers(0, _fastpath.MAX_ID), max_size=200))
def test_any_set_has_the_plain_list(ids: set[int]) -> None:
    assert _fastpath.format_list(sum(1 << one for one in ids)) == plain_list(sorted(ids))


@given(st.text(alphabet="0123456789-,+ a", max_size=12))
def test_text_is_read_as_the_plain_reader_reads_it(text: str) -> None:
    try:
        expected = plain_parse(text)
    except ValueError:
        with pytest.raises(ValueError, match="position"):
            _fastpath.parse_list(text)
    else:
        assert set(_fastpath.ids(_fastpath.parse_list(text))) == expected


def plain_parse(text: str) -> set[int]:
    ids: set[int] = set()
    for item in text.split(",") if text else []:
        ends = item.split("-")
        numbers = [end.removeprefix("+") for end in ends]
        if len(ends) > 2 or not all(number.isascii() and number.isdigit() for number in numbers):
            raise ValueError(item)
        low, high = int(numbers[0]), int(numbers[-1])
        if low > high or high > _fastpath.MAX_ID:
            raise ValueError(item)
        ids.update(range(low, high + 1))
    return ids


@pytest.mark.parametrize("mask", [-1, 1 << (_fastpath.MAX_ID + 1), 1.5, "1"])
def test_what_is_no_mask_is_refused_by_every_door(mask: object) -> None:
    layout = _fastpath.Layout([(0, 0, 0, 0, 0)], 1, [10])
    for entry in (_fastpath.format_list, _fastpath.ids, lambda bad: layout.choose(bad, 1)):
        with pytest.raises((ValueError, TypeError)):
            entry(mask)


def random_case(seed: int) -> oracle.Case | None:
    """A small machine in some state, with packages, nodes, L3 groups and cores nested, crossed or upside down."""
    pick = random.Random(seed)
    count, ids_below = pick.randint(1, 12), pick.choice([13, 40, 200])
    packages, nodes, groups = pick.randint(1, 3), pick.randint(1, 4), pick.randint(1, 4)
    shape = pick.choice(["nested", "nested", "crossed", "packages in nodes"])
    rows = []
    for cpu in pick.sample(range(ids_below), count):
        core = pick.randint(0, max(1, count // 2))
        of_core = random.Random(seed * 1000 + core)
        l3 = of_core.randint(0, groups)
        if shape == "nested":
            node, package = l3 % nodes, l3 % nodes % packages
        elif shape == "crossed":
            node, package = of_core.randint(0, nodes - 1), of_core.randint(0, packages - 1)
        else:
            package = l3 % packages
            node = package % nodes
        rows.append((cpu, package, node, l3, core))
    index = {node: i for i, node in enumerate(sorted({row[2] for row in rows}))}
    rows = [(cpu, package, index[node], l3, core) for cpu, package, node, l3, core in rows]
    far = [20] if pick.random() < 0.5 else [11, 12, 20, 21]
    distances = tuple(10 if a == b else pick.choice(far) for a in range(len(index)) for b in range(len(index)))
    odds = pick.choice([0.5, 0.8, 1])
    free = frozenset(row[0] for row in rows if pick.random() < odds)
    if not free:
        return None
    want = pick.randint(1, min(len(free), 6))
    whole = pick.random() < 0.25
    even = pick.random() < 0.2
    return oracle.Case(
        rows=tuple(rows),
        distances=distances,
        free=free,
        want=want,
        must=frozenset(pick.sample(sorted(free), min(want, pick.choice([0, 0, 0, 1, 2])))),
        whole_cores=whole,
        spread_cores=not whole and pick.random() < 0.2,
        spread_nodes=even,
        groups_first=not even and pick.random() < 0.2,
        most_packages=pick.choice([0, 0, 0, 1, 2]),
        most_nodes=pick.choice([0, 0, 0, 1, 2]),
        near=tuple((random_mask(pick, rows), pick.randint(1, 30)) for _ in range(pick.choice([0, 0, 1, 3]))),
        taste=((random_mask(pick, rows), 1),) if pick.random() < 0.2 else (),
    )


def random_mask(pick: random.Random, rows: list[oracle.Row]) -> int:
    return sum(1 << row[0] for row in rows if pick.random() < 0.5)


@settings(max_examples=3000, deadline=None)
@given(st.integers(0, 2**32))
@example(1318)
@example(2356)
@example(318)
def test_the_choice_costs_what_the_best_of_all_choices_costs(seed: int) -> None:
    case = random_case(seed)
    if case is None:
        return
    found = ask(case)
    expected = oracle.best(case)
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    chosen = _fastpath.ids(found[0])
    assert len(chosen) == case.want
    assert oracle.cost(case, chosen) == expected
    assert oracle.ordered(case, oracle.Parts(*found[1:12], found[13])) == expected
    assert found[12] is True


def ask(case: oracle.Case) -> _fastpath.Choice | None:
    layout = _fastpath.Layout(list(case.rows), case.nodes, list(case.distances))
    return layout.choose(
        sum(1 << cpu for cpu in case.free),
        case.want,
        must=sum(1 << cpu for cpu in case.must),
        whole_cores=case.whole_cores,
        spread_cores=case.spread_cores,
        spread_nodes=case.spread_nodes,
        groups_first=case.groups_first,
        most_packages=case.most_packages,
        most_nodes=case.most_nodes,
        near=case.near,
        taste=case.taste,
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_the_order_in_which_cpus_are_given_does_not_matter(seed: int) -> None:
    case = random_case(seed)
    if case is None:
        return
    shuffled = list(case.rows)
    random.Random(seed).shuffle(shuffled)
    other = oracle.Case(**{**vars_of(case), "rows": tuple(shuffled)})
    assert ask(case) == ask(other)


def vars_of(case: oracle.Case) -> dict[str, object]:
    return {name: getattr(case, name) for name in oracle.Case.__dataclass_fields__ if name != "places"}


def test_a_virtual_machine_with_a_socket_for_each_cpu_is_answered_exactly() -> None:
    """Hypervisors like to show each CPU as a socket of its own: many packages inside a node are no reason to search."""
    rows = [(cpu, cpu, cpu // 32, cpu, cpu) for cpu in range(128)]
    layout = _fastpath.Layout(rows, 4, [10 if a == b else 20 for a in range(4) for b in range(4)])
    free = sum(1 << cpu for cpu in range(128) if cpu % 3)
    found = layout.choose(free, 40)
    assert found is not None
    assert (found[3], found[4], found[12]) == (40, 2, True)
    limited = layout.choose(free, 4, most_packages=2)
    assert limited is None, "a limit on sockets is kept"


def test_a_machine_of_4096_cpus_is_answered() -> None:
    rows = [(cpu, cpu // 512, cpu // 64, cpu // 16, cpu // 2) for cpu in range(4096)]
    distances = [10 if a == b else 12 if a // 8 == b // 8 else 32 for a in range(64) for b in range(64)]
    layout = _fastpath.Layout(rows, 64, distances)
    everything = (1 << 4096) - 1
    found = layout.choose(everything & ~3, 600)
    assert found is not None
    assert (found[0].bit_count(), found[3], found[4], found[12]) == (600, 2, 10, True)
    assert layout.choose(everything, 4097) is None


def test_sixteen_crossed_nodes_with_odd_distances_still_end() -> None:
    pick = random.Random(7)
    rows = [(cpu, cpu % 2, cpu // 8, cpu // 8, cpu // 2) for cpu in range(256)]
    distances = [10 if a == b else pick.randint(11, 40) for a in range(32) for b in range(32)]
    layout = _fastpath.Layout(rows, 32, distances)
    found = layout.choose((1 << 256) - 1, 100)
    assert found is not None
    assert found[0].bit_count() == 100


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32))
def test_devices_are_chosen_as_the_best_of_all_ways_to_choose_them(seed: int) -> None:
    pick = random.Random(seed)
    count, kinds = pick.randint(1, 6), pick.randint(1, 3)
    classes = []
    for _ in range(count):
        there = pick.randint(1, 3)
        kind, must, free = pick.randint(0, kinds - 1), pick.choice([0, 0, 0, 1]), there + pick.choice([0, 0, 1, 3])
        classes.append((kind, there, must, pick.randint(0, 2), pick.randint(0, 5), free))
    need = [pick.randint(0, 4) for _ in range(kinds)]
    far, link = symmetric(pick, count), symmetric(pick, count)
    assert answer(_fastpath.choose_devices(classes, need, flat(far), flat(link)), classes) == plain_devices(
        classes, need, far, link
    )


Class = tuple[int, int, int, int, int, int]
Ties = dict[tuple[int, ...], int]


def flat(table: list[list[int]]) -> array[int]:
    return array("q", [value for row in table for value in row])


def symmetric(pick: random.Random, count: int) -> list[list[int]]:
    table = [[0] * count for _ in range(count)]
    for a in range(count):
        for b in range(a, count):
            table[a][b] = table[b][a] = pick.randint(0, 9)
    return table


def answer(found: tuple[int, list[tuple[int, list[int]]], bool] | None, classes: list[Class]) -> object:
    if found is None:
        return None
    assert found[2] is True
    return found[0], {places(classes, taken): cut for cut, taken in found[1]}


def places(classes: list[Class], taken: list[int]) -> tuple[int, ...]:
    return tuple(sum(t for t, cls in zip(taken, classes, strict=True) if cls[3] == place) for place in range(3))


def plain_devices(classes: list[Class], need: list[int], far: list[list[int]], link: list[list[int]]) -> object:
    """All ways, the least cost, and for each set of places the smallest cut."""
    least: int | None = None
    ties: Ties = {}
    for taken in itertools.product(*(range(cls[2], cls[1] + 1) for cls in classes)):
        if any(sum(t for t, c in zip(taken, classes, strict=True) if c[0] == k) != n for k, n in enumerate(need)):
            continue
        units = [i for i, t in enumerate(taken) for _ in range(t)]
        price = sum(classes[i][4] for i in units) + sum(far[a][b] for a, b in itertools.combinations(units, 2))
        if least is None or price < least:
            least, ties = price, {}
        if price == least:
            rest = [i for i, t in enumerate(taken) for _ in range(classes[i][5] - t)]
            cut = sum(link[a][b] for a in units for b in rest if classes[a][0] == classes[b][0])
            where = places(classes, list(taken))
            ties[where] = min(cut, ties.get(where, cut))
    return None if least is None else (least, ties)
