"""Parts that are made on demand, as DRA publishes them: counters, order, few bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.device_pool import DevicePool, label
from nodeagent.core.dra.pool import HELD_TAINT, Features, PoolDevice
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices.all_kinds import PartitionSelector
from nodeagent.kube.resourceslice.render import Owner, render
from tests.builders.devices import DeviceTree
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import pool_of, shown, wrong_with
from tests.support.looking import look
from tests.support.mig_driver import MigDriver, address, snapshot_of, uuid

MIG = DevicePool(kind="gpu", resources=(DeviceResource(name="r/mig", kind="gpu", partitions=True),))
MOST_BYTES = 100 << 10


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path / "root")


def machine(tree: DeviceTree, *cards: str) -> Inventory:
    MigDriver.of(tree.root.parent / "state", *cards).machine(tree)
    found = look(tree, nvml=snapshot_of(*cards), partitions=PartitionSelector())
    return inventory_of(even_rows(1, 1, 1, 2, 1), devices=found.devices)


def test_a_part_says_its_profile_its_gpu_and_what_it_takes_of_it(tree: DeviceTree) -> None:
    pool = pool_of(MIG, machine(tree, "h100-80"))
    one = shown(pool)["0000-1b-00-0-mig-1g-10gb-me-6"]
    own = {name: value for name, value in one.attributes.items() if not name.startswith("resource.kubernetes.io/")}
    assert own == {
        "kind": "gpu",
        "resource": "mig",
        "parent": address(0),
        "parentUUID": uuid(0),
        "migProfile": "1g.10gb+me",
        "multiprocessors": 16,
    }
    assert one.capacity["memory"].value == 9984 << 20
    assert one.consumes == {"mig-1b": {"m6": 1, "ofa-engines": 1}}
    (counters,) = pool.counters
    assert counters.name == "mig-1b"
    assert counters.counters == {**{f"m{n}": 1 for n in range(8)}, "ofa-engines": 1}


def test_the_pool_keeps_the_rules_of_the_api_in_every_form(tree: DeviceTree) -> None:
    """And each device is found by its name."""
    assert wrong_with(MIG, machine(tree, "a100-80", "h100-80", "a30")) == []


def test_where_the_server_keeps_no_counters_nothing_is_offered_that_excludes_other_parts(tree: DeviceTree) -> None:
    assert shown(pool_of(MIG, machine(tree, "h100-80"), features=Features(counters=False))) == {}


def test_small_parts_come_first_and_one_gpu_is_filled_before_the_next(tree: DeviceTree) -> None:
    names = [one.name for one in pool_of(MIG, machine(tree, "h100-80", "h100-80")).devices]
    small = [name for name in names if "-1g-10gb-" in name and "-me-" not in name]
    assert small[:2] == ["0000-1b-00-0-mig-1g-10gb-6", "0000-1b-00-0-mig-1g-10gb-5"]
    assert [name[:12] for name in small] == ["0000-1b-00-0"] * 7 + ["0000-3b-00-0"] * 7
    assert names[:14] == small
    assert names[-2:] == ["0000-1b-00-0-mig-7g-80gb-0", "0000-3b-00-0-mig-7g-80gb-0"]


def first_fit(devices: list[PoolDevice], *wants: str) -> list[str]:
    """What a scheduler allocates that takes the first device that fits, one claim after the other; "" for none."""
    used: dict[tuple[str, str], int] = {}
    supply = {"m": 1, "ofa-engines": 1, "jpeg-engines": 1, "decoders": 5}
    found = []
    for profile in wants:
        for one in devices:
            needs = {(name, counter): n for name, all_of in one.consumes.items() for counter, n in all_of.items()}
            limits = {key: supply.get(key[1], supply["m"]) for key in needs}
            fits = all(used.get(key, 0) + n <= limits[key] for key, n in needs.items())
            if one.attributes["migProfile"] == profile and fits:
                used |= {key: used.get(key, 0) + n for key, n in needs.items()}
                found.append(one.name)
                break
        else:
            found.append("")
    return found


@pytest.mark.parametrize(
    "wants",
    [
        ["1g.10gb"] * 7,
        ["4g.40gb", "3g.40gb"],
        ["3g.40gb", "4g.40gb"],
        ["1g.10gb", "2g.20gb", "4g.40gb"],
        ["4g.40gb", "2g.20gb", "1g.10gb"],
        ["3g.40gb", "3g.40gb"],
        ["1g.20gb"] * 4,
        ["2g.20gb", "2g.20gb", "2g.20gb", "1g.10gb+me"],
    ],
)
def test_one_gpu_takes_what_fits_into_it_in_any_of_these_orders(tree: DeviceTree, wants: list[str]) -> None:
    devices = list(pool_of(MIG, machine(tree, "h100-80")).devices)
    assert all(first_fit(devices, *wants))


def test_what_the_geometry_cannot_hold_is_not_allocated(tree: DeviceTree) -> None:
    devices = list(pool_of(MIG, machine(tree, "h100-80")).devices)
    assert first_fit(devices, "3g.40gb", "3g.40gb", "1g.10gb")[2] == ""
    assert first_fit(devices, *["1g.10gb+me"] * 2)[1] == ""
    assert first_fit(devices, *["1g.10gb"] * 8)[7] == ""


def test_parts_that_overlap_what_the_device_plugin_gave_are_tainted(tree: DeviceTree) -> None:
    inventory = machine(tree, "h100-80")
    id = f"{address(0)}/mig-3g.40gb-4"
    holder = Holder(api=DEVICE_PLUGIN, resource="r/mig", namespace="n", pod="p", container="c")
    held = Grant(id="g", holder=holder, ids=(id,), devices=(id,), things=things_of(inventory, [id]))
    pool = pool_of(MIG, inventory, grant(Ledger(), held))
    tainted = {one.name for one in pool.devices if HELD_TAINT in [taint.key for taint in one.taints]}
    assert label(f"{address(0)}/mig-1g.10gb-6") in tainted
    assert label(f"{address(0)}/mig-7g.80gb-0") in tainted
    assert label(f"{address(0)}/mig-4g.40gb-0") not in tainted


def test_eight_gpus_with_all_placements_are_few_bytes(tree: DeviceTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, as JSON and as it is on the wire when compressed."""
    pool = pool_of(MIG, machine(tree, *["h100-80"] * 8))
    owner = Owner(driver="nodeagent.dev", node_name="node-a", node_uid="8f2d2c1e-0000-4000-8000-000000000001")
    slices = [json.dumps(one, separators=(",", ":")).encode() for one in render(pool, owner, 1)]
    plain, packed = sum(map(len, slices)), sum(len(gzip.compress(one)) for one in slices)
    with capsys.disabled():
        print(f"\nslices: {len(pool.devices)} parts of 8 GPUs: {plain} bytes of JSON, {packed} compressed")
    assert len(pool.devices) == 200
    assert plain <= MOST_BYTES


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("0000:41:00.0/mig-1g.10gb-4", "0000-41-00-0-mig-1g-10gb-4"),
        ("0000:41:00.0/mig-1g.10gb+me-4", "0000-41-00-0-mig-1g-10gb-me-4"),
    ],
)
def test_a_part_is_named_after_its_place(id: str, name: str) -> None:
    assert label(id) == name


@pytest.mark.parametrize("end", ["mig-1g-10gb-4", "mig-1g.10gb-me-4", "mig-1g.10gb+me.all-4", "mig-1g-10gb-me-4"])
def test_ids_that_would_be_named_alike_have_a_digest(end: str) -> None:
    assert label(f"0000:41:00.0/{end}") not in ("0000-41-00-0-mig-1g-10gb-4", "0000-41-00-0-mig-1g-10gb-me-4")
