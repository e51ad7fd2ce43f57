"""`nodeagent explain cpu N`: who holds a CPU, and whether it can be granted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nodeagent.cli.agent.explain.kernel import intruders_on, print_intruders
from nodeagent.cli.agent.explain.unit import moment
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.core.ledger.offline import outside_of
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant
from nodeagent.core.placement.index import machine_of
from nodeagent.errors import InputError

Document = dict[str, Any]


def explain_cpu(state: NodeState, text: str) -> Document:
    """Return who holds a CPU and what else is known of it. Raise InputError if the machine cannot have it."""
    inventory = state.inventory
    digits = re.fullmatch(r"(?:cpu)?([0-9]{1,5})", text, re.ASCII)
    possible = inventory.cpus_possible | inventory.cpus_online | inventory.cpus_offline
    if digits is None or int(digits[1]) not in possible:
        raise InputError(f"cannot explain CPU {text}: this machine can have CPUs {possible}")
    number = int(digits[1])
    cpu = inventory.cpu_by_id.get(number)
    core = CpuSet.of_mask(machine_of(inventory).cores[cpu.core]) if cpu is not None else CpuSet()
    holder = _holder(state, number)
    return {
        "cpu": number,
        "online": cpu is not None,
        "package": cpu.package if cpu is not None else None,
        "numa_node": cpu.numa_node if cpu is not None else None,
        "l3": cpu.l3 if cpu is not None else None,
        "core": str(core),
        "siblings": {one: _name(_holder(state, one)) for one in core if one != number},
        "holder": _name(holder),
        "grant": holder.id if holder is not None else "",
        "granted_at": holder.granted_at if holder is not None else 0.0,
        "not_granted": list(_hindrances(state, number)),
        "confined": _confined(state, number),
        **intruders_on(state.status["pinning"], CpuSet([number])),
    }


def _holder(state: NodeState, cpu: int) -> Grant | None:
    return next((one for one in state.ledger.grants.values() if cpu in one.cpus), None)


def _name(grant: Grant | None) -> str:
    return str(grant.holder) if grant is not None else ""


def _hindrances(state: NodeState, cpu: int) -> Iterator[str]:
    """Yield why a CPU cannot be granted, whether it is held or not."""
    inventory = state.inventory
    if cpu not in inventory.cpus_online:
        yield "it is offline"
    if cpu in state.ledger.reserved:
        yield "it is reserved for the system"
    if cpu in inventory.cpus_outside:
        yield outside_of(inventory)


def _confined(state: NodeState, cpu: int) -> list[str]:
    """Return the containers with exclusive CPUs that the kernel lets run on a CPU."""
    pinned = state.status["pinning"].get("pinned", ())
    on = (one for one in pinned if cpu in CpuSet.parse(one["effective_cpus"]))
    return [f"{one['namespace']}/{one['pod']}/{one['container']}" for one in on]


# ---------------------------------------------------------------- as text


def print_cpu(document: Mapping[str, Any]) -> None:
    """Print what is known of a CPU."""
    print(f"CPU {document['cpu']}: {_place(document)}")
    if document["holder"]:
        print(f"held by {document['holder']}, grant {document['grant']} of {moment(document['granted_at'])}")
    for why in document["not_granted"]:
        print(f"not granted: {why}")
    if not document["holder"] and not document["not_granted"]:
        print("free: it can be granted")
    for sibling, holder in document["siblings"].items():
        print(f"sibling CPU {sibling} of the same core: {holder or 'not held'}")
    for container in document["confined"]:
        print(f"the kernel lets {container} run on it")
    print_intruders(document)


def _place(document: Mapping[str, Any]) -> str:
    if not document["online"]:
        return "offline"
    group = f", L3 group {document['l3']}" if document["l3"] is not None else ""
    node = f"NUMA node {document['numa_node']}" if document["numa_node"] >= 0 else "no NUMA node"
    return f"socket {document['package']}, {node}{group}, core of CPUs {document['core']}"
