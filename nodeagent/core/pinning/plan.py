"""What every pod and container is to be confined to, so that what is held exclusively is used by nobody else.

Pure: the machine, the ledger, kubelet's records of who was given what, and what containers there are, become one plan.

- A container that holds CPUs is confined to exactly these; one that holds pages or memory, to their NUMA nodes, with a
  limit of just these pages.
- Everybody else is confined to the shared pool: the CPUs that are neither reserved nor held. That is said of whole
  pods, so that it holds for sandboxes, for containers that nobody announced and for those still to come; containers
  beside one that holds CPUs in the same pod are confined one by one.
- A grant counts for a container only where kubelet gave it to that pod. What the container's environment says decides
  no more than which containers of the pod use which of its claims: it may have been forged.
- What a container holds is not known while neither the runtime nor its bundle has named it. Where its pod was given
  more than the named containers there have, the pod keeps all of that, and such a container is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.container import STOPPED, Container
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant
from nodeagent.core.model.inventory import Inventory

GRANT_VARIABLE = "NODEAGENT_GRANT_"
"""A container that uses a claim has a variable of this beginning for each grant; its value is the grant's id."""
GRANTED, LOCAL = "granted", "local"
"""Rules.memory."""

_NOTHING: Mapping[int, int] = MappingProxyType({})


def _none() -> Mapping[int, int]:
    return _NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What one container is to be confined to. None: it is left as it is."""

    grants: tuple[str, ...] = ()
    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    """NUMA nodes."""
    hugepage_limits: Mapping[int, int] = field(default_factory=_none)
    """Bytes by page_bytes."""
    held: CpuSet = EMPTY
    """The CPUs that it holds, online or not."""
    lost: CpuSet = EMPTY
    """Those among them that are offline, or outside the cpuset of all pods."""
    outside: CpuSet = EMPTY
    """The latter."""
    unproven: tuple[str, ...] = ()
    """Grants that it names and that kubelet is not known to have given to its pod."""

    @property
    def exclusive(self) -> bool:
        """Return whether the container holds CPUs."""
        return bool(self.held)


NO_PIN = Pin()
"""Of every container that holds nothing, unless something beside it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPin:
    """What a whole pod is to be confined to."""

    cpus: CpuSet | None = None
    hugepages_at_least: Mapping[int, int] = field(default_factory=_none)
    """Bytes by page_bytes that its limits have to let through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinPlan:
    """For everything there is."""

    shared: CpuSet = EMPTY
    """The CPUs of everybody who holds none."""
    pods: Mapping[str, PodPin] = field(default_factory=lambda: MappingProxyType({}))
    """By pod UID."""
    containers: Mapping[str, Pin] = field(default_factory=lambda: MappingProxyType({}))
    """By container id."""
    open: frozenset[str] = frozenset()
    """UIDs of pods with containers that may hold something and that nobody has named."""

    def pod(self, uid: str) -> PodPin:
        """A pod of which no container is known holds nothing."""
        return self.pods.get(uid) or PodPin(cpus=self.shared or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What of the configuration decides here."""

    memory: str = GRANTED
    confine_others: bool = True
    """False where kubelet's own CPU manager confines all others."""
    strict_reservation: bool = True
    """Whether those who hold no CPUs are kept off the reserved ones too."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """All that a plan follows from, but the containers."""

    inventory: Inventory
    ledger: Ledger
    given: Given = field(default_factory=lambda: MappingProxyType({}))
    rules: Rules = Rules()

    def plan(
        self,
        containers: Iterable[Container],
        sandboxes: Iterable[str] = (),
        unnamed: Collection[str] = frozenset(),
    ) -> PinPlan:
        """sandboxes: UIDs of pods that are there, also without a container. unnamed: ids of containers of which only
        the control group was seen."""
        every = tuple(containers)
        live = {one.id: one for one in every if one.state != STOPPED}
        bare = {one.id: self._own(one) for one in live.values()}
        open_ = self._open(every, unnamed) if unnamed else {}
        held = {uid: cpus for uid, cpus in open_.items() if cpus}
        for one, pin in bare.items():
            if pin.exclusive:
                held[live[one].pod_uid] = held.get(live[one].pod_uid, EMPTY) | pin.held
        paged = self._paged(live, bare)
        pins = {
            one: pin
            if one in unnamed and live[one].pod_uid in open_
            else self._beside(pin, live[one].pod_uid in held, paged.get(live[one].pod_uid, _NOTHING))
            for one, pin in bare.items()
        }
        uids = {*sandboxes, *(one.pod_uid for one in live.values())}
        special = {uid: self._pod(held.get(uid, EMPTY), paged.get(uid, _NOTHING)) for uid in held.keys() | paged.keys()}
        plain = self._pod(EMPTY, _NOTHING)
        pods = {uid: special.get(uid, plain) for uid in uids if uid}
        return PinPlan(
            shared=self.shared if self.rules.confine_others else EMPTY,
            pods=MappingProxyType(pods),
            containers=MappingProxyType(pins),
            open=frozenset(open_),
        )

    def _open(self, every: Iterable[Container], unnamed: Collection[str]) -> dict[str, CpuSet]:
        """The CPUs that unnamed containers may hold, by the UIDs of their pods."""
        pods: dict[str, list[Container]] = {}
        for one in every:
            if one.pod_uid in self._of_pods:
                pods.setdefault(one.pod_uid, []).append(one)
        found: dict[str, CpuSet] = {}
        for uid, containers in pods.items():
            known = {grant for one in containers for grant in self._own(one).grants}
            rest = [grant for grant in self._of_pods[uid] if grant.id not in known]
            if rest and any(one.id in unnamed and one.state != STOPPED for one in containers):
                found[uid] = union(grant.cpus for grant in rest)
        return found

    @functools.cached_property
    def _of_pods(self) -> Mapping[str, list[Grant]]:
        """All that pods are known to have been given, by UID; ids that kubelet's record has twice, as where it is older
        than a pod's end, are nobody's."""
        pods_of: dict[str, set[str]] = {}
        for (uid, _), keys in self.given.items():
            for key in keys:
                if (grant := self.ledger.by_id.get(key)) is not None:
                    pods_of.setdefault(grant.id, set()).add(uid)
        found: dict[str, list[Grant]] = {}
        for one in self.ledger.grants.values():
            given = pods_of.get(one.id, set())
            own = (one.holder.uid,) if one.holder.api == KUBELET else one.pods
            for uid in {*own, *(given if len(given) == 1 else ())}:
                found.setdefault(uid, []).append(one)
        return found

    def _own(self, container: Container) -> Pin:
        """The same, worked out once for what is known of a container."""
        known = self._owned.get(container.id)
        if known is None or known[0] is not container:
            self._owned[container.id] = known = container, self.pin(container)
        return known[1]

    @functools.cached_property
    def _owned(self) -> dict[str, tuple[Container, Pin]]:
        return {}

    def pin(self, container: Container) -> Pin:
        """What one container has for itself alone, whatever is beside it."""
        grants, unproven = self.grants_of(container)
        if not grants:
            return Pin(unproven=unproven) if unproven else NO_PIN
        held = union(one.cpus for one in grants)
        usable = held & self.inventory.cpus_usable
        return Pin(
            grants=tuple(one.id for one in grants),
            # Of CPUs that are all gone nothing is left to be confined to: not the CPUs of others.
            cpus=(usable or self.shared or None) if held else None,
            mems=self._mems(grants, usable),
            hugepage_limits=_limits(grants),
            held=held,
            lost=held - usable,
            outside=held & self.inventory.cpus_outside,
            unproven=unproven,
        )

    def grants_of(self, container: Container) -> tuple[tuple[Grant, ...], tuple[str, ...]]:
        """(the grants of a container, ids of those that it names and that are not proven to be its pod's).

        What one container of a pod was given and another one got again, as kubelet does with what an init container
        used, is of both."""
        given = self.given.get((container.pod_uid, container.name), frozenset())
        found = [grant for key in sorted(given) if (grant := self.ledger.by_id.get(key)) is not None]
        found += self._by_name.get((container.namespace, container.pod_name, container.name), ())
        uid, name = container.pod_uid, container.name
        found += self._imported.get((uid, name)) or self._imported.get((uid, "")) or []
        named = [self.ledger.grants[one] for one in named_by(container) if one in self.ledger.grants]
        found += [one for one in named if container.pod_uid in one.pods]
        mine = {one.id: one for one in found if self._agreed(one, container)}
        unproven = tuple(one.id for one in named if one.holder.api == CLAIM and one.id not in mine)
        return tuple(mine[one] for one in sorted(mine)), unproven

    def _agreed(self, grant: Grant, container: Container) -> bool:
        """Whether the ledger, where it knows a holder by name, means this pod."""
        holder = grant.holder
        unknown = holder.api != DEVICE_PLUGIN or not grant.confirmed or not container.pod_name
        return unknown or (holder.namespace, holder.pod) == (container.namespace, container.pod_name)

    # ---------------------------------------------------------------- of all

    @functools.cached_property
    def shared(self) -> CpuSet:
        """CPUs that pods can run on and that are neither reserved nor held; where none is left, the reserved ones."""
        free = self.inventory.cpus_usable - self.ledger.cpus_held
        return (free - self.ledger.reserved if self.rules.strict_reservation else free) or free

    @functools.cached_property
    def _by_name(self) -> Mapping[tuple[str, str, str], list[Grant]]:
        """Grants of containers that kubelet has listed."""
        found: dict[tuple[str, str, str], list[Grant]] = {}
        for one in self.ledger.grants.values():
            if one.holder.api == DEVICE_PLUGIN and one.confirmed:
                found.setdefault((one.holder.namespace, one.holder.pod, one.holder.container), []).append(one)
        return found

    @functools.cached_property
    def _imported(self) -> Mapping[tuple[str, str], list[Grant]]:
        """Grants taken over from kubelet's own managers, by (pod UID, container); "": what the rest of the pod has."""
        found: dict[tuple[str, str], list[Grant]] = {}
        for one in self.ledger.grants.values():
            if one.holder.api not in (CLAIM, DEVICE_PLUGIN):
                for name in one.holder.container.split(","):
                    found.setdefault((one.holder.uid, name), []).append(one)
        return found

    # ---------------------------------------------------------------- of one

    def _mems(self, grants: Iterable[Grant], cpus: CpuSet) -> CpuSet | None:
        """NUMA nodes of what is bound to nodes: pages first, or they could be taken where others were promised them."""
        bound = {pages.node for one in grants for pages in one.hugepages}
        bound |= {node for one in grants for node, _ in one.memory}
        if not bound and self.rules.memory == LOCAL:
            bound = {self.inventory.cpu_by_id[one].numa_node for one in cpus if one in self.inventory.cpu_by_id}
        there = CpuSet(node for node in bound if node in self.inventory.node_by_id)
        return there if there and any(self.inventory.node_by_id[one].memory_bytes for one in there) else None

    def _paged(self, live: Mapping[str, Container], pins: Mapping[str, Pin]) -> dict[str, dict[int, int]]:
        """Bytes by page_bytes that each pod's containers hold together, by pod UID."""
        found: dict[str, dict[int, int]] = {}
        for one, pin in pins.items():
            for page_bytes, limit in pin.hugepage_limits.items():
                of_pod = found.setdefault(live[one].pod_uid, {})
                of_pod[page_bytes] = of_pod.get(page_bytes, 0) + limit
        return found

    def _beside(self, pin: Pin, mixed: bool, paged: Mapping[int, int]) -> Pin:
        """A container's pin in its pod: who holds none of what another container there does is kept off it."""
        others = not pin.exclusive and mixed and self.rules.confine_others
        limits = {**dict.fromkeys(paged, 0), **pin.hugepage_limits}
        if not others and limits == pin.hugepage_limits:
            return pin
        return Pin(
            grants=pin.grants,
            cpus=self.shared if others else pin.cpus,
            mems=pin.mems,
            hugepage_limits=MappingProxyType(limits),
            held=pin.held,
            lost=pin.lost,
            outside=pin.outside,
            unproven=pin.unproven,
        )

    def _pod(self, held: CpuSet, paged: Mapping[int, int]) -> PodPin:
        cpus = self.shared | (held & self.inventory.cpus_usable) if self.rules.confine_others else EMPTY
        return PodPin(cpus=cpus or None, hugepages_at_least=MappingProxyType(dict(paged)))


def variable(grant_id: str) -> str:
    """The name of the variable that says that a container uses a grant of a claim."""
    return GRANT_VARIABLE + "".join(letter if letter.isalnum() else "_" for letter in grant_id).upper()


def named_by(container: Container) -> tuple[str, ...]:
    """Ids of grants that a container's environment names, each under its own variable."""
    env = container.env
    return tuple(sorted({value for name, value in env.items() if name == variable(value)}))


def _limits(grants: Iterable[Grant]) -> Mapping[int, int]:
    """Bytes by page_bytes: what several grants have of one size adds up."""
    limits: dict[int, int] = {}
    for pages in (pages for one in grants for pages in one.hugepages):
        limits[pages.page_bytes] = limits.get(pages.page_bytes, 0) + pages.pages * pages.page_bytes
    return MappingProxyType(limits)
