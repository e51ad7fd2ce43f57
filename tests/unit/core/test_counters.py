"""Counters that devices draw on: what is left, over both APIs, in what is published, and in refusals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.pool import Features
from nodeagent.core.dra.prepare import Catalog, prepare
from nodeagent.core.ledger.counters import drawn, spent
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import inventory_json
from nodeagent.core.model.device import Device, Draws
from nodeagent.core.model.inventory import Inventory, KindState
from nodeagent.errors import Refused
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.base import Context, Found
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import DRIVER, NOBODY, NODE, claim, device, pool_of, result, shown, stamp, wrong_with

SLICES = DeviceResource(name="d/slice", kind="slice")
KIND = DevicePool(kind="slice", resources=(SLICES,))
CATALOG = Catalog(driver=DRIVER, node_name=NODE, kinds={"slice": KIND})


def slices(*sizes: int, of: str = "card", cores: int = 4) -> list[Device]:
    """Slices s0, s1, … of a card, by how many cores each takes."""
    return [
        device(f"{of}-s{n}", "slice", draws=Draws(of=of, takes={"cores": size}, has={"cores": cores}))
        for n, size in enumerate(sizes)
    ]


def machine_of(devices: Sequence[Device]) -> Inventory:
    return inventory_of(even_rows(1, 1, 1, 2, 1), devices=devices)


def test_what_is_held_leaves_the_rest_and_what_does_not_fit_is_spent() -> None:
    machine = machine_of(slices(1, 2, 3, 4))
    held = allocate(machine, NOBODY, SLICES, [["card-s1"]], stamp()).ledger
    assert drawn(machine, held.grants.values()) == {("card", "cores"): 2}
    assert spent(machine, held) == {"card-s2", "card-s3"}
    healthy = {one.id: one.healthy for one in SLICES.advertised(machine, held, {})}
    assert healthy == {"card-s0": True, "card-s1": True, "card-s2": False, "card-s3": False}


def test_a_refusal_has_the_numbers_and_the_holder_under_both_apis() -> None:
    machine = machine_of(slices(1, 2, 3))
    held = prepare(machine, NOBODY, CATALOG, [claim("a", result("slice", "card-s1"))], stamp()).ledger
    why = "3 cores of card are needed, 2 are left, others are held by claim ns/a"
    with pytest.raises(Refused, match=why):
        allocate(machine, held, SLICES, [["card-s2"]], stamp())
    batch = prepare(machine, held, CATALOG, [claim("b", result("slice", "card-s2"))], stamp())
    assert why in batch.errors["uid-b"]


def test_two_slices_of_one_request_draw_together() -> None:
    machine = machine_of(slices(2, 3))
    with pytest.raises(Refused, match="5 cores of card are needed, 4 are left"):
        allocate(machine, NOBODY, SLICES, [["card-s0", "card-s1"]], stamp())


def test_cards_have_counters_of_their_own() -> None:
    machine = machine_of([*slices(4), *slices(4, of="other")])
    held = allocate(machine, NOBODY, SLICES, [["card-s0"]], stamp()).ledger
    assert spent(machine, held) == frozenset()


def test_the_pool_has_the_counters_without_what_the_device_plugin_gave() -> None:
    machine = machine_of(slices(1, 2, 3))
    pool = pool_of(KIND, machine)
    (one,) = pool.counters
    assert one.counters == {"cores": 4}
    assert shown(pool)["card-s1"].consumes == {one.name: {"cores": 2}}
    held = allocate(machine, NOBODY, SLICES, [["card-s0"]], stamp()).ledger
    assert [it.counters for it in pool_of(KIND, machine, held).counters] == [{"cores": 3}]
    by_claim = prepare(machine, NOBODY, CATALOG, [claim("a", result("slice", "card-s1"))], stamp()).ledger
    assert pool_of(KIND, machine, by_claim).counters == pool.counters, "the scheduler counts claims itself"
    assert wrong_with(KIND, machine, held) == []


def test_a_server_without_counters_is_shown_none_of_them() -> None:
    machine = machine_of([*slices(1, 2), device("whole", "slice")])
    pool = pool_of(KIND, machine, features=Features(counters=False))
    assert list(shown(pool)) == ["whole"]


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), drawn_ids=st.data())
def test_whatever_is_granted_in_whatever_order_the_counters_last(sizes: list[int], drawn_ids: Any) -> None:
    """Over both APIs; and what is not granted would not have fitted."""
    machine, ledger = machine_of(slices(*sizes)), Ledger()
    order = drawn_ids.draw(st.permutations(range(len(sizes))))
    apis = drawn_ids.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    at = itertools.count()
    for n, by_claim in zip(order, apis, strict=True):
        held = sum(drawn(machine, ledger.grants.values()).values())
        is_spent = f"card-s{n}" in spent(machine, ledger)
        if by_claim:
            batch = prepare(machine, ledger, CATALOG, [claim(f"c{n}", result("slice", f"card-s{n}"))], stamp())
            granted, ledger = bool(batch.grants), batch.ledger
        else:
            try:
                ledger = allocate(machine, ledger, SLICES, [[f"card-s{n}"]], stamp(next(at))).ledger
                granted = True
            except Refused:
                granted = False
        assert granted == (held + sizes[n] <= 4) == (not is_spent)


def test_the_inventory_keeps_them_as_json() -> None:
    machine = machine_of(slices(2))

    text = msgspec.json.encode(inventory_json.to_document(machine))
    assert inventory_json.from_document(text, source="t").devices[0].draws == machine.devices[0].draws


@pytest.mark.parametrize(
    ("draws", "why"),
    [
        (Draws(of="c", takes={"cores": 5}, has={"cores": 4}), "takes 5 cores of 4"),
        (Draws(of="c", takes={"lanes": 1}, has={"cores": 4}), "takes 1 lanes of no"),
        (Draws(of="c", takes={"Cores": 1}, has={"Cores": 4}), "has a counter 'Cores'"),
        (Draws(of="", takes={"cores": 1}, has={"cores": 4}), "draws on no counters"),
        (Draws(of="c", takes={"cores": "1"}, has={"cores": 4}), "Expected `int`"),  # type: ignore[dict-item]
        (Draws(of="card", takes={"cores": 1}, has={"cores": 3}), "another device says otherwise"),
    ],
)
def test_counters_that_cannot_be_degrade_their_kind_alone(draws: Draws, why: str) -> None:
    class Slices:
        name = "slice"

        def discover(self, sysfs: SysFs, context: Context) -> Found:
            devices = (*slices(1), replace(slices(2)[0], id="bad", draws=draws))
            return Found(state=KindState(kind="slice", state="present"), devices=devices)

        def edits(self, device: Device, devices: Any) -> Any: ...

    found = all_kinds.discover(SysFs("/nowhere"), [Slices()], Context())
    (state,) = found.kinds
    assert (found.devices, state.state) == ((), "degraded")
    assert why in state.reason
