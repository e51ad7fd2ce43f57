"""One whole snapshot of the machine: topology and devices together. Blocks; meant for a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nodeagent.core.model import Inventory
from nodeagent.host import kinds, topology
from nodeagent.host.nvml import Failure, Snapshot
from nodeagent.host.sysfs import SysFs


@dataclass(frozen=True, slots=True, kw_only=True)
class Selectors:
    """Which devices beyond the PCI tree are looked for (from configuration)."""

    char: tuple[kinds.CharSelector, ...] = ()
    usb: tuple[kinds.UsbSelector, ...] = ()
    pci: tuple[kinds.PciSelector, ...] = ()


NO_SELECTORS = Selectors()


def scan(
    sysfs: SysFs,
    families: Sequence[kinds.Kind],
    selectors: Selectors = NO_SELECTORS,
    nvml: Snapshot | Failure | None = None,
    generation: int = 1,
) -> Inventory:
    """Read everything once. Never raises for what a file holds or lacks: Inventory.warnings says it."""
    cpus = topology.read(sysfs)
    context = kinds.read_context(
        sysfs,
        online=cpus.cpus_online,
        nodes=[node.id for node in cpus.numa_nodes],
        char=selectors.char,
        usb=selectors.usb,
        pci_selectors=selectors.pci,
        nvml=nvml,
    )
    devices = kinds.discover(sysfs, families, context)
    return Inventory(
        generation=generation,
        cpus=cpus.cpus,
        cpus_possible=cpus.cpus_possible,
        cpus_online=cpus.cpus_online,
        cpus_offline=cpus.cpus_offline,
        cpus_isolated=cpus.cpus_isolated,
        cpus_nohz_full=cpus.cpus_nohz_full,
        numa_nodes=cpus.numa_nodes,
        caches=cpus.caches,
        devices=devices.devices,
        links=devices.links,
        kinds=devices.kinds,
        warnings=(*cpus.warnings, *devices.warnings),
    )
