"""Work queues that can be made for claims, as devices: where they are offered, and where accelerators are let be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import DeviceResource, illness
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import HostError, Refused
from nodeagent.host.devices.accelerators.dsa import Dsa
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.resources.offer import offers, selectors
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.builders.pools import stamp
from tests.doubles.idxd_kernel import BUS, IdxdKernel, accelerator
from tests.support.claim_node import config_of

DSA, IAX = "0000:6a:01.0", "0000:6a:02.0"
GROUPS = [{"engines": 2, "sizes": [32, 16]}, {"sizes": [64]}]


def resource(**more: Any) -> dict[str, Any]:
    return {"name": "queue", "kind": "dsa", "serve": "dra", "queues": {"groups": GROUPS, **more}}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    made = DeviceTree(machine(tmp_path / "root", "1s1n4c"))
    accelerator(made, DSA, "dsa0")
    accelerator(made, IAX, "iax1", engines=8)
    return made


def look(tree: DeviceTree, *resources: dict[str, Any]) -> Inventory:
    config = config_of(*(resources or [resource()]))
    return scan(SysFs(tree.root), builtin_kinds(), selectors(config))


def slots(found: Inventory) -> dict[str, int]:
    return {one.id: int(one.attributes["size"]) for one in found.devices if one.kind == "dsa"}


def warned(found: Inventory) -> str:
    (said,) = [one for one in found.warnings if "queues" in one]
    return said


def test_every_queue_of_the_layout_is_a_device_with_the_limits_of_the_node(tree: DeviceTree) -> None:
    found = look(tree, resource(modes=["shared", "dedicated"], maxPriority=7))
    assert slots(found) == {f"{DSA}/wq-0": 32, f"{DSA}/wq-1": 16, f"{DSA}/wq-2": 64}
    one = found.device_by_id[f"{DSA}/wq-2"]
    assert (one.parent, one.paths, one.made_for_claims) == (DSA, (), True)
    assert dict(one.attributes) == {
        **{"name": "wq0.2", "accelerator": "dsa0", "device_type": "dsa", "selector": "queue", "made_for_claims": True},
        **{"size": 64, "group_id": 1, "mode": "shared", "modes": "shared,dedicated", "max_priority": 7},
        "block_on_fault": False,
    }
    assert illness(one, {}) is None, "it needs no node before it is made"


def test_each_accelerator_belongs_to_the_first_resource_that_matches_it(tree: DeviceTree) -> None:
    small = {"groups": [{"sizes": [8]}], "type": "iaa", "accelerators": ["0000:6a:*"]}
    found = look(tree, resource(accelerators=["0000:6a:02.0"]), {**resource(), "name": "iaa", "queues": small})
    assert slots(found) == {f"{IAX}/wq-0": 8}
    assert found.device_by_id[f"{IAX}/wq-0"].attributes["device_type"] == "iaa"


@pytest.mark.parametrize(
    ("file", "value", "why"),
    [
        ("configurable", 0, "configurable is not 1"),
        ("pasid_enabled", 0, r"pasid_enabled is not 1.*intel_iommu=on,sm_on"),
        ("max_work_queues", 2, "3 queues are configured, it has 2"),
        ("max_work_queues_size", 100, "112 entries are configured, it has 100"),
        ("max_engines", 2, "3 engines are configured, it has 2"),
    ],
)
def test_an_accelerator_that_cannot_be_divided_so_has_none_and_says_why(
    tree: DeviceTree, file: str, value: int, why: str
) -> None:
    (tree.root / BUS / "dsa0" / file).write_text(f"{value}\n")
    found = look(tree)
    assert slots(found) == {}
    assert warned(found).startswith(f"cannot make queues of dsa0 ({DSA}): ")
    assert re.search(why, warned(found))


def test_what_others_have_configured_is_served_as_it_is_and_nothing_is_made_beside_it(tree: DeviceTree) -> None:
    kernel = IdxdKernel(tree.root)
    kernel.admin("engine0.0", group_id=0)
    kernel.admin("wq0.4", size=8, group_id=0, type="user", mode="dedicated", name="app", driver_name="user")
    found = look(tree)
    assert slots(found) == {f"{DSA}/wq-4": 8} and not found.device_by_id[f"{DSA}/wq-4"].made_for_claims
    assert "wq0.4 is configured by another program, to which the accelerator is left" in warned(found)


def test_the_queue_that_the_kernel_gives_to_iaa_crypto_is_anothers(tree: DeviceTree) -> None:
    """Linux 6.8 and later configure a queue of each IAA by themselves (drivers/dma/idxd/defaults.c)."""
    for file, value in {"type": "kernel", "name": "iaa_crypto", "size": 128, "group_id": 0}.items():
        (tree.root / BUS / "wq1.0" / file).write_text(f"{value}\n")
    found = look(tree, resource(type="iaa"))
    assert slots(found) == {} and "wq1.0 is configured by another program" in warned(found)


def test_an_enabled_queue_of_the_agents_is_no_device_besides_its_slot(tree: DeviceTree) -> None:
    """Whatever is configured by now: it belongs to a claim, and the accelerator stays laid out as it is."""
    kernel = IdxdKernel(tree.root)
    kernel.admin("engine0.0", group_id=0)
    for number, size in enumerate((16, 8)):
        kernel.admin(f"wq0.{number}", size=size, group_id=0, mode="dedicated", driver_name="user")
    kernel.bind("idxd", "dsa0")
    kernel.admin("wq0.1", name="nodeagent-uid")
    kernel.bind("user", "wq0.1")
    assert slots(look(tree)) == {f"{DSA}/wq-0": 16, f"{DSA}/wq-1": 8}
    assert slots(look(tree, {"name": "dsa", "kind": "dsa", "serve": "dra"})) == {}


def test_slots_are_for_the_resource_that_makes_them_and_for_no_container_of_the_device_plugin(tree: DeviceTree) -> None:
    found = look(tree)
    config: Config = config_of(resource(), {"name": "plain", "kind": "dsa"})
    mine, plain = offers(config, builtin_kinds())
    assert isinstance(mine.resource, DeviceResource) and isinstance(plain.resource, DeviceResource)
    assert len(mine.resource.devices(found)) == 3 and plain.resource.devices(found) == []
    named = DeviceResource(name="d/named", kind="dsa", match={"made_for_claims": "true"})
    decision = allocate(found, Ledger(), named, [[f"{DSA}/wq-0"]], stamp())
    with pytest.raises(HostError, match=r"cannot hand over 0000:6a:01.0/wq-0: it is made for claims alone"):
        plain.edits(found, decision.grants[0])


def test_a_slot_and_the_whole_accelerator_are_never_held_together(tree: DeviceTree) -> None:
    found = look(tree)
    whole = DeviceResource(name="d/accel", kind="accel")
    named = DeviceResource(name="d/named", kind="dsa", match={"made_for_claims": "true"})
    ledger = allocate(found, Ledger(), whole, [[DSA]], stamp()).ledger
    with pytest.raises(Refused, match=DSA):
        allocate(found, ledger, named, [[f"{DSA}/wq-0"]], stamp())


@pytest.mark.parametrize(("state", "seen"), [("disabled", HEALTHY), ("enabled", HEALTHY), ("halted", UNHEALTHY)])
def test_a_slot_is_as_well_as_its_accelerator_can_be(tree: DeviceTree, state: str, seen: str) -> None:
    found = look(tree).device_by_id[f"{DSA}/wq-0"]
    (tree.root / BUS / "dsa0/state").write_text(f"{state}\n")
    kind = Dsa()
    kind._sysfs = SysFs(tree.root)
    assert kind.health(found).state == seen
