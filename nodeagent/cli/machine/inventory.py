"""`nodeagent inventory`: what the machine has."""

from __future__ import annotations

import argparse
import sys

from nodeagent.cli.output import forms
from nodeagent.cli.output.columns import Column
from nodeagent.cli.shared.facts import machine_of
from nodeagent.cli.shared.source import add_root
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.model.inventory import ABSENT, Inventory
from nodeagent.core.model.inventory_json import to_document
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import HugepagePool

EXAMPLES = (
    ("nodeagent inventory", "what this machine has"),
    ("nodeagent inventory -o json > node.json", "the same for `nodeagent place --inventory node.json`"),
    ("nodeagent inventory --root /tmp/captured -o yaml", "what a captured tree of /sys and /proc has"),
    ("nodeagent inventory -o jsonpath='{.devices[?(@.kind==\"gpu\")].id}'", "the ids of the GPUs"),
)
DEVICES = (
    Column("KIND", lambda one: one.kind),
    Column("ID", lambda one: one.id),
    Column("NUMA", lambda one: one.numa_node),
    Column("LOCAL CPUS", lambda one: one.local_cpus, wide=True),
    Column("DRIVER", lambda one: one.driver),
    Column("VENDOR:DEVICE", lambda one: f"{one.vendor}:{one.device}" if one.vendor else ""),
    Column("CLASS", lambda one: one.pci_class),
)
REPLAYABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent inventory`."""
    add_root(parser)
    forms.add_output(parser, forms.LIST_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    inventory = machine_of(args)
    if args.output.is_table:
        _print_tables(inventory, args)
    elif args.output.kind == forms.NAME:
        forms.write_list(args, inventory.devices, DEVICES, name=lambda device: device.id)
    else:
        forms.write(args, to_document(inventory), print)
    for warning in inventory.warnings:
        print(f"nodeagent: warning: {warning}", file=sys.stderr)
    return 0


def _print_tables(inventory: Inventory, args: argparse.Namespace) -> None:
    packages = {cpu.package for cpu in inventory.cpus}
    cores = {cpu.core for cpu in inventory.cpus}
    print(
        f"{len(inventory.cpus)} CPUs online ({inventory.cpus_online}), {len(cores)} cores, {len(packages)} packages"
        + (f", offline {inventory.cpus_offline}" if inventory.cpus_offline else "")
        + (f", isolated {inventory.cpus_isolated}" if inventory.cpus_isolated else "")
    )
    print()
    _print_nodes(inventory, args)
    if inventory.devices:
        print()
        shown = [one for one in inventory.devices if one.kind != "bridge" or args.output.kind == forms.WIDE]
        forms.print_columns(args, shown, DEVICES)
    states = [state for state in inventory.kinds if state.reason and state.state != ABSENT]
    if states:
        print()
        print_table(("KIND", "STATE", "REASON"), [(s.kind, s.state, s.reason) for s in states], whole=args.no_trunc)


def _print_nodes(inventory: Inventory, args: argparse.Namespace) -> None:
    rows = []
    for node in inventory.numa_nodes:
        groups = {cpu.l3 for cpu in inventory.cpus if cpu.numa_node == node.id and cpu.l3 is not None}
        pages = " ".join(_pool(pool) for pool in node.hugepages if pool.total_pages)
        rows.append((node.id, node.cpus, len(groups) or None, node.kind, _gib(node.memory_bytes), pages))
    print_table(("NUMA", "CPUS", "L3", "KIND", "MEMORY", "HUGEPAGES FREE/TOTAL"), rows, whole=args.no_trunc)


def _pool(pool: HugepagePool) -> str:
    foreign = f" ({pool.foreign_pages} foreign)" if pool.foreign_pages else ""
    return f"{format_size(pool.page_bytes)}={pool.free_pages}/{pool.total_pages}{foreign}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f}Gi"
