"""What a refusal says is so: the part that it names is short, and what would admit the request does admit it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import EMPTY as NO_CPUS
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import BEST_EFFORT, SINGLE, Pages, Request
from nodeagent.core.placement.place import find, place
from nodeagent.errors import Refused
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.oracles.joint import Oracle
from tests.unit.core.test_joint import ledger_of, random_machine, random_request

EMPTY = Ledger()
EIGHT_NODES = inventory_of(even_rows(4, 2, 1, 6, 1))
"""48 CPUs, six on each NUMA node."""


def refusal(inventory: Inventory, request: Request, ledger: Ledger = EMPTY) -> Refused:
    with pytest.raises(Refused) as caught:
        place(inventory, ledger, request)
    return caught.value


# ---------------------------------------------------------------- what would admit it


@pytest.mark.parametrize(
    ("request_", "held", "advice"),
    [
        (Request(cpus=8), "0-41", "2 more free CPUs would admit it"),
        (Request(cpus=4, numa=SINGLE), "0-43,47", "1 more free CPU would admit it"),
        (Request(cpus=10, numa=SINGLE), "0-41", "under NUMA policy best-effort, 4 more free CPUs would admit it"),
        (Request(cpus=4, numa=SINGLE), "0-40,42-46", "under NUMA policy best-effort, 2 more free CPUs would admit it"),
        (
            Request(cpus=2, options=frozenset({"require-isolated-cpus"})),
            "0-46",
            "without option require-isolated-cpus, 1 more free CPU would admit it",
        ),
        (Request(cpus=49), "0-46", ""),
        (Request(cpus=47), "0-46", "46 more free CPUs would admit it"),
        (Request(cpus=48), "0-46", ""),
    ],
)
def test_more_cpus_are_advised_only_where_they_would_help(request_: Request, held: str, advice: str) -> None:
    """One CPU is reserved: what is never granted cannot be given back."""
    ledger = replace(ledger_of(list(CpuSet.parse(held)), []), reserved=CpuSet([0]))
    assert refusal(EIGHT_NODES, request_, ledger).would_admit == advice


def test_more_of_one_thing_is_not_advised_where_another_is_short_too() -> None:
    gpus = [Device(kind="gpu", id=f"gpu{i}", numa_node=i) for i in range(2)]
    machine = inventory_of(even_rows(1, 2, 1, 2, 1), devices=gpus)
    request = Request(cpus=2, devices={"gpu": 2})
    assert refusal(machine, request, ledger_of([0, 1, 2], ["gpu0"])).would_admit == ""
    assert refusal(machine, request, ledger_of([0, 1, 2], [])).would_admit == "1 more free CPU would admit it"
    assert refusal(machine, request, ledger_of([0, 1], ["gpu0"])).would_admit == "1 more would admit it"


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_what_a_refusal_says_would_admit_the_request_does_admit_it(seed: int) -> None:
    pick = random.Random(seed)
    inventory = random_machine(pick)
    ledger, request = random_ledger(pick, inventory), random_request(pick, inventory)
    try:
        place(inventory, ledger, request)
    except Refused as refused:
        apply_change(inventory, ledger, request, refused)


def random_ledger(pick: random.Random, inventory: Inventory) -> Ledger:
    """Some CPUs, devices, pages and memory are held, one or two CPUs are reserved."""
    odds = pick.choice([0.2, 0.5, 0.9])
    pools = [pool for node in inventory.numa_nodes for pool in node.hugepages]
    pages = [replace_pages(pick, pool.node, pool.page_bytes, pool.free_pages) for pool in pools]
    held = Grant(
        id="one",
        holder=Holder(api=CLAIM, uid="other"),
        cpus=CpuSet(cpu.id for cpu in inventory.cpus if pick.random() < odds),
        devices=tuple(one.id for one in inventory.devices if pick.random() < odds / 2),
        hugepages=tuple(one for one in pages if one.pages),
        memory=tuple((node.id, pick.choice([0, GIB])) for node in inventory.numa_nodes),
    )
    reserved = CpuSet(cpu.id for cpu in inventory.cpus if pick.random() < 0.1)
    return Ledger(grants=MappingProxyType({"one": held}), reserved=reserved)


def replace_pages(pick: random.Random, node: int, page_bytes: int, most: int) -> Pages:
    return Pages(node=node, page_bytes=page_bytes, pages=pick.randint(0, most))


def apply_change(inventory: Inventory, ledger: Ledger, request: Request, refused: Refused) -> None:
    """Make the change that the refusal names, and place again; of what is given back, every choice is tried."""
    how, comma, more = refused.would_admit.rpartition(", ")
    if comma or " more " in more:
        missing = refused.want - refused.free
        assert more.split()[0] in (str(missing), format_size(missing))
        looser = loosened(request, how)
        assert any(find(inventory, one, looser) is not None for one in given_back(inventory, ledger, request, refused))
    elif more.endswith("CPUs would fit"):
        place(inventory, ledger, replace(request, cpus=int(more.split()[0])))
    elif more:
        place(inventory, ledger, loosened(request, more))
    else:
        check_no_advice(inventory, ledger, request, refused)


def loosened(request: Request, how: str) -> Request:
    words = how.removeprefix("under ")
    if words.startswith("NUMA policy best-effort without options"):
        return replace(request, numa=BEST_EFFORT, options=frozenset())
    if words.startswith("NUMA policy best-effort"):
        return replace(request, numa=BEST_EFFORT)
    if words.startswith("without option"):
        return replace(request, options=request.options - {words.split()[2]})
    assert words == "", words
    return request


def given_back(inventory: Inventory, ledger: Ledger, request: Request, refused: Refused) -> Iterator[Ledger]:
    """Every ledger with so much less held as is missing."""
    (grant,) = ledger.grants.values()
    missing = refused.want - refused.free
    if refused.unit == "CPUs":
        for some in itertools.combinations(grant.cpus - ledger.reserved, missing):
            yield with_grant(ledger, replace(grant, cpus=grant.cpus - CpuSet(some)))
    elif refused.unit == "devices":
        mine = [one.id for one in inventory.devices if one.kind in request.devices]
        for some in itertools.combinations(mine, missing):
            gone = excluded_with(inventory, ledger, some)
            yield with_grant(ledger, replace(grant, devices=tuple(one for one in grant.devices if one not in gone)))
    elif refused.unit == "pages":
        size = next(size for size in request.hugepages if format_size(size) in refused.why)
        held = {one.node: one.pages for one in grant.hugepages if one.page_bytes == size}
        rest = tuple(one for one in grant.hugepages if one.page_bytes != size)
        for left in choices(held, missing):
            pages = (Pages(node=node, page_bytes=size, pages=count) for node, count in left.items())
            yield with_grant(ledger, replace(grant, hugepages=(*rest, *pages)))
    else:
        held = {node: amount // GIB for node, amount in grant.memory}
        for left in choices(held, missing // GIB):
            yield with_grant(ledger, replace(grant, memory=tuple((node, count * GIB) for node, count in left.items())))


def choices(held: dict[int, int], missing: int) -> Iterator[dict[int, int]]:
    """Every way to hold so much less."""
    for counts in itertools.product(*(range(count + 1) for count in held.values())):
        if sum(held.values()) - sum(counts) == missing:
            yield dict(zip(held, counts, strict=True))


def with_grant(ledger: Ledger, grant: Grant) -> Ledger:
    return replace(ledger, grants=MappingProxyType({grant.id: grant}))


def check_no_advice(inventory: Inventory, ledger: Ledger, request: Request, refused: Refused) -> None:
    """Nothing is kept back that is plain: CPUs alone, under no rule, that the machine has."""
    alone = not (request.devices or request.hugepages or request.memory_bytes or request.options)
    if alone and request.numa == BEST_EFFORT:
        assert refused.want > len(inventory.cpus_usable - ledger.reserved)


# ---------------------------------------------------------------- which part is short


def test_devices_that_are_short_on_a_node_are_named_also_if_cpus_are_requested() -> None:
    gpus = [Device(kind="gpu", id=f"gpu{i}", numa_node=i) for i in range(2)]
    machine = inventory_of(even_rows(1, 2, 1, 8, 1), devices=gpus, pages={(0, GIB): 2, (1, GIB): 2})
    refused = refusal(machine, Request(cpus=2, devices={"gpu": 2}, numa=SINGLE))
    assert (refused.want, refused.free, refused.unit) == (2, 1, "devices")
    assert refused.why == "cannot place 2 devices of kind gpu under NUMA policy single: 1 would fit"
    assert refused.would_admit == "NUMA policy best-effort would admit it"
    refused = refusal(machine, Request(cpus=10, devices={"gpu": 1}, numa=SINGLE))
    assert (refused.want, refused.free, refused.unit) == (10, 8, "CPUs")
    refused = refusal(machine, Request(cpus=2, devices={"gpu": 1}, hugepages={GIB: 3}, numa=SINGLE))
    assert (refused.want, refused.free, refused.unit) == (3, 2, "pages")


def test_of_two_parts_that_are_short_one_is_named_with_what_would_fit_of_it_alone() -> None:
    gpus = [Device(kind="gpu", id=f"gpu{i}", numa_node=i) for i in range(2)]
    machine = inventory_of(even_rows(1, 2, 1, 8, 1), devices=gpus, pages={(0, GIB): 2, (1, GIB): 2})
    refused = refusal(machine, Request(cpus=2, devices={"gpu": 2}, hugepages={GIB: 3}, numa=SINGLE))
    assert (refused.want, refused.free, refused.unit) == (2, 1, "devices")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_the_part_that_a_refusal_names_is_short(seed: int) -> None:
    """By trying everything: with less of it the request would fit, or it does not fit by itself, or less of it fits
    once other parts are left out."""
    pick = random.Random(seed)
    inventory = random_machine(pick)
    request = random_request(pick, inventory)
    held = [cpu.id for cpu in inventory.cpus if pick.random() < 0.2]
    gone = [one.id for one in inventory.devices if pick.random() < 0.1]
    try:
        place(inventory, ledger_of(held, gone), request)
    except Refused as refused:
        assert refused.free < refused.want
        if " under " in refused.why:
            check_part(inventory, held, gone, request, refused)


def check_part(inventory: Inventory, held: list[int], gone: list[str], request: Request, refused: Refused) -> None:
    def fits(other: Request) -> bool:
        return Oracle(inventory, held, gone, other).best() is not None

    parts = parts_of(request)
    (named,) = [one for one in parts if is_named(one, refused)]
    others = [one for one in parts if one != named]
    if any(fits(less(request, one, 0)) for one in parts):
        assert fits(less(request, named, 0))
        rest = request
    elif any(not fits(only(request, one, parts)) for one in parts):
        rest = only(request, named, parts)
        assert not fits(rest)
    else:
        subsets = (some for count in range(len(others) + 1) for some in itertools.combinations(others, count))
        without = [leaving_out(request, some) for some in subsets]
        assert any(not fits(one) and fits(less(one, named, 0)) for one in without)
        return
    assert refused.free == 0 or fits(less(rest, named, refused.free))
    step = 2 if opt.FULL_PCPUS in request.options else 1
    assert refused.unit == "bytes" or not any(
        fits(less(rest, named, more)) for more in range(refused.free + step, refused.want, step)
    )


Part = tuple[str, object]


def parts_of(request: Request) -> list[Part]:
    found: list[Part] = [("CPUs", None)] if request.cpus else []
    found += [("devices", kind) for kind in request.devices]
    found += [("pages", size) for size in request.hugepages]
    return found + ([("bytes", None)] if request.memory_bytes else [])


def is_named(part: Part, refused: Refused) -> bool:
    unit, name = part
    said = {"devices": f"kind {name} ", "pages": f"hugepages of {format_size(name)} " if unit == "pages" else ""}  # type: ignore[arg-type]
    return unit == refused.unit and said.get(unit, "") in refused.why


def less(request: Request, part: Part, count: int) -> Request:
    unit, name = part
    if unit == "CPUs":
        return replace(request, cpus=count, must_cpus=NO_CPUS)
    if unit == "devices":
        return replace(request, devices={one: n for one, n in {**request.devices, name: count}.items() if n})
    if unit == "pages":
        return replace(request, hugepages={one: n for one, n in {**request.hugepages, name: count}.items() if n})
    return replace(request, memory_bytes=count)


def leaving_out(request: Request, parts: tuple[Part, ...]) -> Request:
    for one in parts:
        request = less(request, one, 0)
    return request


def only(request: Request, part: Part, parts: list[Part]) -> Request:
    return leaving_out(request, tuple(one for one in parts if one != part))
