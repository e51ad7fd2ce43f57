"""Adds devices to the sysfs tree of a machine, with the folders, files and links that a kernel would make.

tree = DeviceTree(root)
tree.pci("0000:3b:00.0", under="0000:3a:00.0", pci_class="030200", vendor="10de", driver="nvidia", numa_node=0)
tree.net("0000:5e:00.0", "eth0", speed=100000)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

BRIDGE = "060400"


class DeviceTree:
    """A root folder with /sys and /dev below it. Every method returns the folder or file that it made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, Path] = {}

    def write(self, path: str, text: object) -> Path:
        """A file below the root, with the line end that kernel files have."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return file

    def link(self, path: str, target: Path) -> None:
        """A relative link, as sysfs has them."""
        at = self.root / path
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(os.path.relpath(target, at.parent))

    def node(self, path: str) -> Path:
        """What stands for a device node: a plain file."""
        return self.write(path.lstrip("/"), "")

    def pci(
        self,
        address: str,
        *,
        under: str | None = None,
        pci_class: str = "020000",
        vendor: str = "8086",
        device: str = "1572",
        driver: str | None = None,
        numa_node: int = -1,
        cpus: str = "ff",
        group: int | None = None,
        files: Mapping[str, object] | None = None,
    ) -> Path:
        """A PCI function. cpus: the mask of local_cpus."""
        folder = (self.folders[under] if under else self._root_bus(address)) / address
        self.folders[address] = folder
        written = {
            "class": f"0x{pci_class}",
            "vendor": f"0x{vendor}",
            "device": f"0x{device}",
            "numa_node": numa_node,
            "local_cpus": cpus,
            **(files or {}),
        }
        for name, value in written.items():
            self.write(f"{folder.relative_to(self.root)}/{name}", value)
        self.link(f"sys/bus/pci/devices/{address}", folder)
        if driver is not None:
            self._points_to(folder, "driver", f"sys/bus/pci/drivers/{driver}")
        if group is not None:
            self._points_to(folder, "iommu_group", f"sys/kernel/iommu_groups/{group}")
        return folder

    def bridge(self, address: str, *, under: str | None = None, numa_node: int = -1) -> Path:
        return self.pci(address, under=under, pci_class=BRIDGE, driver="pcieport", numa_node=numa_node)

    def switch(self, up: str, downs: Sequence[str], *, under: str, numa_node: int = -1) -> None:
        """A PCIe switch: its port towards the root and the ports below."""
        self.bridge(up, under=under, numa_node=numa_node)
        for down in downs:
            self.bridge(down, under=up, numa_node=numa_node)

    def vf(self, pf: str, index: int, address: str, *, driver: str = "iavf", group: int | None = None) -> Path:
        """A virtual function of a physical one, and the links between them."""
        owner = self.folders[pf]
        folder = self.pci(address, pci_class="020000", device="154c", driver=driver, numa_node=0, group=group)
        (folder / "physfn").symlink_to(f"../{pf}")
        (owner / f"virtfn{index}").symlink_to(f"../{address}")
        (owner / "sriov_totalvfs").write_text("64\n")
        (owner / "sriov_numvfs").write_text(f"{index + 1}\n")
        return folder

    def member(self, kind: str, name: str, folder: Path, files: Mapping[str, object]) -> Path:
        """A class device in `folder` and the link to it in /sys/class."""
        for file, value in files.items():
            self.write(f"{folder.relative_to(self.root)}/{file}", value)
        folder.mkdir(parents=True, exist_ok=True)
        self.link(f"sys/class/{kind}/{name}", folder)
        return folder

    def net(self, function: str, name: str, *, below: str = "", **files: object) -> Path:
        """A network interface. below: a folder between function and interface (virtio0, mlx5_core.sf.2)."""
        defaults = {
            "operstate": "up",
            "flags": "0x1003",
            "carrier": 1,
            "speed": 25000,
            "mtu": 1500,
            "address": "02:00:00:00:00:01",
        }
        return self.member("net", name, self.folders[function] / below / "net" / name, {**defaults, **files})

    def rdma(self, address: str, name: str, number: int, *, below: str = "") -> None:
        """An RDMA device with its verbs and management nodes."""
        folder = self.folders[address] / below
        self.member("infiniband", name, folder / "infiniband" / name, {"node_guid": "0002:c903:00a1:b2c3"})
        verbs = folder / "infiniband_verbs" / f"uverbs{number}"
        self.member("infiniband_verbs", f"uverbs{number}", verbs, {"ibdev": name, "dev": f"231:{192 + number}"})
        mad = folder / "infiniband_mad" / f"umad{number}"
        self.member("infiniband_mad", f"umad{number}", mad, {"ibdev": name})
        self.node("/dev/infiniband/rdma_cm")

    def vdpa(
        self, function: str, name: str, *, driver: str | None = "vhost_vdpa", below: str = "", node: int = 0
    ) -> Path:
        """A vDPA device of a function, or with `below` of a scalable one; without a function one in software. node: the
        number of what its driver makes, a node or a virtio device with an interface."""
        folder = self.folders[function] / below if function else self.root / "sys/devices/virtual/vdpasim_net"
        self.write(f"{(folder / name).relative_to(self.root)}/driver_override", "(null)")
        self.link(f"sys/bus/vdpa/devices/{name}", folder / name)
        if driver is not None:
            self._points_to(folder / name, "driver", f"sys/bus/vdpa/drivers/{driver}")
        if driver == "vhost_vdpa":
            self.write(f"{(folder / name).relative_to(self.root)}/vhost-vdpa-{node}/dev", f"511:{node}")
            self.node(f"/dev/vhost-vdpa-{node}")
        elif driver == "virtio_vdpa" and function:
            self.net(function, f"eth{node}", below=f"virtio{node}")
        return folder / name

    def nvme(self, address: str, number: int, namespaces: Mapping[int, int], *, multipath: bool = False) -> Path:
        """An NVMe controller. namespaces: number -> bytes."""
        name = f"nvme{number}"
        files = {"model": "Fast Drive 7", "serial": f"S{number:04d}", "transport": "pcie", "state": "live"}
        folder = self.member("nvme", name, self.folders[address] / "nvme" / name, files)
        for namespace, size_bytes in namespaces.items():
            disk = f"{name}n{namespace}"
            place = folder / disk
            if multipath:
                (folder / f"{name}c{number}n{namespace}").mkdir()
                place = self.root / f"sys/devices/virtual/nvme-subsystem/nvme-subsys{number}" / disk
            self.member("block", disk, place, {"size": size_bytes // 512, "dev": f"259:{namespace}"})
        return folder

    def disk(self, address: str, name: str, below: str, size_bytes: int, **files: object) -> Path:
        """A whole disk somewhere below a function."""
        folder = self.folders[address] / below / "block" / name
        return self.member("block", name, folder, {"size": size_bytes // 512, "dev": "8:0", **files})

    def drm(self, address: str, card: int, *, render: bool = True) -> None:
        folder = self.folders[address] / "drm"
        (folder / f"card{card}").mkdir(parents=True)
        if render:
            (folder / f"renderD{128 + card}").mkdir()

    def kfd(
        self,
        number: int,
        address: str | None,
        xgmi: Sequence[int] = (),
        *,
        partition: int = 0,
        render: int | None = None,
        unique_id: int = 4660,
        memory_bytes: int = 192 << 30,
    ) -> None:
        """A node of AMD's compute topology: a CPU where there is no address. partition: what location_id has more than
        the address."""
        folder = f"sys/class/kfd/kfd/topology/nodes/{number}"
        self.write(f"{folder}/gpu_id", 0 if address is None else 40000 + number)
        if address is None:
            self.write(f"{folder}/properties", "cpu_cores_count 64\nsimd_count 0")
            return
        domain, bus, device, function = (int(part, 16) for part in address.replace(".", ":").split(":"))
        location = (bus << 8 | device << 3 | function) + partition
        lines = ["simd_count 304", f"location_id {location}", f"domain {domain}", f"unique_id {unique_id}"]
        lines += [] if render is None else [f"drm_render_minor {render}"]
        self.write(f"{folder}/properties", "\n".join(lines))
        self.write(f"{folder}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {memory_bytes}")
        for index, peer in enumerate(xgmi):
            text = f"type 11\nnode_from {number}\nnode_to {peer}\nweight 15"
            self.write(f"{folder}/io_links/{index}/properties", text)

    def queue(self, function: str, accelerator: str, number: int, *, node: bool = True, **files: object) -> Path:
        """A work queue of an accelerator (dsa0, iax1) of Intel's."""
        folder, name = self.folders[function] / accelerator, f"wq{accelerator[3:]}.{number}"
        shared = {"mode": "shared", "size": 16, "threshold": 8, "priority": 10, "group_id": 0, "name": "app"}
        told = {"type": "user", "state": "enabled", "driver_name": "user", **shared}
        told |= {"max_batch_size": 32, "max_transfer_size": 2 << 20, **files}
        for file, value in told.items():
            self.write(f"{(folder / name).relative_to(self.root)}/{file}", value)
        self.link(f"sys/bus/dsa/devices/{name}", folder / name)
        if node:
            self.node(f"/dev/{accelerator[:3]}/{name}")
        return folder / name

    def sgx(self, epc_bytes: Mapping[int, int], *, provision: bool = True) -> None:
        """SGX, with the enclave memory of NUMA nodes."""
        for node, size in epc_bytes.items():
            self.write(f"sys/devices/system/node/node{node}/x86/sgx_total_bytes", size)
        self.node("/dev/sgx_enclave")
        if provision:
            self.node("/dev/sgx_provision")

    def usb(self, controller: str, port: str, *, vendor: str, product: str, tty: str = "", **files: object) -> Path:
        """A USB device at a port ("1-1.4", below the hub at 1-1), with a serial port where `tty` names one."""
        bus, ports = port.split("-")[0], port.split(".")
        hubs = [".".join(ports[: depth + 1]) for depth in range(len(ports))]
        folder = self.folders[controller].joinpath(f"usb{bus}", *hubs)
        told = {"idVendor": vendor, "idProduct": product, "busnum": bus, "devnum": 7, **files}
        for name, value in told.items():
            self.write(f"{folder.relative_to(self.root)}/{name}", value)
        self.link(f"sys/bus/usb/devices/{port}", folder)
        if tty:
            self.member("tty", tty, folder / f"{port}:1.0" / tty / "tty" / tty, {"dev": "188:0"})
        return folder

    def _root_bus(self, address: str) -> Path:
        return self.root / f"sys/devices/pci{address.rsplit(':', 1)[0]}"

    def _points_to(self, folder: Path, name: str, path: str) -> None:
        target = self.root / path
        target.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(target, folder))
