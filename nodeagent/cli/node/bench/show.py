"""What `nodeagent bench placement` prints: what was measured, what the placement is worth, and the limits of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nodeagent.cli.node.bench.measure import Measured, NodeMeasure
from nodeagent.cli.shared.tables import print_table

NODES = ("NUMA", "LATENCY", "READ", "OF THE GRANT", "NOTE")
JITTER = ("CPU", "WAKE-UPS", "MEDIAN", "P99", "WORST")
DEVICES = "host to device: not measured (a GPU's own tools do, such as nvbandwidth on these CPUs)"
LIMITS = (
    "Latency is that of dependent reads in random order, the misses of address translation included; bandwidth is that "
    "of one reading thread on each CPU. Both count only the time in which the thread ran.",
    "Wake-ups are those of ordinary threads, which slept for 1 ms each; with real-time priority they are earlier.",
    "If other programs use the memory or the CPUs meanwhile, the figures include it: compare several runs.",
)


def print_measured(found: Measured) -> None:
    """Print everything."""
    whose = f"pod {found.plan.whose}" if found.plan.whose else "free CPUs"
    print(f"{whose}: CPUs {found.plan.cpus}, about {found.seconds:g} s, {found.plan.bytes_per_node >> 20} MiB a node\n")
    print_table(NODES, [_row(one, found) for one in found.nodes])
    print()
    print_table(
        JITTER, [(one.cpu, one.wakeups, *map(_us, (one.median_ns, one.p99_ns, one.worst_ns))) for one in found.jitter]
    )
    print()
    for line in (*verdict(found), DEVICES, *LIMITS):
        print(line)


def _row(one: NodeMeasure, found: Measured) -> tuple[object, ...]:
    latency = "" if one.latency_ns is None else f"{one.latency_ns:.0f} ns"
    read = "" if one.bytes_per_s is None else f"{one.bytes_per_s / 1e9:.1f} GB/s"
    note = f"not measured: {one.why_not}" if one.why_not else ""
    return one.node, latency, read, "yes" if one.node in found.plan.local else "", note


def _us(ns: int) -> str:
    return f"{ns / 1000:.1f} us"


def verdict(found: Measured) -> Iterator[str]:
    """Yield what the placement is worth against the worst one."""
    known = [one for one in found.nodes if one.latency_ns is not None and one.bytes_per_s is not None]
    mine = [one for one in known if one.node in found.plan.local]
    if not mine:
        yield "The memory of the grant was not measured."
    elif len(known) < 2:
        yield "One NUMA node was measured: there is no worse placement to compare with."
    else:
        yield from _compared(mine, known)


def _compared(mine: list[NodeMeasure], known: list[NodeMeasure]) -> Iterator[str]:
    slowest = max(known, key=lambda one: one.latency_ns or 0.0)
    narrowest = min(known, key=lambda one: one.bytes_per_s or 0.0)
    latency = max(one.latency_ns or 0.0 for one in mine)
    read = min(one.bytes_per_s or 0.0 for one in mine)
    worst_ns, worst_read = slowest.latency_ns or 0.0, narrowest.bytes_per_s or 0.0
    yield (
        f"Latency: {latency:.0f} ns with the memory of the grant; with that of node {slowest.node}, the worst from "
        f"these CPUs, {worst_ns:.0f} ns ({worst_ns / latency:.2f} times)."
    )
    yield (
        f"Bandwidth: {read / 1e9:.1f} GB/s with the memory of the grant; with that of node {narrowest.node} "
        f"{worst_read / 1e9:.1f} GB/s ({worst_read / read:.2f} times)."
    )


def document(found: Measured) -> dict[str, Any]:
    """Return what was measured in plain types."""
    return {
        "pod": found.plan.whose,
        "cpus": str(found.plan.cpus),
        "granted_numa_nodes": str(found.plan.local),
        "seconds": found.seconds,
        "bytes_per_node": found.plan.bytes_per_node,
        "numa_nodes": [
            {
                "numa_node": one.node,
                "latency_ns": None if one.latency_ns is None else round(one.latency_ns, 1),
                "read_bytes_per_s": None if one.bytes_per_s is None else round(one.bytes_per_s),
                "not_measured": one.why_not,
            }
            for one in found.nodes
        ],
        "wakeups": [one._asdict() for one in found.jitter],
        "host_to_device": None,
        "verdict": list(verdict(found)),
        "limits": list(LIMITS),
    }
