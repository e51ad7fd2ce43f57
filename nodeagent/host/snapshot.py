"""A complete snapshot of the machine: topology and devices. Blocks; run it in a thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.device import Device, DriverFiles
from nodeagent.core.model.inventory import Inventory, PodsCgroup
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.pods_cpus import pods_cgroup
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.gpus.groups import gpu_groups
from nodeagent.host.driver_root.render import is_driven
from nodeagent.host.hugepages import use as hugepageuse
from nodeagent.host.nvml.client import Failure, Snapshot
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.topology import cpus as topology


class Selectors(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices outside the PCI tree to look for (from the configuration)."""

    char: tuple[all_kinds.CharSelector, ...] = ()
    usb: tuple[all_kinds.UsbSelector, ...] = ()
    pci: tuple[all_kinds.PciSelector, ...] = ()
    targets: tuple[all_kinds.TargetSelector, ...] = ()
    connected_nqns: frozenset[str] = frozenset()
    """Subsystems that the agent has connected for claims, configured or no longer configured."""
    dsa: all_kinds.DsaSelector = all_kinds.NO_DSA
    """Accelerators that are given to the agent, and those that it has divided."""
    block_types: frozenset[str] = frozenset()
    """Parts of disks: which of BLOCK_TYPES."""
    gpu_groups: frozenset[int] = frozenset()
    """Sizes of ready-made sets of linked GPUs."""
    driver_root: str | None = ""
    """Where the files of NVIDIA's driver are searched: a root on the host; "": the usual ones; None: nowhere."""
    partitions: all_kinds.PartitionSelector | None = None
    """None if no GPU is divided on demand."""


NO_SELECTORS = Selectors()


def scan(
    sysfs: SysFs,
    families: Sequence[all_kinds.Kind],
    selectors: Selectors = NO_SELECTORS,
    nvml: Snapshot | Failure | None = None,
    generation: int = 1,
    holders: Iterable[str] | None = None,
    cgroup_root: str | None = None,
    known: PodsCgroup | None = None,
) -> Inventory:
    """Read everything once and return the inventory. Faulty or missing files raise nothing;
    Inventory.warnings names them.

    holders: the cgroups of all holders of hugepages, below the mount of cgroup v2, or None if they are unknown.
    cgroup_root: kubelet's cgroupRoot, below which to look for the cgroup of all pods, or None to skip that. known: the
    previous value of that cgroup, kept if it cannot be read now.
    """
    found = _with_uses(sysfs, topology.read(sysfs), holders)
    if cgroup_root is not None:
        found = _with_pods(sysfs, found, cgroup_root, known)
    context = all_kinds.read_context(
        sysfs,
        online=found.cpus_online,
        nodes=[node.id for node in found.numa_nodes],
        char=selectors.char,
        usb=selectors.usb,
        pci_selectors=selectors.pci,
        targets=selectors.targets,
        connected_nqns=selectors.connected_nqns,
        dsa=selectors.dsa,
        block_types=selectors.block_types,
        nvml=nvml,
        partitions=selectors.partitions,
    )
    devices = all_kinds.discover(sysfs, families, context)
    driver, missing = _driver_files(sysfs, devices.devices, selectors.driver_root)
    found = replace(
        found,
        generation=generation,
        devices=devices.devices,
        links=devices.links,
        kinds=devices.kinds,
        warnings=(*found.warnings, *devices.warnings, *missing),
        nvidia_driver=driver,
    )
    groups = tuple(gpu_groups(found, selectors.gpu_groups))
    return replace(found, devices=all_kinds.in_order((*found.devices, *groups))) if groups else found


def _driver_files(
    sysfs: SysFs, devices: Iterable[Device], root: str | None
) -> tuple[DriverFiles | None, tuple[str, ...]]:
    """Return the files of NVIDIA's driver if it has a GPU here and its version is known, and warnings."""
    versions = (one.attributes.get("driver_version") for one in devices if is_driven(one))
    version = next((str(one) for one in versions if one), "")
    if not version or root is None:
        return None, ()
    from nodeagent.host.driver_root.find import find

    return find(sysfs, version, root)


def _with_pods(sysfs: SysFs, found: Inventory, cgroup_root: str, known: PodsCgroup | None) -> Inventory:
    try:
        return replace(found, pods_cgroup=pods_cgroup(sysfs, cgroup_root))
    except (HostError, InputError) as error:
        return replace(found, pods_cgroup=known, warnings=(*found.warnings, str(error)))


def _with_uses(sysfs: SysFs, found: Inventory, holders: Iterable[str] | None) -> Inventory:
    if holders is None:
        return found
    sizes = {pool.page_bytes for node in found.numa_nodes for pool in node.hugepages}
    try:
        uses = hugepageuse.uses(sysfs, holders, sorted(sizes))
    except HostError as error:
        return replace(found, warnings=(*found.warnings, str(error)))
    return found if uses is None else replace(found, numa_nodes=hugepageuse.known(found.numa_nodes, uses))
