"""NVMe drives and other disks on synthetic trees, and which of them the node itself uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.devices import DeviceTree
from tests.support.looking import by_id, edits, kinds_of, look, paths


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


@pytest.mark.parametrize("multipath", [False, True])
def test_an_nvme_drive_is_one_device_with_its_namespaces(tree: DeviceTree, multipath: bool) -> None:
    """Also where the kernel has several paths to it in mind and keeps the disks elsewhere."""
    tree.pci("0000:5f:00.0", pci_class="010802", driver="nvme", numa_node=1)
    tree.nvme("0000:5f:00.0", 0, {1: 1 << 40, 2: 1 << 39}, multipath=multipath)
    found = look(tree)
    drive = by_id(found)["0000:5f:00.0"]
    assert drive.attributes == {
        "controller": "nvme0",
        "model": "Fast Drive 7",
        "serial": "S0000",
        "transport": "pcie",
        "state": "live",
        "namespaces": "nvme0n1,nvme0n2",
        "size_bytes": 3 << 39,
        "in_use": False,
    }
    assert paths(edits(drive)) == ["/dev/nvme0n1", "/dev/nvme0n2"]
    assert kinds_of(found) == {"0000:5f:00.0": "nvme"}


def test_a_drive_under_vfio_is_given_as_its_group(tree: DeviceTree) -> None:
    tree.pci("0000:5f:00.0", pci_class="010802", driver="vfio-pci", group=12)
    drive = by_id(look(tree))["0000:5f:00.0"]
    assert (drive.kind, drive.iommu_group, paths(edits(drive))) == ("nvme", 12, ["/dev/vfio/vfio", "/dev/vfio/12"])


def test_a_drive_over_fabrics_is_a_device_without_a_function(tree: DeviceTree) -> None:
    folder = tree.root / "sys/devices/virtual/nvme-fabrics/ctl/nvme4"
    tree.member("nvme", "nvme4", folder, {"serial": "af12", "transport": "tcp", "cntlid": "3"})
    tree.member("block", "nvme4n1", folder / "nvme4n1", {"size": 2048, "dev": "259:9"})
    found = look(tree)
    assert kinds_of(found) == {"nvme-af12-3": "nvme"}
    assert by_id(found)["nvme-af12-3"].paths == ("/dev/nvme4n1",)


def test_whole_disks_are_found_and_what_is_made_in_software_is_not(tree: DeviceTree) -> None:
    """The id is what the disk says of itself, and lies with its controller."""
    tree.pci("0000:00:17.0", pci_class="010601", driver="ahci", numa_node=0)
    disk = tree.disk("0000:00:17.0", "sda", "ata1/host0/target0:0:0/0:0:0:0", 1 << 40)
    tree.write(f"{disk.relative_to(tree.root)}/device/wwid", "naa.5000c500a1b2c3d4")
    tree.member("block", "sda1", disk / "sda1", {"partition": 1, "dev": "8:1", "size": 10})
    for name in ("loop0", "ram3", "zram0", "dm-0", "md127", "sr0"):
        tree.member("block", name, tree.root / f"sys/devices/virtual/block/{name}", {"size": 0, "dev": "7:0"})
    found = look(tree)
    assert kinds_of(found) == {"block-naa.5000c500a1b2c3d4": "block", "0000:00:17.0": "pci"}
    device = by_id(found)["block-naa.5000c500a1b2c3d4"]
    assert (device.parent, device.numa_node, device.bridges) == ("0000:00:17.0", 0, ("0000:00:17.0",))
    assert device.attributes["size_bytes"] == 1 << 40


@pytest.mark.parametrize("how", ["mounted partition", "mounted disk", "swap", "held by device mapper"])
def test_a_disk_that_the_node_uses_is_marked(tree: DeviceTree, how: str) -> None:
    tree.pci("0000:00:17.0", pci_class="010601")
    disk = tree.disk("0000:00:17.0", "sda", "ata1", 1 << 40)
    tree.member("block", "sda1", disk / "sda1", {"partition": 1, "dev": "8:1", "size": 10})
    assert look(tree).devices[0].attributes["in_use"] is False
    number = "8:1" if how == "mounted partition" else "8:0" if how == "mounted disk" else "0:22"
    tree.write("proc/1/mountinfo", f"22 1 {number} / / rw,relatime shared:1 - ext4 /dev/root rw")
    if how == "swap":
        tree.write("proc/swaps", "Filename Type Size Used Priority\n/dev/sda1 partition 8388604 0 -2")
    if how == "held by device mapper":
        (disk / "sda1" / "holders" / "dm-0").mkdir(parents=True)
    assert look(tree).devices[0].attributes["in_use"] is True


def test_disks_with_one_serial_number_are_told_apart_by_name(tree: DeviceTree) -> None:
    for number in (2, 3):
        tree.pci(f"0000:00:0{number}.0", pci_class="010000", vendor="1af4", driver="virtio-pci")
        tree.disk(f"0000:00:0{number}.0", f"vd{'ab'[number - 2]}", f"virtio{number}", 1 << 30, serial="same")
    assert {device.id for device in look(tree).devices if device.kind == "block"} == {
        "block-same-vda",
        "block-same-vdb",
    }
