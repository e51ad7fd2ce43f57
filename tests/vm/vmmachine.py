"""The guest's hardware: QEMU's arguments for processors, NUMA nodes, distances, memory kinds and PCI devices.

`BIG` is what most tests want; `SMALL` boots in half the time. Both have a node with memory only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

SPARE_PORTS = ("rp3", "rp7", "rp8", "rp9")
"""Root ports without a device: the first two below an expander with a NUMA node of its own, the others without."""
HOT_DRIVE = "hot"
"""The disk image for an NVMe that is plugged while the guest runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Processors and memory. Units are in the names."""

    cpus: int
    smp: str
    memory: str
    node_gib: tuple[int, ...]
    """The last node has no CPUs."""
    expander_nodes: tuple[int, int]

    @property
    def cpu_nodes(self) -> int:
        return len(self.node_gib) - 1

    def cpulist(self, node: int) -> str:
        each = self.cpus // self.cpu_nodes
        return f"{each * node}-{each * (node + 1) - 1}"

    def distance(self, one: int, other: int) -> int:
        """As in the ACPI SLIT: 10 is a node itself."""
        if self.cpu_nodes in (one, other):
            return 31
        return 12 if self.cpu_nodes > 2 and one // 2 == other // 2 else 21


# QEMU 7.2 describes two dies per socket well; QEMU 10.0 fails an assertion of its own with them.
BIG = Topology(
    cpus=16,
    smp="16,sockets=2,dies=2,cores=2,threads=2",
    memory="13G,slots=4,maxmem=20G",
    node_gib=(2, 3, 3, 3, 2),
    expander_nodes=(0, 2),
)
BIG_ONE_DIE = Topology(
    cpus=16,
    smp="16,sockets=2,dies=1,cores=4,threads=2",
    memory="13G,slots=4,maxmem=20G",
    node_gib=(2, 3, 3, 3, 2),
    expander_nodes=(0, 2),
)
SMALL = Topology(
    cpus=4,
    smp="4,sockets=2,dies=1,cores=2,threads=1",
    memory="3G,slots=4,maxmem=8G",
    node_gib=(1, 1, 1),
    expander_nodes=(0, 1),
)


def big(qemu_version: int) -> Topology:
    return BIG if qemu_version < 8 else BIG_ONE_DIE


def arguments(topology: Topology, qemu_version: int) -> list[str]:
    """All that makes the machine; not its kernel, disks and channels."""
    pairs = [*_processors(topology), *_distances(topology), *_memory_attributes(topology)]
    pairs += [*_bridges(topology), *_disks(), *_networks(qemu_version), *_oddities()]
    return [word for pair in pairs for word in pair]


Pairs = Iterator[tuple[str, str]]


def _processors(topology: Topology) -> Pairs:
    yield "-m", topology.memory
    yield "-smp", topology.smp
    for node, gib in enumerate(topology.node_gib):
        has_cpus = node < topology.cpu_nodes
        yield "-object", f"memory-backend-ram,id=m{node},size={gib}G"
        cpus = f",cpus={topology.cpulist(node)}" if has_cpus else ""
        initiator = node if has_cpus else topology.cpu_nodes // 2
        yield "-numa", f"node,nodeid={node},memdev=m{node},initiator={initiator}{cpus}"


def _distances(topology: Topology) -> Pairs:
    for one, other in combinations(range(len(topology.node_gib)), 2):
        yield "-numa", f"dist,src={one},dst={other},val={topology.distance(one, other)}"


def _memory_attributes(topology: Topology) -> Pairs:
    """The ACPI HMAT: latency in ns, bandwidth a second. The node without CPUs is slow."""
    for initiator in range(topology.cpu_nodes):
        for target in range(len(topology.node_gib)):
            slow, own = target == topology.cpu_nodes, target == initiator
            latency, bandwidth = (400, 20) if slow else (100, 200) if own else (200, 60)
            where = f"hmat-lb,initiator={initiator},target={target},hierarchy=memory"
            yield "-numa", f"{where},data-type=access-latency,latency={latency}"
            yield "-numa", f"{where},data-type=access-bandwidth,bandwidth={bandwidth}G"


def _bridges(topology: Topology) -> Pairs:
    """Root ports rp0 to rp3 below the first expander, rp4 to rp7 below the second, rp8 and rp9 on the host's bus."""
    yield "-device", "intel-iommu,intremap=off,caching-mode=on"
    for number, node in enumerate(topology.expander_nodes):
        yield "-device", f"pxb-pcie,id=pxb{number},bus=pcie.0,bus_nr={64 * (number + 1)},numa_node={node}"
    for port in range(8):
        where = f"bus=pxb{port // 4},chassis={port + 1},slot={port + 1},addr={port % 4}.0"
        yield "-device", f"pcie-root-port,id=rp{port},{where}"
    for port in (8, 9):
        yield "-device", f"pcie-root-port,id=rp{port},bus=pcie.0,chassis={port + 1},slot={port + 1}"


def _disks() -> Pairs:
    """An NVMe with two namespaces and up to four virtual functions, and an image for one that is plugged later."""
    for name, gib in (("n1", 1), ("n2", 2), (HOT_DRIVE, 4)):
        yield "-drive", f"driver=null-co,size={gib}G,read-zeroes=on,if=none,id={name}"
    functions = "sriov_max_vfs=4,sriov_vq_flexible=8,sriov_vi_flexible=8"
    yield "-device", "nvme-subsys,id=ss0,nqn=vm0"
    yield "-device", f"nvme,id=nv0,serial=VMNVME0,subsys=ss0,bus=rp0,max_ioqpairs=10,msix_qsize=11,{functions}"
    yield "-device", "nvme-ns,drive=n1,nsid=1,bus=nv0"
    yield "-device", "nvme-ns,drive=n2,nsid=2,bus=nv0"


def _networks(qemu_version: int) -> Pairs:
    cards = [("virtio-net-pci", "rp4"), ("e1000e", "rp1")] + [("igb", "rp5")] * (qemu_version >= 8)
    for number, (model, port) in enumerate(cards):
        yield "-netdev", f"hubport,id=h{number},hubid=0"
        romfile = "" if model == "igb" else ",romfile="
        yield "-device", f"{model},netdev=h{number},bus={port}{romfile},mac=52:54:00:00:00:0{number + 1}"


def _oddities() -> Pairs:
    """Devices of no family: shared memory, QEMU's teaching device, a USB keyboard with a serial number."""
    yield "-object", "memory-backend-ram,id=ivm,size=16M,share=on"
    yield "-device", "ivshmem-plain,memdev=ivm,bus=rp2"
    yield "-device", "edu,bus=rp6"
    yield "-device", "qemu-xhci,id=xhci,bus=pcie.0"
    yield "-device", "usb-kbd,bus=xhci.0,serial=VMKBD"
