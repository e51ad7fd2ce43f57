"""NVMe drives and other disks on synthetic trees, and which of them the node itself uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.host.devices import disks
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders import tables
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


# ---------------------------------------------------------------- what the node itself uses


def _two_disks(tree: DeviceTree) -> tuple[Path, Path]:
    """Disks sda and sdb, each with the partitions 1 and 2."""
    tree.pci("0000:00:17.0", pci_class="010601", driver="ahci")
    found = []
    for minor, name in ((0, "sda"), (16, "sdb")):
        disk = tree.disk("0000:00:17.0", name, f"ata{minor}", 1 << 40, dev=f"8:{minor}")
        for part in (1, 2):
            files = {"partition": part, "dev": f"8:{minor + part}", "size": 10}
            tree.member("block", f"{name}{part}", disk / f"{name}{part}", files)
        found.append(disk)
    return found[0], found[1]


def _uses(tree: DeviceTree) -> dict[str, object]:
    return {str(d.attributes["name"]): d.attributes["in_use"] for d in look(tree).devices if d.kind == "block"}


def _mount(tree: DeviceTree, *lines: str) -> None:
    tree.write("proc/1/mountinfo", "\n".join(lines))


def test_both_disks_of_a_btrfs_are_in_use(tree: DeviceTree) -> None:
    """Its device number is anonymous, the mount names one disk, and sysfs names both."""
    _two_disks(tree)
    _mount(tree, "25 1 0:22 /@/root / rw shared:1 - btrfs /dev/sda2 rw")
    for name in ("sda2", "sdb2"):
        tree.link(f"sys/fs/btrfs/11111111/devices/{name}", tree.root / f"sys/class/block/{name}")
    (tree.root / "sys/fs/btrfs/features").mkdir()
    assert _uses(tree) == {"sda": True, "sdb": True}


@pytest.mark.parametrize(
    ("line", "used"),
    [
        ("25 1 0:22 / / rw - btrfs /dev/sda2 rw", {"sda"}),
        ("25 1 0:22 / /a\\040b rw shared:1 master:2 - btrfs /dev/sdb rw", {"sdb"}),
        ("25 1 0:40 / /srv rw - bcachefs /dev/sda1:/dev/sdb1 rw", {"sda", "sdb"}),
        ("25 1 0:22 / / rw - btrfs /dev/disk/by-label/my\\040disk rw", {"sdb"}),
        ("25 1 0:6 /sdb2 /var/lib/kubelet/volumeDevices/pvc rw - devtmpfs devtmpfs rw", {"sdb"}),
        ("25 1 0:22 / / rw - btrfs /dev/disk/by-path/pci-0000:00:17.0-ata-1 rw", {"sdb"}),
        ("25 1 0:6 / /dev rw - devtmpfs devtmpfs rw", set()),
        ("25 1 0:30 / /mnt rw - nfs server:/dev/sda rw", set()),
        ("25 1 0:30", set()),
    ],
)
def test_the_source_of_a_mount_names_disks(tree: DeviceTree, line: str, used: set[str]) -> None:
    """Also through a link, as one of several, and as the node of a raw block volume."""
    _two_disks(tree)
    tree.node("/dev/sdb1")
    for link in ("by-label/my disk", "by-path/pci-0000:00:17.0-ata-1"):
        tree.link(f"dev/disk/{link}", tree.root / "dev/sdb1")
    _mount(tree, line)
    assert {name for name, use in _uses(tree).items() if use} == used


@pytest.mark.parametrize("kind", ["xfs", "ext4", "f2fs"])
def test_a_file_system_that_is_mounted_elsewhere_is_a_use(tree: DeviceTree, kind: str) -> None:
    """In another mount namespace; the kernel has a folder for the device all the same."""
    _two_disks(tree)
    (tree.root / f"sys/fs/{kind}/sdb1").mkdir(parents=True)
    (tree.root / f"sys/fs/{kind}/features").mkdir()
    assert _uses(tree) == {"sda": False, "sdb": True}


def test_the_members_of_a_bcachefs_are_in_use(tree: DeviceTree) -> None:
    _, sdb = _two_disks(tree)
    tree.link("sys/fs/bcachefs/2222/dev-0/block", sdb / "sdb2")
    assert _uses(tree) == {"sda": False, "sdb": True}


def test_the_members_of_an_array_below_a_volume_are_in_use(tree: DeviceTree) -> None:
    """The mounted volume has the array below it, and the array the partitions."""
    _two_disks(tree)
    for name, below in (("md0", ("sda1", "sdb2")), ("dm-0", ("md0",))):
        folder = tree.member("block", name, tree.root / f"sys/devices/virtual/block/{name}", {"dev": "253:0"})
        for one in below:
            tree.link(f"{folder.relative_to(tree.root)}/slaves/{one}", tree.root / f"sys/class/block/{one}")
    assert _uses(tree) == {"sda": True, "sdb": True}


def test_a_disk_in_a_cache_set_or_behind_a_loop_device_is_in_use(tree: DeviceTree) -> None:
    sda, _ = _two_disks(tree)
    (sda / "sda1" / "bcache").mkdir()
    loop = tree.root / "sys/devices/virtual/block/loop0"
    tree.member("block", "loop0", loop, {"dev": "7:0", "loop/backing_file": "/dev/sdb"})
    assert _uses(tree) == {"sda": True, "sdb": True}


def test_swap_on_a_link_is_a_use_and_an_empty_line_is_none(tree: DeviceTree) -> None:
    _two_disks(tree)
    tree.node("/dev/sdb2")
    tree.link("dev/disk/by-uuid/3333", tree.root / "dev/sdb2")
    tree.write("proc/swaps", "Filename Type Size Used Priority\n\n/dev/disk/by-uuid/3333 partition 8388604 0 -2")
    assert _uses(tree) == {"sda": False, "sdb": True}


def test_every_path_to_a_mounted_lun_is_in_use(tree: DeviceTree) -> None:
    sda, sdb = _two_disks(tree)
    for disk in (sda, sdb):
        tree.write(f"{disk.relative_to(tree.root)}/wwid", "naa.600000000000000a")
    _mount(tree, "25 1 8:1 / /data rw - ext4 /dev/sda1 rw")
    assert _uses(tree) == {"sda": True, "sdb": True}


def test_a_namespace_of_a_btrfs_makes_its_controller_in_use(tree: DeviceTree) -> None:
    tree.pci("0000:5f:00.0", pci_class="010802", driver="nvme")
    tree.nvme("0000:5f:00.0", 0, {1: 1 << 40, 2: 1 << 39}, multipath=True)
    (tree.root / "sys/fs/btrfs/4444/devices/nvme0n2").mkdir(parents=True)
    drive = by_id(look(tree))["0000:5f:00.0"]
    assert drive.attributes["in_use"] is True
    assert not DeviceResource(name="r/nvme", kind="nvme").serves(drive)


@pytest.mark.parametrize("witness", ["mount", "pool"])
def test_with_a_zfs_pool_the_use_of_the_other_disks_is_unknown(tree: DeviceTree, witness: str) -> None:
    """Nothing in /proc and /sys says which disks are in the pool; none of them is offered as free."""
    _two_disks(tree)
    _mount(
        tree, "25 1 8:1 / / rw - ext4 /dev/sda1 rw", *(["26 25 0:40 / /tank rw - zfs tank rw"] * (witness == "mount"))
    )
    tree.write("proc/spl/kstat/zfs/arcstats", "")
    if witness == "pool":
        tree.write("proc/spl/kstat/zfs/tank/state", "ONLINE")
    found = look(tree)
    assert _uses(tree) == {"sda": True, "sdb": "unknown"}
    assert any("dev/sdb" in warning and "ZFS" in warning for warning in found.warnings)
    assert not any(DeviceResource(name="r/block", kind="block").serves(one) for one in found.devices)


# ---------------------------------------------------------------- the running host


@pytest.fixture
def loop() -> str:
    """The name of a loop device that nothing uses."""
    for path in sorted(Path("/dev").glob("loop[0-9]*")):
        if (Path("/sys/class/block") / path.name / "loop").exists():
            continue
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
        except OSError:
            continue
        return path.name
    pytest.skip("there is no free loop device that may be opened")


def _use(name: str) -> tuple[bool | str, list[str]]:
    reader = Tolerant(SysFs("/"))
    nothing = disks.BlockUses(numbers=frozenset(), names=frozenset(), hidden=False)
    return disks.in_use(reader, name, f"sys/class/block/{name}", nothing), reader.warnings


def test_a_disk_that_another_program_claims_is_in_use(loop: str) -> None:
    """As ZFS and Ceph do; nothing in /proc or /sys shows it."""
    claim = os.open(f"/dev/{loop}", os.O_RDONLY | os.O_EXCL)
    try:
        assert _use(loop) == (True, [])
    finally:
        os.close(claim)
    assert _use(loop) == (False, [])


@pytest.mark.parametrize("name", ["no-such-disk", "null"])
def test_a_disk_that_cannot_be_opened_is_not_known_to_be_free(name: str) -> None:
    """Its node is absent or no block device; the warning names it."""
    use, warnings = _use(name)
    assert use == "unknown"
    assert len(warnings) == 1
    assert f"/dev/{name}" in warnings[0]


def test_a_captured_tree_is_never_opened_exclusively(tree: DeviceTree) -> None:
    """A fifo instead of a node: an open would be refused or wait."""
    _two_disks(tree)
    (tree.root / "dev").mkdir()
    os.mkfifo(tree.root / "dev/sda")
    assert _uses(tree) == {"sda": False, "sdb": False}


def test_the_disks_of_a_recorded_btrfs_are_in_use(tmp_path: Path) -> None:
    root = tables.build(tmp_path, tables.load("disk-in-use-btrfs", tables.TREES))
    assert _uses(DeviceTree(root)) == {"sda": True, "sdb": True}
