"""NVMe namespaces, partitions and LVM volumes as devices: found where they are asked for, never held together with what
they are a part of, and withheld only for their own use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices.base import BLOCK_TYPES
from nodeagent.resources.offer import selectors
from tests.builders.devices import DeviceTree
from tests.builders.disk_parts import DISK, DRIVE, FIRST, HBA, SECOND, add_partition, disk_parts
from tests.builders.pools import pool_of, wrong_with
from tests.support.looking import by_id, edits, look, paths

EVERY = frozenset(BLOCK_TYPES)


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return disk_parts(tmp_path)


def found(tree: DeviceTree, types: frozenset[str] = EVERY) -> Mapping[str, Device]:
    return by_id(look(tree, block_types=types))


def volume_of(devices: Mapping[str, Device]) -> Device:
    (one,) = [device for device in devices.values() if device.attributes.get("type") == "volume"]
    return one


# ---------------------------------------------------------------- what is found


def test_nothing_is_looked_for_unless_it_is_asked_for(tree: DeviceTree) -> None:
    assert set(found(tree, frozenset())) == {DRIVE, HBA, DISK}
    assert set(found(tree, frozenset({"namespace"}))) == {DRIVE, HBA, DISK, FIRST, SECOND}


def test_a_namespace_says_what_it_is(tree: DeviceTree) -> None:
    one = found(tree)[FIRST]
    assert dict(one.attributes) == {
        "type": "namespace",
        "name": "nvme0n1",
        "controller": "nvme0",
        "nsid": 1,
        "eui64": "00 01",
        "wwid": "eui.1",
        "model": "Fast Drive 7",
        "serial": "S0000",
        "size_bytes": 1 << 40,
        "block_bytes": 4096,
        "in_use": False,
    }
    assert (one.kind, one.parent, one.numa_node, paths(edits(one))) == ("block", DRIVE, 1, ["/dev/nvme0n1"])


def test_a_partition_says_what_it_is(tree: DeviceTree) -> None:
    devices = found(tree)
    one = devices[f"{DISK}-part2"]
    assert dict(one.attributes) == {
        "type": "partition",
        "name": "sda2",
        "disk": "sda",
        "partition": 2,
        "partlabel": "scratch-a",
        "partuuid": "0001-02",
        "size_bytes": 20 * 512,
        "read_only": False,
        "in_use": True,  # by the volume
    }
    assert (one.parent, one.numa_node, one.bridges, paths(edits(one))) == (DISK, 0, (HBA,), ["/dev/sda2"])
    assert devices[f"{FIRST}-part1"].parent == FIRST


def test_a_volume_says_what_it_is_and_what_lvm_hides_is_none(tree: DeviceTree) -> None:
    one = volume_of(found(tree))
    told = {name: one.attributes[name] for name in ("name", "vg", "lv", "size_bytes")}
    assert told == {"name": "dm-3", "vg": "pods-x", "lv": "fast-1", "size_bytes": 2048 * 512}
    assert (one.parent, one.paths) == (DISK, ("/dev/dm-3",))


def test_a_volume_on_several_disks_is_a_part_of_none(tree: DeviceTree) -> None:
    tree.write("sys/devices/virtual/block/dm-3/slaves/nvme0n2/x", "")
    assert volume_of(found(tree)).parent is None


# ---------------------------------------------------------------- who can have what


def test_a_part_and_its_whole_exclude_each_other_and_parts_do_not(tree: DeviceTree) -> None:
    inventory = Inventory(devices=tuple(found(tree).values()))
    excluded = inventory.excluded_by
    assert {FIRST, SECOND, f"{FIRST}-part1"} <= set(excluded[DRIVE])
    assert DRIVE in excluded[SECOND] and SECOND not in excluded.get(FIRST, ())
    assert {f"{DISK}-part1", f"{DISK}-part2"} <= set(excluded[DISK])
    assert f"{DISK}-part2" not in excluded.get(f"{DISK}-part1", ())
    assert FIRST in excluded[f"{FIRST}-part1"] and SECOND not in excluded[f"{FIRST}-part1"]


@pytest.mark.parametrize(("used", "free"), [("8:1", f"{DISK}-part2"), ("259:1", SECOND)])
def test_what_uses_one_part_withholds_its_whole_and_no_other_part(tree: DeviceTree, used: str, free: str) -> None:
    tree.write("proc/1/mountinfo", f"30 1 {used} / /data rw - xfs /dev/it rw")
    for name in ("sda2", "dm-3"):  # otherwise the volume uses the partition
        (tree.root / f"sys/class/block/{name}").unlink()
    add_partition(tree, tree.root / "sys/class/block/sda", "sda3", 2)
    devices = found(tree)
    whole = devices[DISK if used == "8:1" else DRIVE]
    assert whole.attributes["in_use"] is True
    assert devices[free].attributes["in_use"] is False


def test_a_partition_with_a_volume_on_it_is_in_use_and_the_volume_is_not(tree: DeviceTree) -> None:
    devices = found(tree)
    assert volume_of(devices).attributes["in_use"] is False
    assert devices[f"{DISK}-part2"].attributes["in_use"] is True


def test_a_resource_gets_parts_only_if_it_names_their_type(tree: DeviceTree) -> None:
    volume = volume_of(found(tree))
    assert DeviceResource(name="r/x", kind="block", match={"type": "volume", "vg": "pods-x"}).serves(volume)
    assert not DeviceResource(name="r/x", kind="block").serves(volume)
    (tree.root / "sys/class/block/dm-3").unlink()  # otherwise it uses its partition
    inventory = Inventory(devices=tuple(found(tree).values()))

    def served(**match: str) -> set[str]:
        return {one.id for one in DeviceResource(name="r/x", kind="block", match=match).devices(inventory)}

    assert served() == {DISK}
    assert served(type="namespace") == {FIRST, SECOND}
    assert served(type="partition", partlabel="scratch-*") == {f"{DISK}-part2"}


def test_a_pool_of_disks_and_their_parts_keeps_every_rule_of_the_api(tree: DeviceTree) -> None:
    resources = ({"in_use": "*"}, {"in_use": "*", "type": "*"})
    served = tuple(DeviceResource(name="r/x", kind="block", match=match) for match in resources)
    inventory, kind = Inventory(devices=tuple(found(tree).values())), DevicePool(kind="block", resources=served)
    assert wrong_with(kind, inventory) == []
    assert len(pool_of(kind, inventory).devices) == 7


@pytest.mark.parametrize(
    ("resource", "types"),
    [
        ({"kind": "block"}, set()),
        ({"kind": "nvme", "match": {"type": "namespace"}}, set()),
        ({"kind": "block", "match": {"type": "partition"}}, {"partition"}),
        ({"kind": "block", "match": {"type": ["volume", "name*"]}}, {"volume", "namespace"}),
        ({"kind": "block", "match": {"type": "*"}}, set(BLOCK_TYPES)),
    ],
)
def test_the_configuration_says_what_is_looked_for(resource: dict[str, object], types: set[str]) -> None:
    config = msgspec.convert({"resources": [{"name": "x", **resource}]}, Config)
    assert selectors(config).block_types == types
