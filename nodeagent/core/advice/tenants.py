"""Who holds what, by what ends together: the pods that would have to end so that something is given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.grant import CLAIM, KUBELET, Grant

NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided together: what one container holds, or one claim."""

    name: str
    """NAMESPACE/POD/CONTAINER or "claim NAMESPACE/NAME"."""
    grants: tuple[Grant, ...]

    @property
    def cpus(self) -> CpuSet:
        """Return its CPUs."""
        return union(one.cpus for one in self.grants)

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the devices that it holds whole."""
        return tuple(device for one in self.grants for device in one.devices)


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Grants that are given back together: those of a pod, or of all pods that share a claim."""

    pods: tuple[str, ...]
    """NAMESPACE/NAME of each pod. A pod of which no name is known is named after what it holds."""
    grants: tuple[Grant, ...]

    def __str__(self) -> str:
        return ", ".join(self.pods)

    @property
    def cpus(self) -> CpuSet:
        """Return all CPUs that it holds."""
        return union(one.cpus for one in self.grants)

    @property
    def devices(self) -> tuple[str, ...]:
        """Return all devices that it holds, whole or in shares."""
        return tuple(dict.fromkeys(device for one in self.grants for device in (*one.devices, *one.shares)))

    @property
    def weight(self) -> tuple[int, int, tuple[str, ...]]:
        """Return the sort key by disruption: pods, then CPUs and devices, then names."""
        return len(self.pods), len(self.cpus) + len(self.devices), self.pods

    def units(self) -> tuple[Unit, ...]:
        """Return its parts in the order in which they were granted."""
        found: dict[str, list[Grant]] = {}
        for grant in sorted(self.grants, key=lambda one: (one.granted_at, one.id)):
            found.setdefault(str(grant.holder), []).append(grant)
        return tuple(Unit(name=name, grants=tuple(grants)) for name, grants in found.items())


def tenants_of(ledger: Ledger, names: Mapping[str, str] = NO_NAMES) -> tuple[Tenant, ...]:
    """Return all tenants, the least disruptive first.

    names: NAMESPACE/NAME of pods by UID, as far as others than the ledger know them.
    """
    grants = [*ledger.grants.values(), *ledger.foreign.values()]
    known = {**names, **{uid: pod_of(one) for one in grants if pod_of(one) for uid in one.pod_uids[:1]}}
    groups = _joined([(grant, _keys(grant, known)) for grant in grants])
    found = (Tenant(pods=_pods(group, known), grants=tuple(group)) for group in groups)
    return tuple(sorted(found, key=lambda one: one.weight))


def pod_of(grant: Grant) -> str:
    """Return NAMESPACE/NAME of the pod of a container's grant, or "" if it is not known."""
    return f"{grant.holder.namespace}/{grant.holder.pod}" if grant.holder.pod else ""


def _keys(grant: Grant, known: Mapping[str, str]) -> tuple[str, ...]:
    """Return what a grant has in common with others of the same pods."""
    if pod := pod_of(grant):
        return (pod,)
    alone = str(grant.holder) if grant.holder.uid else grant.id
    return tuple(known.get(uid, uid) for uid in grant.pod_uids) or (alone,)


def _joined(keyed: Sequence[tuple[Grant, tuple[str, ...]]]) -> list[list[Grant]]:
    """Return the grants that are connected through their keys."""
    group_of: dict[str, list[Grant]] = {}
    for grant, keys in keyed:
        merged = [grant]
        for group in {id(group_of[key]): group_of[key] for key in keys if key in group_of}.values():
            merged += group
        stale = {key for key, group in group_of.items() if any(group_of.get(one) is group for one in keys)}
        group_of.update(dict.fromkeys({*keys, *stale}, merged))
    return list({id(group): group for group in group_of.values()}.values())


def _pods(group: Iterable[Grant], known: Mapping[str, str]) -> tuple[str, ...]:
    names: set[str] = set()
    for grant in group:
        if pod := pod_of(grant):
            names.add(pod)
        elif grant.holder.api == CLAIM and not grant.pod_uids:
            names.add(f"a pod of {grant.holder}")
        elif grant.holder.api in (CLAIM, KUBELET):
            names |= {known.get(uid) or _unnamed(grant, uid) for uid in grant.pod_uids}
        else:
            names.add(str(grant.holder))
    return tuple(sorted(names))


def _unnamed(grant: Grant, uid: str) -> str:
    """Return what a pod is called of which only the UID and the claim are known."""
    return f"a pod of {grant.holder} (UID {uid})" if grant.holder.api == CLAIM else f"the pod with UID {uid}"
