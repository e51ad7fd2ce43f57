"""The desired confinement of every pod and container, so that what is held exclusively is used by no other container.

Pure: the machine, the ledger, kubelet's records of what it gave to whom, and the existing containers yield one plan.

- A container that holds CPUs is confined to exactly these, or to those of its named pool if its claim names one
  (pools.py). One that holds pages or memory is confined to their NUMA nodes, with a limit of these pages and those that
  kubelet allows it.
- All others are confined to the shared pool: the CPUs that are neither reserved nor held. The plan sets this on whole
  pods, so that it also applies to sandboxes, to containers that were not announced and to future ones. Containers in
  the same pod as one that holds CPUs are confined individually.
- A grant counts for a container only if kubelet gave it to that pod. The container's environment, which may be forged,
  only determines which containers of the pod use which of its claims.
- What a container holds is unknown until the runtime or its bundle has named it. If its pod was given more than its
  named containers have, the pod keeps all of that, and such a container is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.witness import Given
from nodeagent.core.model.container import STOPPED, Container
from nodeagent.core.model.cpuset import EMPTY, CpuSet, union
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.pinning.page_limits import NO_PAGES, bytes_of, limits_beside, limits_of
from nodeagent.core.pinning.pools import NamedPools, pool_of
from nodeagent.core.pinning.threads import used_cpus

GRANT_VARIABLE = "NODEAGENT_GRANT_"
"""Prefix of a variable that a container using a claim has for each grant; the value is the grant's id."""
GRANTED, LOCAL = "granted", "local"
"""Values of Rules.memory."""


def _none() -> Mapping[int, int]:
    return NO_PAGES


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """The desired confinement of one container. A field that is None is left as it is."""

    grants: tuple[str, ...] = ()
    cpus: CpuSet | None = None
    mems: CpuSet | None = None
    """NUMA nodes."""
    hugepage_limits: Mapping[int, int] = msgspec.field(default_factory=_none)
    """Limit in bytes, by page_bytes."""
    held: CpuSet = EMPTY
    """The CPUs that it holds, online or not."""
    lost: CpuSet = EMPTY
    """The held CPUs that are offline or outside the cpuset of all pods."""
    outside: CpuSet = EMPTY
    """The held CPUs outside the cpuset of all pods."""
    hidden: CpuSet = EMPTY
    """The held CPUs that are left idle, as their siblings are used."""
    pools: tuple[str, ...] = ()
    """The named pools into which its claims bring CPUs, in order of name."""
    pool_cpus: CpuSet = EMPTY
    """The CPUs of these pools within its groups, online or not, with those that it holds itself."""
    unproven: tuple[str, ...] = ()
    """Grants that it names but that kubelet is not known to have given to its pod."""

    @property
    def alone(self) -> CpuSet:
        """Return the CPUs that it holds for itself."""
        return self.held - self.pool_cpus

    @property
    def exclusive(self) -> bool:
        """Return whether the container holds CPUs for itself."""
        return not self.held <= self.pool_cpus


NO_PIN = Pin()
"""The pin of every container that holds nothing, unless another container of its pod does."""


class PodPin(msgspec.Struct, frozen=True, kw_only=True):
    """The desired confinement of a whole pod."""

    cpus: CpuSet | None = None
    hugepages_at_least: Mapping[int, int] = msgspec.field(default_factory=_none)
    """Bytes that its limits must at least allow, by page_bytes."""


class PinPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The desired confinement of all pods and containers."""

    shared: CpuSet = EMPTY
    """The CPUs of all containers that hold none."""
    loose: CpuSet = EMPTY
    """The CPUs of pods that hold none, where their containers are confined by kubelet; empty if they are left as they
    are."""
    pods: Mapping[str, PodPin] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By pod UID."""
    containers: Mapping[str, Pin] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By container id."""
    open: frozenset[str] = frozenset()
    """UIDs of pods with containers that may hold something but have not been named."""

    def pod(self, uid: str) -> PodPin:
        """Return the pin of a pod; a pod without known containers holds nothing."""
        return self.pods.get(uid) or PodPin(cpus=self.shared or self.loose or None)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the configuration that affects the plan."""

    memory: str = GRANTED
    confine_others: bool = True
    """False if kubelet's own CPU manager confines all others."""
    kubelet_cpus: CpuSet | None = None
    """Where others are not confined although they were: CPUs that kubelet lets containers run on, which their pods get
    back with all that no grant holds. None if pods are left as they are."""
    strict_reservation: bool = True
    """Whether containers without exclusive CPUs are kept off the reserved CPUs too."""


class Situation(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything that a plan depends on, except the containers."""

    inventory: Inventory
    ledger: Ledger
    given: Given = msgspec.field(default_factory=lambda: MappingProxyType({}))
    rules: Rules = Rules()
    allowed: Mapping[str, Mapping[int, int]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Bytes of hugepages that kubelet allows whole pods in addition to what they hold, by pod UID and page_bytes. The
    limits of a pod that is missing stay as they are: once raised, they no longer show what kubelet had allowed."""

    def plan(
        self,
        containers: Iterable[Container],
        sandboxes: Iterable[str] = (),
        unnamed: Collection[str] = frozenset(),
    ) -> PinPlan:
        """Return the plan for these containers.

        sandboxes: UIDs of existing pods, including those without containers. unnamed: ids of containers of which only
        the cgroup was seen.
        """
        every = tuple(containers)
        live = {one.id: one for one in every if one.state != STOPPED}
        bare = {one.id: self._own(one) for one in live.values()}
        open_ = self._open(every, unnamed) if unnamed else {}
        held = {uid: cpus for uid, cpus in open_.items() if cpus}
        for one, pin in bare.items():
            if pin.held:
                held[live[one].pod_uid] = held.get(live[one].pod_uid, EMPTY) | pin.held | pin.pool_cpus
        paged = self._paged(live, bare)
        pins = {
            one: pin
            if one in unnamed and live[one].pod_uid in open_
            else self._beside(live[one], pin, live[one].pod_uid in held, paged.get(live[one].pod_uid, NO_PAGES))
            for one, pin in bare.items()
        }
        uids = {*sandboxes, *(one.pod_uid for one in live.values())}
        mixed = held.keys() | paged.keys()
        special = {uid: self._pod(uid, held.get(uid, EMPTY), paged.get(uid, NO_PAGES)) for uid in mixed}
        plain = self._pod("", EMPTY, NO_PAGES)
        pods = {uid: special.get(uid, plain) for uid in uids if uid}
        return PinPlan(
            shared=self.shared if self.rules.confine_others else EMPTY,
            loose=self.loose,
            pods=MappingProxyType(pods),
            containers=MappingProxyType(pins),
            open=frozenset(open_),
        )

    def _open(self, every: Iterable[Container], unnamed: Collection[str]) -> dict[str, CpuSet]:
        """Return the CPUs that unnamed containers may hold, by the UIDs of their pods."""
        pods: dict[str, list[Container]] = {}
        for one in every:
            if one.pod_uid in self._of_pods:
                pods.setdefault(one.pod_uid, []).append(one)
        found: dict[str, CpuSet] = {}
        for uid, containers in pods.items():
            known = {grant for one in containers for grant in self._own(one).grants}
            rest = [grant for grant in self._of_pods[uid] if grant.id not in known]
            if rest and any(one.id in unnamed and one.state != STOPPED for one in containers):
                found[uid] = union(grant.cpus | self._pools.cpus_of(grant) for grant in rest)
        return found

    @functools.cached_property
    def _of_pods(self) -> Mapping[str, list[Grant]]:
        """Return all grants that pods are known to have been given, by pod UID.

        Ids that kubelet's record has for several pods, for example because it is older than a pod's end, belong to
        none.
        """
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
        """Return the container's own pin, computed once per Container value."""
        known = self._owned.get(container.id)
        if known is None or known[0] is not container:
            self._owned[container.id] = known = container, self.pin(container)
        return known[1]

    @functools.cached_property
    def _owned(self) -> dict[str, tuple[Container, Pin]]:
        return {}

    def pin(self, container: Container) -> Pin:
        """Return a container's own pin, regardless of other containers in its pod."""
        grants, unproven = self.grants_of(container)
        if not grants:
            return Pin(unproven=unproven) if unproven else NO_PIN
        held = union(one.cpus for one in grants)
        pools = sorted({pool.name for one in grants if (pool := pool_of(one)) is not None})
        pool_cpus = union(self._pools.cpus_of(one) for one in grants) if pools else EMPTY
        used = union(used_cpus(self.inventory, one) for one in grants)
        usable = (used | pool_cpus) & self.inventory.cpus_usable
        return Pin(
            grants=tuple(one.id for one in grants),
            # If all its CPUs are gone, it is confined to the shared ones and not to those of others.
            cpus=(usable or self.shared or None) if held else None,
            mems=self._mems(grants, usable),
            hugepage_limits=limits_of(container, grants, self.allowed.get(container.pod_uid, NO_PAGES)),
            held=held,
            lost=held - self.inventory.cpus_usable,
            outside=held & self.inventory.cpus_outside,
            hidden=(held - used) & self.inventory.cpus_usable,
            pools=tuple(pools),
            pool_cpus=pool_cpus,
            unproven=unproven,
        )

    def grants_of(self, container: Container) -> tuple[tuple[Grant, ...], tuple[str, ...]]:
        """Return (the grants of a container, ids of grants that it names but that are not proven to be its pod's).

        A grant that was given to one container of a pod and then to another, as kubelet does with what an init
        container used, belongs to both.
        """
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

    @functools.cached_property
    def has_pages(self) -> bool:
        """Return whether any grant has hugepages."""
        return any(one.hugepages for one in self.ledger.grants.values())

    def pages_of(self, uid: str, containers: Iterable[Container]) -> tuple[Grant, ...]:
        """Return the grants of hugepages that a pod with these containers is known to have been given."""
        named = [self.ledger.grants[one] for container in containers for one in self._own(container).grants]
        found = {one.id: one for one in (*self._of_pods.get(uid, ()), *named) if one.hugepages}
        return tuple(found[one] for one in sorted(found))

    def _agreed(self, grant: Grant, container: Container) -> bool:
        """Return whether the grant is this pod's, as far as the ledger knows its holder by name."""
        holder = grant.holder
        unknown = holder.api != DEVICE_PLUGIN or not grant.confirmed or not container.pod_name
        return unknown or (holder.namespace, holder.pod) == (container.namespace, container.pod_name)

    # ---------------------------------------------------------------- all containers

    @functools.cached_property
    def shared(self) -> CpuSet:
        """Return the CPUs that pods can run on, without those held and, under strict_reservation, those reserved.

        If none is left, the reserved ones are included after all.
        """
        return self._free or self.inventory.cpus_usable - self.ledger.cpus_held

    @functools.cached_property
    def _free(self) -> CpuSet:
        free = self.inventory.cpus_usable - self.ledger.cpus_held
        return free - self.ledger.reserved if self.rules.strict_reservation else free

    @functools.cached_property
    def _pools(self) -> NamedPools:
        return NamedPools(self.inventory, self.ledger, self._free)

    @functools.cached_property
    def loose(self) -> CpuSet:
        """Return the CPUs of pods whose containers kubelet confines: never fewer than kubelet may give them."""
        kubelets = self.rules.kubelet_cpus
        if self.rules.confine_others or kubelets is None:
            return EMPTY
        return self.inventory.cpus_usable - (self.ledger.cpus_held - kubelets)

    @functools.cached_property
    def _by_name(self) -> Mapping[tuple[str, str, str], list[Grant]]:
        """Return the grants of containers that kubelet has listed."""
        found: dict[tuple[str, str, str], list[Grant]] = {}
        for one in self.ledger.grants.values():
            if one.holder.api == DEVICE_PLUGIN and one.confirmed:
                found.setdefault((one.holder.namespace, one.holder.pod, one.holder.container), []).append(one)
        return found

    @functools.cached_property
    def _imported(self) -> Mapping[tuple[str, str], list[Grant]]:
        """Return the grants imported from kubelet's own managers, by (pod UID, container), or (pod UID, "") for the
        rest of a pod."""
        found: dict[tuple[str, str], list[Grant]] = {}
        for one in self.ledger.grants.values():
            if one.holder.api not in (CLAIM, DEVICE_PLUGIN):
                for name in one.holder.container.split(","):
                    found.setdefault((one.holder.uid, name), []).append(one)
        return found

    # ---------------------------------------------------------------- one container

    def _mems(self, grants: Iterable[Grant], cpus: CpuSet) -> CpuSet | None:
        """Return the NUMA nodes of a container's hugepages and memory, or with memory "local" and neither, those of its
        CPUs.

        A container with hugepages has to be bound to their nodes, or it could take pages that are promised to others.
        Return None if no node with memory results.
        """
        bound = {pages.node for one in grants for pages in one.hugepages}
        bound |= {node for one in grants for node, _ in one.memory}
        if not bound and self.rules.memory == LOCAL:
            bound = {self.inventory.cpu_by_id[one].numa_node for one in cpus if one in self.inventory.cpu_by_id}
        there = CpuSet(node for node in bound if node in self.inventory.node_by_id)
        return there if there and any(self.inventory.node_by_id[one].memory_bytes for one in there) else None

    def _paged(self, live: Mapping[str, Container], pins: Mapping[str, Pin]) -> dict[str, Mapping[int, int]]:
        """Return the bytes that each pod's containers hold together, by pod UID and page_bytes. What two of them share
        counts once."""
        grants: dict[str, set[str]] = {}
        for one, pin in pins.items():
            grants.setdefault(live[one].pod_uid, set()).update(pin.grants)
        held = {uid: bytes_of(self.ledger.grants[one] for one in ids) for uid, ids in grants.items() if ids}
        return {uid: pages for uid, pages in held.items() if pages}

    def _beside(self, container: Container, pin: Pin, mixed: bool, paged: Mapping[int, int]) -> Pin:
        """Return a container's pin within its pod: it is kept off CPUs and pages that other containers there hold."""
        others = not pin.held and mixed and self.rules.confine_others
        allowed = self.allowed.get(container.pod_uid, NO_PAGES)
        limits = {**limits_beside(container, paged.keys() - pin.hugepage_limits.keys(), allowed), **pin.hugepage_limits}
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
            hidden=pin.hidden,
            pools=pin.pools,
            pool_cpus=pin.pool_cpus,
            unproven=pin.unproven,
        )

    def _pod(self, uid: str, held: CpuSet, paged: Mapping[int, int]) -> PodPin:
        others = self.shared if self.rules.confine_others else self.loose
        cpus = others | (held & self.inventory.cpus_usable) if others or self.rules.confine_others else EMPTY
        allowed = self.allowed.get(uid)
        least = {} if allowed is None else {size: held + allowed.get(size, 0) for size, held in paged.items()}
        return PodPin(cpus=cpus or None, hugepages_at_least=MappingProxyType(least))


def variable(grant_id: str) -> str:
    """Return the name of the variable that shows that a container uses a grant of a claim."""
    return GRANT_VARIABLE + "".join(letter if letter.isalnum() else "_" for letter in grant_id).upper()


def named_by(container: Container) -> tuple[str, ...]:
    """Return the ids of the grants that a container's environment names, each under its own variable."""
    env = container.env
    return tuple(sorted({value for name, value in env.items() if name == variable(value)}))
