"""What tables show of a grant, as the page /v1/grants has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nodeagent.cli.output.columns import Column
from nodeagent.cli.output.words import age
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.quantity import format_size

CLAIM, KUBELET = "claim", "kubelet"
"""Values of `api` (core/model/grant.py)."""
Nodes = Mapping[str, int]
"""The NUMA node of each CPU ("cpu7") and device, by id."""


def holder(grant: Mapping[str, Any]) -> str:
    """Return who holds it, in the words of errors and of /v1/devices."""
    if grant["api"] == CLAIM:
        return f"claim {grant['namespace']}/{grant['claim']}"
    if grant["api"] == KUBELET and not grant["pod"]:
        return "/".join(filter(None, (f"kubelet's pod {grant['uid']}", grant["container"])))
    return (
        "/".join(filter(None, (grant["namespace"], grant["pod"], grant["container"]))) or "a container not yet listed"
    )


def memory(grant: Mapping[str, Any]) -> str:
    """Return hugepages and memory with their NUMA nodes."""
    pages = (f"{one['pages']}x{one['size']}@node{one['numa_node']}" for one in grant["hugepages"])
    plain = (f"{format_size(one['bytes'])}@node{one['numa_node']}" for one in grant["memory"])
    return " ".join((*pages, *plain))


def held_ids(grant: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ids of what is held: devices, shares, ids of the device plugin, and CPUs as cpu7."""
    yield from grant["devices"]
    yield from grant["ids"]
    yield from (f"cpu{cpu}" for cpu in CpuSet.parse(grant["cpus"]))


def nodes_of(grant: Mapping[str, Any], nodes: Nodes) -> CpuSet:
    """Return the NUMA nodes that a grant is on."""
    known = {nodes[one] for one in held_ids(grant) if one in nodes}
    return CpuSet(known | {one["numa_node"] for one in (*grant["hugepages"], *grant["memory"])})


def machine_nodes(inventory: Mapping[str, Any]) -> Nodes:
    """Return the NUMA nodes of a machine, from the page /v1/inventory."""
    cpus = {f"cpu{one['id']}": one["numa_node"] for one in inventory["cpus"]}
    devices = {one["id"]: one["numa_node"] for one in inventory["devices"]}
    return {one: node for one, node in (cpus | devices).items() if node is not None and node >= 0}


def columns(now_s: float, nodes: Nodes) -> tuple[Column, ...]:
    """Return the columns of a list of grants. now_s: seconds since the epoch."""
    return (
        Column("GRANT", lambda g: g["id"]),
        Column("HOLDER", holder),
        Column("RESOURCE", lambda g: g["resource"] or g["api"]),
        Column("CPUS", lambda g: g["cpus"]),
        Column("MEMORY", memory),
        Column("DEVICES", lambda g: " ".join(sorted(g["devices"]))),
        Column("AGE", lambda g: age(g["granted_at"], now_s), key=lambda g: now_s - g["granted_at"]),
        Column("NUMA", lambda g: nodes_of(g, nodes), wide=True),
        Column("API", lambda g: g["api"], wide=True),
        Column("UID", lambda g: g["uid"] or " ".join(g["pod_uids"]), wide=True),
        Column("NOTE", lambda g: g["held_back"]),
    )
