"""`nodeagent inventory`: what the machine has."""

from __future__ import annotations

import argparse
import sys

from nodeagent.cli.shared.facts import machine_of
from nodeagent.cli.shared.source import add_root
from nodeagent.cli.shared.tables import print_document, print_table
from nodeagent.core.model.inventory import ABSENT, Inventory
from nodeagent.core.model.inventory_json import to_document
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import HugepagePool

REPLAYABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent inventory`."""
    add_root(parser)
    parser.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    inventory = machine_of(args)
    if args.output == "table":
        _print_tables(inventory)
    else:
        print_document(to_document(inventory), args.output)
    for warning in inventory.warnings:
        print(f"nodeagent: warning: {warning}", file=sys.stderr)
    return 0


def _print_tables(inventory: Inventory) -> None:
    packages = {cpu.package for cpu in inventory.cpus}
    cores = {cpu.core for cpu in inventory.cpus}
    print(
        f"{len(inventory.cpus)} CPUs online ({inventory.cpus_online}), {len(cores)} cores, {len(packages)} packages"
        + (f", offline {inventory.cpus_offline}" if inventory.cpus_offline else "")
        + (f", isolated {inventory.cpus_isolated}" if inventory.cpus_isolated else "")
    )
    print()
    _print_nodes(inventory)
    if inventory.devices:
        print()
        print_table(
            ("KIND", "ID", "NUMA", "DRIVER", "VENDOR:DEVICE", "CLASS"),
            [
                (d.kind, d.id, d.numa_node, d.driver, f"{d.vendor}:{d.device}" if d.vendor else "", d.pci_class)
                for d in inventory.devices
                if d.kind != "bridge"
            ],
        )
    states = [state for state in inventory.kinds if state.reason and state.state != ABSENT]
    if states:
        print()
        print_table(("KIND", "STATE", "REASON"), [(s.kind, s.state, s.reason) for s in states])


def _print_nodes(inventory: Inventory) -> None:
    rows = []
    for node in inventory.numa_nodes:
        groups = {cpu.l3 for cpu in inventory.cpus if cpu.numa_node == node.id and cpu.l3 is not None}
        pages = " ".join(_pool(pool) for pool in node.hugepages if pool.total_pages)
        rows.append((node.id, node.cpus, len(groups) or None, node.kind, _gib(node.memory_bytes), pages))
    print_table(("NUMA", "CPUS", "L3", "KIND", "MEMORY", "HUGEPAGES FREE/TOTAL"), rows)


def _pool(pool: HugepagePool) -> str:
    foreign = f" ({pool.foreign_pages} foreign)" if pool.foreign_pages else ""
    return f"{format_size(pool.page_bytes)}={pool.free_pages}/{pool.total_pages}{foreign}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f}Gi"
