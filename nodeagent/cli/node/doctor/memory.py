"""Memory: pools of hugepages, and what moves or fragments the memory of containers.

Sources: Documentation/admin-guide/mm/hugetlbpage.rst, transhuge.rst, Documentation/admin-guide/sysctl/kernel.rst.
"""

from __future__ import annotations

import re

from nodeagent.cli.node.doctor.model import Check, Finding, failure, ok, skipped, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.core.model.quantity import format_size, parse_size
from nodeagent.managers.hugepages.manager import lacking
from nodeagent.resources.offer import HUGEPAGES

THP = "sys/kernel/mm/transparent_hugepage"
BALANCING = "proc/sys/kernel/numa_balancing"
ZONE_RECLAIM = "proc/sys/vm/zone_reclaim_mode"


def _pools(node: Node) -> Finding:
    rules = node.config.hugepages
    if not rules:
        return skipped("no pools are configured (hugepages)")
    wrong = [f"hugepages[{i}]: {why}" for i, rule in enumerate(rules) if (why := lacking(rule, node.inventory))]
    if wrong:
        return failure("; ".join(wrong), "configure nodes and page sizes that this machine has", "nodeagent inventory")
    pools = {(n.id, p.page_bytes): p.total_pages for n in node.inventory.numa_nodes for p in n.hugepages}
    short = [
        f"{rule.page_size} on node {rule.node}: {have} of {rule.pages}"
        for rule in rules
        if (have := pools.get((rule.node, parse_size(rule.page_size)), 0)) < rule.pages
    ]
    if short:
        return warning(
            f"pools are smaller than configured: {'; '.join(short)}",
            "start the agent, or boot with hugepages=: fragmented memory cannot become pages",
        )
    return ok(f"{len(rules)} pools are as configured")


def _served(node: Node) -> Finding:
    wanted = [one for one in node.config.served if one.kind == HUGEPAGES]
    if not wanted:
        return skipped("no pages are served")
    there = {p.page_bytes for n in node.inventory.numa_nodes for p in n.hugepages if p.total_pages}
    grows = {parse_size(rule.page_size) for rule in node.config.hugepages if rule.pages or rule.max_pages}
    empty = [one.name for one in wanted if parse_size(one.page_size) not in there | grows]
    if empty:
        return warning(
            f"{', '.join(empty)}: this machine has no such pages",
            "make a pool at boot, or in hugepages of the configuration",
            "echo 512 > /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages",
        )
    return ok(f"pages of {', '.join(map(format_size, sorted(there))) or 'configured pools'} can be granted")


def _transparent(node: Node) -> Finding:
    text = node.kernel_text(f"{THP}/enabled")
    if text is None:
        return ok("the kernel has no transparent hugepages")
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is not None and chosen[1] == "always":
        return warning(
            "transparent hugepages are on for all memory: the kernel stops threads while it collects pages",
            "set madvise: programs that want them ask",
            f"echo madvise > /{THP}/enabled",
        )
    return ok(f"transparent hugepages: {chosen[1] if chosen else text[:40]}")


def _swap(node: Node) -> Finding:
    lines = (node.kernel_text("proc/swaps") or "").splitlines()[1:]
    names = [line.split()[0] for line in lines if line.split()]
    if not names:
        return ok("no swap")
    return warning(
        f"swap is on ({', '.join(names)[:120]}): pages of a latency-sensitive pod may be on disk",
        "switch swap off, or leave kubelet's memorySwap behaviour at NoSwap",
        "swapoff -a",
    )


def _balancing(node: Node) -> Finding:
    text = node.kernel_text(BALANCING)
    if text in (None, "0"):
        return ok("automatic NUMA balancing is off")
    if len(node.inventory.numa_nodes) < 2:
        return ok("automatic NUMA balancing has nothing to do on one node")
    return warning(
        "automatic NUMA balancing is on: it unmaps pages to see who uses them, also those of pods on one node",
        "switch it off where pods are aligned",
        "sysctl kernel.numa_balancing=0",
    )


def _reclaim(node: Node) -> Finding:
    text = node.kernel_text(ZONE_RECLAIM)
    if text in (None, "0"):
        return ok("a full NUMA node takes memory from others")
    return warning(
        f"vm.zone_reclaim_mode is {text[:20]}: a full node drops its page cache before it uses another",
        "set it to 0 unless all memory is bound",
        "sysctl vm.zone_reclaim_mode=0",
    )


CHECKS = (
    Check("memory.pools", "configuration.md#hugepages", _pools, configuration=True),
    Check("memory.hugepages", "doctor.md#memory", _served, configuration=True),
    Check("memory.transparent-hugepages", "doctor.md#memory", _transparent),
    Check("memory.swap", "doctor.md#memory", _swap),
    Check("memory.numa-balancing", "doctor.md#memory", _balancing),
    Check("memory.zone-reclaim", "doctor.md#memory", _reclaim),
)
