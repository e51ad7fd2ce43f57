"""A machine with disks and their parts: NVMe namespaces, partitions and an LVM volume."""

from __future__ import annotations

from pathlib import Path

from tests.builders.devices import DeviceTree

DRIVE, HBA = "0000:5f:00.0", "0000:60:00.0"
DISK, FIRST, SECOND = "block-naa.5000", "block-eui.1", "block-eui.2"
UUID = "LVM-" + "a" * 64


def disk_parts(root: Path) -> DeviceTree:
    """A drive with two namespaces, of which the first has a partition; a disk with two partitions; a volume on one."""
    made = DeviceTree(root)
    made.pci(DRIVE, pci_class="010802", driver="nvme", numa_node=1)
    folder = made.nvme(DRIVE, 0, {1: 1 << 40, 2: 1 << 39})
    for nsid in (1, 2):
        told = {"nsid": nsid, "wwid": f"eui.{nsid}", "eui": f"00 0{nsid}", "queue/logical_block_size": 4096}
        for name, value in told.items():
            made.write(f"{(folder / f'nvme0n{nsid}').relative_to(made.root)}/{name}", value)
    made.pci(HBA, pci_class="010700", driver="mpt3sas", numa_node=0)
    disk = made.disk(HBA, "sda", "host0", 1 << 40, **{"device/wwid": "naa.5000"})
    add_partition(made, disk, "sda1", 1, label="root")
    add_partition(made, disk, "sda2", 2, label="scratch-a", uuid="0001-02")
    add_partition(made, folder / "nvme0n1", "nvme0n1p1", 1, uuid="0001-03")
    volume = made.root / "sys/devices/virtual/block/dm-3"
    lvm = {"dm/uuid": UUID, "dm/name": "pods--x-fast--1", "size": 2048, "dev": "253:3", "ro": 0, "slaves/sda2/x": ""}
    made.member("block", "dm-3", volume, lvm)
    hidden = {"dm/uuid": f"{UUID}-tpool", "dm/name": "pods-pool-tpool", "size": 2048, "dev": "253:4"}
    made.member("block", "dm-4", made.root / "sys/devices/virtual/block/dm-4", hidden)
    return made


def add_partition(tree: DeviceTree, disk: Path, name: str, number: int, label: str = "", uuid: str = "") -> None:
    uevent = f"DEVTYPE=partition\nPARTN={number}\nPARTNAME={label}\nPARTUUID={uuid}"
    files = {"partition": number, "dev": f"8:{number}", "size": 20, "ro": 0, "uevent": uevent}
    tree.member("block", name, disk / name, files)
