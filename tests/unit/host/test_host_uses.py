"""A use by the node counts for all that cannot be given away without what is used, whatever the kinds."""

from __future__ import annotations

import itertools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices.all_kinds import CharSelector, Devices, UsbSelector, read_context
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.uses.used_paths import with_all_uses
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


def routed(tree: DeviceTree, interface: str) -> None:
    tree.write("proc/1/net/route", f"Iface Destination\n{interface} 00000000 0100000A 0003 0 0 0 00000000 0 0 0")


def adapter(tree: DeviceTree) -> None:
    """What is plugged in at port 1-1.4 is an adapter of another vendor than the hub, with the default route."""
    (tree.root / "sys/bus/usb/devices/1-1.4/idVendor").write_text("0bda\n")
    tree.net(CONTROLLER, "enx1", below="usb1/1-1/1-1.4/1-1.4:1.0")
    routed(tree, "enx1")


@pytest.mark.parametrize(
    ("vendors", "served"),
    [(("1d6b", "0bda"), {"usb-1-1.2"}), (("1d6b",), {"usb-1-1.2"}), (("0bda",), set()), ((), set())],
)
def test_what_leads_to_a_usb_adapter_with_the_default_route_is_not_offered(
    tree: DeviceTree, vendors: tuple[str, ...], served: set[str]
) -> None:
    """Whichever of hub and adapter are selected: the hub's holder can reset it, and the controller's all of it."""
    adapter(tree)
    found = look(tree, usb=tuple(UsbSelector(name=one, vendor=one) for one in vendors))
    assert offered(found) == served
    assert by_id(found)[CONTROLLER].attributes["default_route"] is True
    if "0bda" in vendors:
        assert by_id(found)["usb-1-1.4"].attributes["netdevs"] == "enx1"


def test_what_leads_to_a_console_is_in_use(tree: DeviceTree) -> None:
    """A serial port of a USB device, and the function of a management controller; nothing leads to a screen."""
    port = tree.root / "sys/bus/usb/devices/1-1.4"
    tree.member("tty", "ttyUSB0", port.resolve() / "1-1.4:1.0/ttyUSB0/tty/ttyUSB0", {"dev": "188:0"})
    management = tree.pci("0000:00:16.3", pci_class="070002")
    tree.member("tty", "ttyS4", management / "tty/ttyS4", {"dev": "4:68"})
    tree.member("tty", "tty0", tree.root / "sys/devices/virtual/tty/tty0", {"dev": "4:0"})
    char = (CharSelector(name="serial", globs=("/dev/tty*",)),)
    for name in ("tty0", "ttyS4", "ttyUSB0"):
        tree.node(f"/dev/{name}")
    usb_devices, functions = {"usb-1-1", "usb-1-1.2", "usb-1-1.4"}, {CONTROLLER, "0000:00:16.3"}

    def served() -> set[str]:
        """What is served with USB devices selected, and their ports without."""
        return offered(usb(tree)) | offered(look(tree, char=char))

    tree.write("sys/class/tty/console/active", "tty0")
    assert served() == usb_devices | functions | {"/dev/tty0", "/dev/ttyS4", "/dev/ttyUSB0"}
    tree.write("sys/class/tty/console/active", "tty0 ttyS4")
    assert served() == usb_devices | {CONTROLLER, "/dev/tty0", "/dev/ttyUSB0"}
    tree.write("sys/class/tty/console/active", "ttyUSB0 tty0")
    assert served() == {"usb-1-1.2", "0000:00:16.3", "/dev/tty0", "/dev/ttyS4"}


def node(tree: DeviceTree, path: str, folder: Path, major: int, minor: int) -> None:
    """A character device with its folder in sysfs."""
    tree.link(f"sys/dev/char/{major}:{minor}", folder)
    at = tree.root / path
    at.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mknod(at, stat.S_IFCHR | 0o600, os.makedev(major, minor))
    except PermissionError as error:
        pytest.skip(f"cannot make a device node here: {error}")


def ports(tree: DeviceTree) -> Devices:
    globs = ("/dev/tty*", "/dev/cdc-wdm*", "/dev/wwan*", "/dev/ptp*", "/dev/bus/usb/*/*")
    return look(tree, char=(CharSelector(name="ports", globs=globs),))


def serial(tree: DeviceTree, port: str, *numbers: int) -> set[str]:
    """Serial lines of the USB device at a port."""
    for one in numbers:
        name = f"ttyUSB{one}"
        folder = (tree.root / f"sys/bus/usb/devices/{port}").resolve() / f"{port}:1.{one}/{name}/tty/{name}"
        node(tree, f"dev/{name}", tree.member("tty", name, folder, {"dev": f"188:{one}"}), 188, one)
    return {f"/dev/ttyUSB{one}" for one in numbers}


@pytest.mark.parametrize("use", ["default route", "storage"])
def test_the_ports_of_a_modem_that_carries_the_node_s_network_are_in_use(tree: DeviceTree, use: str) -> None:
    """Who has one can end its connection. The ports of its neighbour, and all of them while it carries nothing, are
    served."""
    device = (tree.root / "sys/bus/usb/devices/1-1.4").resolve()
    mine, others = serial(tree, "1-1.4", 0, 2), serial(tree, "1-1.2", 5)
    node(tree, "dev/cdc-wdm0", tree.member("usbmisc", "cdc-wdm0", device / "1-1.4:1.8/usbmisc/cdc-wdm0", {}), 180, 0)
    for number, port in enumerate(("1-1", "1-1.2", "1-1.4"), start=1):
        folder = (tree.root / f"sys/bus/usb/devices/{port}").resolve()
        node(tree, f"dev/bus/usb/001/00{number}", folder, 189, number)
    tree.net(CONTROLLER, "wwan0", below="usb1/1-1/1-1.4/1-1.4:1.8")
    mine |= {"/dev/cdc-wdm0", "/dev/bus/usb/001/003", "/dev/bus/usb/001/001"}
    others |= {"/dev/bus/usb/001/002"}
    assert offered(ports(tree)) == mine | others | {CONTROLLER}
    if use == "default route":
        routed(tree, "wwan0")
    else:
        tree.write("proc/1/net/route", "Iface Destination\nwwan0 0000000A 00000000 0003 0 0 0 000000FF 0 0 0")
        tree.write("proc/1/mountinfo", "22 1 0:40 / /m rw - nfs4 10.0.0.9:/ rw,addr=10.0.0.9")
    found = ports(tree)
    assert offered(found) == others
    assert by_id(found)["/dev/ttyUSB2"].attributes["port_of"] == "1-1.4"


def test_a_console_on_one_line_of_an_adapter_leaves_its_other_lines(tree: DeviceTree) -> None:
    """Its raw node is the whole adapter."""
    lines = serial(tree, "1-1.4", 0, 1)
    node(tree, "dev/bus/usb/001/003", (tree.root / "sys/bus/usb/devices/1-1.4").resolve(), 189, 3)
    assert offered(ports(tree)) == lines | {"/dev/bus/usb/001/003", CONTROLLER}
    tree.write("sys/class/tty/console/active", "ttyUSB0")
    assert offered(ports(tree)) == {"/dev/ttyUSB1"}


def test_of_a_pci_function_with_the_default_route_the_ports_of_a_modem_alone_are_in_use(tree: DeviceTree) -> None:
    """The clock of an adapter is what a pod keeps time with."""
    for number, address in enumerate(("0000:3b:00.0", "0000:3c:00.0")):
        function = tree.pci(address, pci_class="0d4000" if number else "020000")
        interface = ("eth0", "wwan0")[number]
        tree.net(address, interface, below=("", "wwan/wwan0")[number])
        node(
            tree, f"dev/ptp{number}", tree.member("ptp", f"ptp{number}", function / f"ptp/ptp{number}", {}), 248, number
        )
    port = tree.member("wwan", "wwan0at0", tree.folders["0000:3c:00.0"] / "wwan/wwan0/wwan0at0", {})
    node(tree, "dev/wwan0at0", port, 235, 0)
    every = {"/dev/ptp0", "/dev/ptp1", "/dev/wwan0at0"}
    assert {one for one in offered(ports(tree)) if one.startswith("/dev")} == every
    routed(tree, "eth0")
    assert {one for one in offered(ports(tree)) if one.startswith("/dev")} == every
    routed(tree, "wwan0")
    assert {one for one in offered(ports(tree)) if one.startswith("/dev")} == {"/dev/ptp0", "/dev/ptp1"}


def test_what_leads_to_a_mounted_disc_is_in_use_although_no_kind_has_it(tree: DeviceTree) -> None:
    tree.pci("0000:00:17.0", pci_class="010601", driver="ahci")
    tree.disk("0000:00:17.0", "sr0", "ata2", 1 << 30, dev="11:0")
    assert offered(look(tree)) == {CONTROLLER, "0000:00:17.0"}
    tree.write("proc/1/mountinfo", "22 1 11:0 / /media ro - iso9660 /dev/sr0 ro")
    assert offered(look(tree)) == {CONTROLLER}


def test_a_controller_that_other_controllers_are_behind_is_in_use_with_their_disks(tree: DeviceTree) -> None:
    """VMD: without its driver there is no drive, also where the drive's disk is not below its function (multipath)."""
    vmd = tree.pci("0000:00:0e.5", pci_class="010400", driver="vmd")
    tree.folders["port"] = vmd / "pci10000:e0"
    tree.pci("10000:e1:00.0", under="port", pci_class="010802", driver="nvme")
    tree.nvme("10000:e1:00.0", 0, {1: 1 << 40}, multipath=True)
    assert offered(look(tree)) == {CONTROLLER, "0000:00:0e.5", "10000:e1:00.0"}
    tree.write("proc/1/mountinfo", "22 1 259:1 / / rw - ext4 /dev/nvme0n1 rw")
    assert offered(look(tree)) == {CONTROLLER}


def test_a_scan_resolves_no_more_entries_for_interfaces_that_carry_nothing(tree: DeviceTree) -> None:
    """Only what is in use is followed: a node of many pods has hundreds of interfaces."""

    class Counting(SysFs):
        entries = 0

        def entry(self, folder: str, name: str) -> str:
            Counting.entries += 1
            return super().entry(folder, name)

    def count() -> int:
        Counting.entries = 0
        read_context(Counting(tree.root))
        return Counting.entries

    adapter(tree)
    before = count()
    for number in range(10):
        tree.member("net", f"veth{number}", tree.root / f"sys/devices/virtual/net/veth{number}", {})
    assert count() - before == 10


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


# ---------------------------------------------------------------- any tree


class Place(NamedTuple):
    """Something in a tree: what it is plugged into, its device if a kind may find it, and what can be used of it."""

    above: Place | None
    id: str = ""
    uses: tuple[tuple[str, str], ...] = ()
    """File below the root and what to write there for each way to use it."""

    @property
    def leads_to_it(self) -> set[str]:
        return {self.id, *(self.above.leads_to_it if self.above is not None else ())}


ROUTE = "Iface Destination\n{} 00000000 0100000A 0003 0 0 0 00000000 0 0 0"
DISK = (
    ("proc/1/mountinfo", "22 1 {1} / / rw - ext4 /dev/{0} rw"),
    ("proc/swaps", "Filename Type Size Used Priority\n/dev/{0} partition 8 0 -2"),
)


class Trees:
    """Random controllers, some behind another, with hubs and what is plugged into them."""

    def __init__(self, draw: Callable[..., Any], root: Path) -> None:
        self.draw, self.tree = draw, DeviceTree(root)
        self.leaves: list[Place] = []
        self.numbers = itertools.count(1)
        for number in range(draw(some.integers(1, 3))):
            self.controller(number)

    def controller(self, number: int) -> None:
        address, above = f"0000:00:1{number}.0", None
        if self.draw(some.booleans()):
            above = Place(None, f"0000:00:0{number}.0")
            vmd = self.tree.pci(above.id, pci_class="010400")
            address = f"1000{number}:e1:00.0"
            self.tree.folders["behind"] = vmd / f"pci1000{number}:e0"
            self.tree.pci(address, under="behind", pci_class="0c0330")
        else:
            self.tree.pci(address, pci_class="0c0330")
        here = Place(above, address)
        if self.draw(some.booleans()):
            self.leaf(address, f"ata{number}", here)
        for port in range(self.draw(some.integers(0, 2))):
            self.plugged(address, here, f"{number + 1}-{port + 1}")

    def plugged(self, address: str, above: Place, port: str) -> None:
        vendor = self.draw(some.sampled_from(["1d6b", "0bda"]))
        folder = self.tree.usb(address, port, vendor=vendor, product="0001", devnum=next(self.numbers))
        here = Place(above, f"usb-{port}")
        below = str(folder.relative_to(self.tree.folders[address]))
        ports = self.draw(some.integers(0, 2)) if port.count(".") < 2 else 0
        for number in range(ports):
            self.plugged(address, here, f"{port}.{number + 1}")
        if not ports and self.draw(some.booleans()):
            self.leaf(address, f"{below}/{port}:1.0", here)

    def leaf(self, address: str, below: str, above: Place) -> None:
        number = next(self.numbers)
        kind = self.draw(some.sampled_from(["net", "disk", "disc", "console"]))
        name = {"net": "eth{}", "disk": "sd{}", "disc": "sr{}", "console": "ttyS{}"}[kind].format(number)
        if kind == "net":
            self.tree.net(address, name, below=below)
            self.leaves.append(Place(above, uses=(("proc/1/net/route", ROUTE.format(name)),)))
        elif kind == "console":
            self.tree.member("tty", name, self.tree.folders[address] / below / "tty" / name, {"dev": f"4:{number}"})
            self.leaves.append(Place(above, uses=(("sys/class/tty/console/active", name),)))
        else:
            self.tree.disk(address, name, f"{below}/host{number}", 1 << 30, dev=f"8:{number}")
            id = f"block-{address}-{name}" if kind == "disk" else ""
            uses = tuple((file, text.format(name, f"8:{number}")) for file, text in DISK)
            self.leaves.append(Place(above, id, uses))


@given(some.data())
@settings(deadline=None, max_examples=40)
def test_all_that_leads_to_a_use_is_in_use_and_nothing_else(data: some.DataObject) -> None:
    """Of a random tree with one use, whatever is selected: against the way from what is used up to the CPU."""
    with tempfile.TemporaryDirectory() as root:
        trees = Trees(data.draw, Path(root))
        vendors = data.draw(some.lists(some.sampled_from(["1d6b", "0bda"]), unique=True))
        selected = tuple(UsbSelector(name=one, vendor=one) for one in vendors)
        every = offered(look(trees.tree, usb=selected))
        assert every >= {one for leaf in trees.leaves for one in leaf.leads_to_it if one.startswith(("0", "1"))}
        if trees.leaves:
            used = data.draw(some.sampled_from(trees.leaves))
            trees.tree.write(*data.draw(some.sampled_from(used.uses)))
            assert offered(look(trees.tree, usb=selected)) == every - used.leads_to_it


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
