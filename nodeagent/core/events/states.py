"""The states of a node that are reported when they change: held devices, resources, kubelet, ledger, configuration.

A state is bad or good. What is good when it is first seen is no news; nor is what is no longer looked at, such as a
device that is no longer held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from nodeagent.core.advice.repair import degradations, repair
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.events.happenings import RULES, Happening, PodRef, Reason
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Health
from nodeagent.core.model.inventory import DEGRADED, Inventory

OF_HEALTH = {
    HEALTHY: Reason.DEVICE_HEALTHY,
    UNHEALTHY: Reason.DEVICE_UNHEALTHY,
    UNKNOWN: Reason.DEVICE_HEALTH_UNKNOWN,
}
PodOf = Callable[[str], PodRef | None]
"""Return the pod with a UID, or None if its name is not known."""


class State(NamedTuple):
    """The state of one subject, in the words in which it is reported if it is new."""

    happening: Happening
    mark: str
    """What of it counts: it is new if its reason or this differs."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent knows of the node now."""

    inventory: Inventory
    ledger: Ledger
    health: Health
    refused: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why each configured resource is not served; "" for those that are."""
    conflicts: Sequence[str] = ()
    """What of kubelet contradicts the ledger or the configuration."""
    not_exclusive: str = ""
    """Why CPUs that were granted are not exclusive."""
    loss: str = ""
    """Why the ledger may lack grants."""
    replaced: Sequence[str] = ()
    """How the ledger's file was replaced, newest last."""
    config_error: str = ""
    """Why the newest configuration is not in force."""


def states(node: Node, pod_of: PodOf) -> dict[str, State]:
    """Return the states of everything that is looked at, by subject."""
    every = (*_devices(node, pod_of), *_resources(node), *_kubelet(node), *_ledger(node), _configuration(node))
    return {one.happening.subject: one for one in every}


def changes(before: Mapping[str, State], now: Mapping[str, State], *, found: bool) -> Iterator[Happening]:
    """Yield what is to be reported. found: whether the agent has just started."""
    for subject, (happening, mark) in now.items():
        old = before.get(subject)
        if old is None and not RULES[happening.reason].warns:
            continue
        if old is None or (happening.reason, mark) != (old.happening.reason, old.mark):
            yield replace(happening, reason=_reached(old, happening.reason), found=found)


def _reached(old: State | None, reason: Reason) -> Reason:
    """Return the reason of a change: a healthy device that was gone has returned."""
    back = old is not None and old.happening.reason is Reason.DEVICE_LOST and reason is Reason.DEVICE_HEALTHY
    return Reason.DEVICE_RETURNED if back else reason


# ---------------------------------------------------------------- devices


def _devices(node: Node, pod_of: PodOf) -> Iterator[State]:
    holding: dict[str, list[Grant]] = {}
    for grant in node.ledger.grants.values():
        for id in dict.fromkeys((*grant.devices, *grant.shares)):
            holding.setdefault(id, []).append(grant)
    for id, grants in sorted(holding.items()):
        reason, how, advice = _health(node, id)
        holders = ", ".join(sorted({str(one.holder) for one in grants}))
        pods = tuple(dict.fromkeys(pod for one in grants for pod in _pods(one, pod_of)))
        note = f"device {id} is {how}; held by {holders}{f'; {advice}' if advice else ''}"
        yield State(Happening(reason=reason, subject=f"device {id}", note=note, pods=pods, on_node=True), reason)


def _health(node: Node, id: str) -> tuple[Reason, str, str]:
    """Return the state of a device, how it is in words, and what an admin can do about it, or "". One that was not
    found is gone, or unknown if some devices could not be looked for."""
    if (device := node.inventory.device_by_id.get(id)) is not None:
        ill = illness(device, node.health)
        if ill is None and (worse := degradations(device, node.health)):
            return Reason.DEVICE_DEGRADED, f"degraded: {'; '.join(worse)}", ""
        state, cause = (ill.state, ill.reason) if ill is not None else (HEALTHY, "")
        return OF_HEALTH[state], f"{state}: {cause}" if cause else state, repair(device, node.health)
    unread = [f"{one.kind}: {one.reason}" for one in node.inventory.kinds if one.state == DEGRADED]
    if not unread:
        return Reason.DEVICE_LOST, "no longer there", ""
    cause = f"it was not found, and not all devices could be looked for ({'; '.join(unread)})"
    return Reason.DEVICE_HEALTH_UNKNOWN, f"{UNKNOWN}: {cause}", ""


def _pods(grant: Grant, pod_of: PodOf) -> Iterator[PodRef]:
    """Yield the pods of a grant whose names are known: by the runtime, or since kubelet has listed the only one."""
    for uid in grant.pod_uids:
        if (known := pod_of(uid)) is not None:
            yield known
        elif grant.holder.pod and len(grant.pod_uids) == 1:
            yield PodRef(grant.holder.namespace, grant.holder.pod, uid)


# ---------------------------------------------------------------- the rest


def _resources(node: Node) -> Iterator[State]:
    for name, why in node.refused.items():
        reason = Reason.RESOURCE_NOT_SERVED if why else Reason.RESOURCE_SERVED
        note = f"resource {name} is not served: {why}" if why else f"resource {name} is served"
        yield _on_node(reason, f"resource {name}", note)


def _kubelet(node: Node) -> Iterator[State]:
    for why in node.conflicts:
        yield _on_node(Reason.KUBELET_CONFLICT, f"conflict {why}", why)
    reason = Reason.CPUS_NOT_EXCLUSIVE if node.not_exclusive else Reason.CPUS_EXCLUSIVE
    yield _on_node(reason, "exclusive CPUs", node.not_exclusive or "all granted CPUs are exclusive")


def _ledger(node: Node) -> Iterator[State]:
    lost = f"the ledger may lack grants, and nothing new is granted until it is rebuilt: {node.loss}"
    reason = Reason.LEDGER_INCOMPLETE if node.loss else Reason.LEDGER_REBUILT
    yield _on_node(reason, "ledger", lost if node.loss else "the ledger is whole")
    yield from (_on_node(Reason.LEDGER_REPLACED, f"file {note}", note) for note in node.replaced)


def _configuration(node: Node) -> State:
    if why := node.config_error:
        note = f"the configuration is refused, the one before stays in force: {why}"
        return _on_node(Reason.CONFIGURATION_REFUSED, "configuration", note)
    return _on_node(Reason.CONFIGURATION_APPLIED, "configuration", "the configuration is in force")


def _on_node(reason: Reason, subject: str, note: str) -> State:
    return State(Happening(reason=reason, subject=subject, note=note), note)
