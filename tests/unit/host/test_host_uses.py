"""A use by the node counts for all that cannot be given away without what is used, whatever the kinds."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices.all_kinds import CharSelector, Devices, UsbSelector
from nodeagent.host.host_uses import with_all_uses
from tests.builders.devices import DeviceTree
from tests.support.looking import by_id, look

CONTROLLER = "0000:00:14.0"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """A USB controller with a hub at port 1-1, and two devices behind it."""
    tree = DeviceTree(tmp_path)
    tree.pci(CONTROLLER, pci_class="0c0330")
    for number, port in enumerate(("1-1", "1-1.2", "1-1.4"), start=1):
        tree.usb(CONTROLLER, port, vendor="1d6b", product="0002", devnum=number)
    return tree


def usb(tree: DeviceTree) -> Devices:
    return look(tree, usb=(UsbSelector(name="usb", vendor="1d6b"),))


def stick(tree: DeviceTree) -> None:
    """What is plugged in at port 1-1.4 becomes a disk."""
    tree.disk(CONTROLLER, "sdb", "usb1/1-1/1-1.4/1-1.4:1.0/host0/target0:0:0/0:0:0:0", 1 << 30, dev="8:16")


def offered(found: Devices) -> set[str]:
    return {one.id for one in found.devices if DeviceResource(name="r/it", kind=one.kind).serves(one)}


def excluded(found: Devices, id: str) -> set[str]:
    return set(Inventory(devices=found.devices).excluded_by.get(id, ()))


def test_a_hub_excludes_what_is_plugged_into_it_and_no_device_its_neighbour(tree: DeviceTree) -> None:
    """Also without any driver: who has the hub can reset its ports."""
    found = usb(tree)
    assert excluded(found, "usb-1-1") == {"usb-1-1.2", "usb-1-1.4", CONTROLLER}
    assert excluded(found, "usb-1-1.2") == {"usb-1-1", CONTROLLER}
    assert by_id(found)["usb-1-1"].paths == ("/dev/bus/usb/001/001",)


def test_a_usb_stick_and_its_disk_are_one_thing(tree: DeviceTree) -> None:
    stick(tree)
    found = usb(tree)
    disk = "block-0000:00:14.0-sdb"
    assert excluded(found, disk) == {"usb-1-1", "usb-1-1.4", CONTROLLER}
    assert offered(found) == {"usb-1-1", "usb-1-1.2", "usb-1-1.4", disk, CONTROLLER}


def test_what_leads_to_a_mounted_usb_stick_is_in_use(tree: DeviceTree) -> None:
    """The stick as a USB device, its hub and the controller, but not what is plugged in alongside it."""
    stick(tree)
    tree.write("proc/1/mountinfo", "22 1 8:16 / / rw - ext4 /dev/sdb rw")
    assert offered(usb(tree)) == {"usb-1-1.2"}


def test_a_usb_adapter_with_the_default_route_is_not_offered(tree: DeviceTree) -> None:
    tree.net(CONTROLLER, "enx1", below="usb1/1-1/1-1.4/1-1.4:1.0")
    tree.write("proc/1/net/route", "Iface Destination\nenx1 00000000 0100000A 0003 0 0 0 00000000 0 0 0")
    found = usb(tree)
    assert offered(found) == {"usb-1-1.2"}
    assert by_id(found)["usb-1-1.4"].attributes["netdevs"] == "enx1"


@pytest.mark.parametrize("use", [True, "unknown"])
def test_the_controller_of_a_disk_in_use_is_not_offered(tree: DeviceTree, use: object) -> None:
    """As a PCI function it could be bound to another driver."""
    tree.pci("0000:00:17.0", pci_class="010601", driver="ahci")
    tree.disk("0000:00:17.0", "sda", "ata1", 1 << 40, dev="8:0")
    mount = "22 1 8:0 / / rw - ext4 /dev/sda rw" if use is True else "22 1 0:40 / /tank rw - zfs tank rw"
    tree.write("proc/1/mountinfo", mount)
    found = look(tree)
    assert by_id(found)["0000:00:17.0"].attributes["in_use"] == use
    assert offered(found) == {CONTROLLER}


def test_the_boot_partitions_of_an_emmc_are_no_disks(tree: DeviceTree) -> None:
    """They are on the same medium, and the loader that starts the node may be on them; a mount of one is a use."""
    tree.pci("0000:00:1c.0", pci_class="080501")
    disk = tree.disk("0000:00:1c.0", "mmcblk0", "mmc_host/mmc0/mmc0:0001", 1 << 34, dev="179:0")
    tree.member("block", "mmcblk0boot0", disk / "mmcblk0boot0", {"size": 8192, "dev": "179:8"})
    (found,) = (one for one in look(tree).devices if one.kind == "block")
    assert (found.id, found.attributes["in_use"]) == ("block-0000:00:1c.0-mmcblk0", False)
    tree.write("proc/1/mountinfo", "22 1 179:8 / /boot rw - ext4 /dev/mmcblk0boot0 rw")
    assert by_id(look(tree))[found.id].attributes["in_use"] is True


@pytest.mark.parametrize("path", ["dev/sg0", "dev/bsg/0:0:0:0"])
def test_another_node_of_a_disk_is_the_disk(tree: DeviceTree, path: str) -> None:
    """A SCSI disk has three nodes; a program that writes to one of them writes to all."""
    disk = tree.disk(CONTROLLER, "sda", "host0/0:0:0:0", 1 << 30, dev="8:0")
    scsi = disk.parents[1]
    folder = scsi / path.split("/")[1] / path.rpartition("/")[2]
    tree.link(f"{folder.relative_to(tree.root)}/device", scsi)
    tree.link("sys/dev/char/21:0", folder)
    node = tree.root / path
    node.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(21, 0))
    except PermissionError as error:
        pytest.skip(f"cannot make a device node here: {error}")
    selected = (CharSelector(name="scsi", globs=("/dev/sg*", "/dev/bsg/*")),)
    found = look(tree, char=selected)
    assert excluded(found, f"/{path}") == {f"block-{CONTROLLER}-sda", CONTROLLER}
    assert f"/{path}" in offered(found)
    tree.write("proc/1/mountinfo", "22 1 8:0 / / rw - ext4 /dev/sda rw")
    assert f"/{path}" not in offered(look(tree, char=selected))


@pytest.mark.parametrize("name", ["zd0", "bcache0", "nullb0", "ublkb0", "rnbd0"])
def test_no_disk_is_made_in_software(tree: DeviceTree, name: str) -> None:
    tree.member("block", name, tree.root / f"sys/devices/virtual/block/{name}", {"size": 8, "dev": "252:0"})
    assert [one for one in look(tree).devices if one.kind == "block"] == []


# ---------------------------------------------------------------- any devices


@some.composite
def forests(draw: some.DrawFn) -> list[Device]:
    """Devices with parents before them, few things to share, and some uses."""
    found: list[Device] = []
    for number in range(draw(some.integers(1, 7))):
        parent = draw(some.none() | some.sampled_from(found)) if found else None
        uses = {
            name: draw(some.sampled_from([True, "unknown"])) for name in HOST_USES if draw(some.integers(0, 4)) == 0
        }
        things = tuple(draw(some.lists(some.sampled_from(["/dev/a", "/dev/b", "wwid:c"]), max_size=2, unique=True)))
        id = f"d{number}"
        found.append(Device(kind="k", id=id, parent=parent and parent.id, exclusive=things, attributes=uses))
    return found


@given(forests())
def test_a_use_counts_for_sharers_and_wholes_and_for_nothing_else(devices: list[Device]) -> None:
    """Against a search through every pair."""
    above = {one.id: one.parent for one in devices}

    def wholes(id: str) -> set[str]:
        parent = above[id]
        return set() if parent is None else {parent, *wholes(parent)}

    def concerns(used: Device, one: Device) -> bool:
        others = [one for one in devices if used.id not in wholes(one.id)]
        alike = {other.id for other in others if other is used or {*other.exclusive_parts} & {*used.exclusive_parts}}
        return one.id in alike or any(one.id in wholes(other) for other in alike)

    for name in HOST_USES:
        for before, after in zip(devices, with_all_uses(devices), strict=True):
            uses = [one.attributes[name] for one in devices if name in one.attributes and concerns(one, before)]
            assert after.attributes.get(name) == (True if True in uses else uses[0] if uses else None)
