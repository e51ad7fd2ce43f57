"""The single owner of Inventory, Ledger and Health. Every change passes through here, one at a time, and is durable
before it becomes visible: it goes to the store first, then to memory, then to those waiting for news."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ParamSpec, TypeVar

import structlog
from msgspec.structs import replace

from nodeagent.core.deviceplugin import allocate as decide
from nodeagent.core.deviceplugin.devices import still_told
from nodeagent.core.deviceplugin.view import ResourceKind
from nodeagent.core.kubelet import imports
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.rebuild import Sources, account
from nodeagent.core.ledger.reconcile import Findings, compare
from nodeagent.core.ledger.release import Absences, Memory
from nodeagent.core.ledger.stable_ids import numbered, numbers_held
from nodeagent.core.ledger.witness import NO_WITNESSES, Given, Witnesses
from nodeagent.core.model import health as health_of
from nodeagent.core.model.device import Advertised, ContainerEdits
from nodeagent.core.model.grant import CLAIM, Grant, Holding
from nodeagent.core.model.health import NO_HEALTH, Evidence, Health
from nodeagent.core.model.inventory import Inventory, same_machine
from nodeagent.errors import PeerError, Refused
from nodeagent.state.audit import HEALTH, Happening
from nodeagent.state.claim_decisions import ClaimDecisions, Living
from nodeagent.state.decisions import Outcome
from nodeagent.state.others import OtherPlugins
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings

T = TypeVar("T")
P = ParamSpec("P")
List = Callable[[], Awaitable[tuple[Holding, ...]]]
"""Return what pods hold according to kubelet; PeerError if kubelet does not answer."""
Render = Callable[[Inventory, Grant], ContainerEdits]
"""Return what the container of a grant gets."""
log = structlog.get_logger()


async def none_lives(grants: Sequence[Grant]) -> Mapping[str, str]:
    """Return nothing: for a machine without pods."""
    return MappingProxyType({})


class Agent(ClaimDecisions):
    """Holds the state and makes every change to it."""

    def __init__(
        self,
        store: Store,
        inventory: Inventory,
        settings: AgentSettings,
        listing: List,
        *,
        living: Living = none_lives,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load what the store has; blocks. Raise StateError if it cannot be read. living: asks the kernel and the
        runtime whose pods are alive; their grants are not released on kubelet's word. clock: in seconds."""
        super().__init__(store, settings.reserved)
        self.settings = settings
        self.health: Health = NO_HEALTH
        inventory = still_told(Inventory(), inventory, self.ledger.devices_taken)
        self.inventory, self._numbers = numbered(inventory, numbers_held(self.ledger))
        self.event_s: float | None = None
        """When the kernel's event came that led to the inventory (time.monotonic), or None if none did."""
        self.conflicts: tuple[str, ...] = ()
        """What kubelet reports that contradicts the ledger, from its newest list only."""
        self.unaccounted: Mapping[str, str] = MappingProxyType({})
        """What the ledger may still lack, with the reason."""
        self.listed_at: float | None = None
        """When kubelet last listed what pods hold, in seconds since the epoch."""
        self._others = OtherPlugins()
        self._foreign: Mapping[str, Grant] = MappingProxyType({})
        """What other device plugins gave to pods."""
        self._ending: Mapping[str, Grant] = MappingProxyType({})
        """What still exists of grants that have ended, or is about to change; hold_back."""
        self._ending_by: dict[str, Mapping[str, Grant]] = {}
        """The same by who holds it back."""
        self._listing = listing
        self._living = living
        self._clock = clock
        self._granted: dict[str, float] = {}
        """When this process made each grant made since kubelet was last asked."""
        self._memory = Memory()
        """What earlier lists of kubelet have shown."""
        self._ended: Mapping[str, float] = MappingProxyType({})
        """Since when the pods of grants imported from kubelet have been gone, by grant id."""
        self.held_back: Mapping[str, str] = MappingProxyType({})
        """Why grants that kubelet does not list are not released, by grant id."""
        self.disputed: frozenset[str] = frozenset()
        """Ids of those among them whose pods are alive although kubelet has stopped listing them."""
        self._release_due_s: float | None = None

    # ---------------------------------------------------------------- the machine and its health

    def see(self, inventory: Inventory, event_s: float | None = None) -> bool:
        """Take a fresh snapshot. Return whether it shows anything new; if not, the old one is kept with all derived
        from it. event_s: when the kernel's event came that led to it (time.monotonic), or None if none did."""
        inventory, self._numbers = numbered(inventory, self._numbers)
        inventory = still_told(self.inventory, inventory, self.ledger.devices_taken)
        if same_machine(self.inventory, inventory):
            return False
        gone = self.inventory.device_by_id.keys() - inventory.device_by_id.keys()
        self.inventory = replace(inventory, generation=self.inventory.generation + 1)
        self.event_s = event_s
        strangers = self.health.keys() - inventory.device_by_id.keys()
        before, self.health = self.health, health_of.forget(self.health, strangers)
        log.info("inventory-changed", generation=self.inventory.generation, devices_gone=sorted(gone))
        self.revisions.inventory.bump()
        if before is not self.health:
            self.revisions.health.bump()
        return True

    def observe(self, evidence: Iterable[Evidence], unseen: Iterable[health_of.Said] = ()) -> None:
        """Record evidence of the health of devices that are there, and withdraw what sources no longer look at."""
        now, recover_s, there = self._clock(), self.settings.recover_s, self.inventory.device_by_id
        after = health_of.observe(self.health, [one for one in evidence if one.device in there], now, recover_s)
        self._take_health(health_of.withdraw(after, unseen, now, recover_s))

    def clear_health(self, device: str) -> bool:
        """Clear the latched causes of a device. Return whether it had any."""
        after = health_of.clear(self.health, device, self._clock())
        had = after is not self.health
        self._take_health(after)
        return had

    def recover_due(self) -> float | None:
        """Apply recoveries that are due. Return the seconds until the next one, or None if none is pending."""
        now = self._clock()
        self._take_health(health_of.recovered(self.health, now, self.settings.recover_s))
        due = health_of.next_recovery(self.health, self.settings.recover_s)
        return None if due is None else max(0.0, due - now)

    def _take_health(self, after: Health) -> None:
        if after is self.health:
            return
        changed = []
        for device, state in after.items():
            before = self.health.get(device)
            if state.state != (before.state if before is not None else health_of.HEALTHY):
                log.info("health-changed", device=device, state=state.state, reason=state.reason)
                changed.append(Happening(action=HEALTH, what=f"{device} {state.state}", why=state.reason))
        self.record_happenings(changed)
        self.health = after
        self.revisions.health.bump()

    def apply_settings(self, settings: AgentSettings) -> None:
        """Apply new settings; grants stay unchanged."""
        recovery_changed = settings.recover_s != self.settings.recover_s
        self.settings = settings
        if recovery_changed:
            self.revisions.health.bump()
        self.ledger = ledger_of.with_reserved(self.ledger, settings.reserved)
        self.revisions.ledger.bump()

    # ---------------------------------------------------------------- grants

    def advertised(self, resource: ResourceKind) -> tuple[Advertised, ...]:
        """Return every id of a resource. Ids of a disputed grant are held, not healthy: kubelet believes that they are
        free. While the ledger may lack decisions, ids outside it are unhealthy too, as none is known to be free."""
        shown = resource.advertised(self.inventory, self.ledger, self.health)
        if not (self.disputed or self.loss):
            return shown
        known, unknown = self.ledger.by_id, f"the ledger may lack decisions: {self.loss}"

        def now(one: Advertised) -> Advertised:
            grant = known.get((resource.name, one.id))
            if grant is not None and grant.id in self.disputed:
                return replace(one, healthy=False, held=one.healthy or one.held)
            if grant is None and self.loss and one.healthy:
                return replace(one, healthy=False, held=False, reason=unknown)
            return one

        return tuple(map(now, shown))

    def prefer(self, resource: ResourceKind, available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
        """Return the best `size` of the available ids. Kubelet knows better than an older list what was returned."""
        known = self.ledger.by_id
        stale = {known[resource.name, one].id for one in available if (resource.name, one) in known}
        ledger = ledger_of.release(self.ledger, stale)
        near = decide.near(self.inventory, self.ledger, time.time())
        return resource.prefer(self.inventory, ledger, available, must, size, near)

    async def allocate(
        self, resource: ResourceKind, containers: Sequence[Sequence[str]], render: Render, op: str
    ) -> list[ContainerEdits]:
        """Grant each container its ids durably, all or nothing, and return what each gets, as rendered. Raise Refused
        naming the conflicting holder."""
        return await self._decided_in_group(lambda newest: self._allocate(newest, resource, containers, render, op), op)

    async def release(self, ids: Sequence[str], op: str) -> tuple[Grant, ...]:
        """Release grants by id on an admin's request, and return those that existed. A claim is released as a whole:
        kubelet has no notion of half a claim."""
        return await self._decided(self._release, ids, op)

    async def reconcile(
        self,
        holdings: Sequence[Holding],
        resources: Sequence[ResourceKind],
        op: str,
        *,
        asked_at: float | None = None,
        witnesses: Witnesses = NO_WITNESSES,
    ) -> Findings:
        """Apply kubelet's list: name holders, release what is proven to be gone, adopt what was never recorded.

        asked_at: when kubelet was asked, by the agent's clock; the list cannot contain what was granted after that.
        """
        asked_at = self._clock() if asked_at is None else asked_at
        return await self._decided(self._reconcile, holdings, resources, op, asked_at, witnesses)

    async def release_ended(self, there: Container[str], op: str) -> tuple[Grant, ...]:
        """Release grants imported from kubelet's own managers whose pods are gone for good, and return them.

        there: UIDs of the pods that have a folder now. A pod is gone if two looks, patience.confirmed_s apart, miss it.
        """
        return await self._decided(self._release_ended, there, op)

    def begin_beside_others(self, given: Given, resources: Sequence[ResourceKind]) -> None:
        """Learn what other device plugins had given before the agent started, from kubelet's checkpoint. resources:
        what the agent is configured to serve."""
        served = {one.name: one for one in resources}
        self._take_foreign(self._others.begin(self.inventory, self.ledger, served, given))

    @property
    def look_again_s(self) -> float | None:
        """Return in how many seconds to ask kubelet for its list again, or None if not before something changes."""
        if self._granted or self._ended:
            return 0.0
        return self._release_due_s

    # ---------------------------------------------------------------- the ledger as a whole

    async def refresh(self) -> None:
        """Learn what another agent on the node has decided."""
        await self._decided(_nothing)

    async def rebuild(self, sources: Sources, resources: Sequence[ResourceKind], op: str) -> Mapping[str, str]:
        """Put back what a possibly incomplete ledger is shown to lack. Return what is still missing, and why."""
        return await self._decided(self._rebuild, sources, {one.name: one for one in resources}, op)

    async def prune(self, before: float) -> int:
        """Delete audit entries older than `before` (seconds since the epoch). Return how many."""
        return await self._decided(self._prune, before)

    # ---------------------------------------------------------------- inside a turn

    async def _rebuild(self, sources: Sources, resources: Mapping[str, ResourceKind], op: str) -> Mapping[str, str]:
        if not self.loss:
            return self.unaccounted
        found = account(self.ledger, sources, functools.partial(self._recorded, resources))
        await self._save(found.changes, found.ledger, op)
        for change in found.changes:
            log.warning("grant-put-back", grant=change.grant.id, holder=str(change.grant.holder), ids=change.grant.ids)
        if found.unaccounted != self.unaccounted:
            log.warning("ledger-lacks", missing=dict(found.unaccounted))
        self.unaccounted = found.unaccounted
        if not found.unaccounted:
            await self._on_disk(self._store.found_whole)
        self._hear_loss()
        return found.unaccounted

    def _recorded(
        self, resources: Mapping[str, ResourceKind], name: str, ids: tuple[str, ...], uid: str, container: str
    ) -> Grant | None:
        """Return a grant of what kubelet's checkpoint records for a container, or None if it is not served."""
        if name not in resources:
            return None
        stamp = self._stamp()
        grant = decide.grant_of(self.inventory, resources[name], ids, stamp.new_id(), stamp)
        return replace(grant, pods=(uid,))

    async def _allocate(
        self, newest: Ledger, resource: ResourceKind, containers: Sequence[Sequence[str]], render: Render, op: str
    ) -> Outcome[list[ContainerEdits]]:
        await self._make_way(newest, resource, containers)
        decision = decide.allocate(self.inventory, newest, resource, containers, self._stamp())
        if decision.changes:
            self._refuse_while_incomplete(f"devices of {resource.name}", sum(map(len, containers)))
        edits = [render(self.inventory, grant) for grant in decision.grants]

        def effect() -> None:
            self._restart_patience(decision.grants)
            self._tell(_say_granted, op, resource.name, decision.grants)

        return Outcome(result=edits, ledger=decision.ledger, changes=decision.changes, effect=effect)

    async def _make_way(self, newest: Ledger, resource: ResourceKind, containers: Sequence[Sequence[str]]) -> None:
        """Raise Refused if another container holds some of the ids and is alive or listed, or kubelet does not
        answer."""
        known, ids = newest.by_id, [one for container in containers for one in container]
        old = {one: grant for one in ids if (grant := known.get((resource.name, one))) is not None}
        if old:
            decide.check_ids(self.inventory, resource, containers)
            decide.refuse_living(resource, ids, old, await self._living(list(old.values())))
        held = {one: grant for one, grant in old.items() if grant.confirmed}
        if not held:
            return
        try:
            holdings = await self._listing()
        except PeerError as error:
            holder = next(iter(held.values())).holder
            why = f"cannot grant {', '.join(held)} of {resource.name}: last held by {holder}, and {error}"
            raise Refused(why, want=len(ids), free=len(ids) - len(held), unit="ids") from None
        for holding in holdings:
            decide.refuse_listed(resource, ids, holding)

    def _restart_patience(self, grants: Iterable[Grant]) -> None:
        """Give the requester all the time that a new pod has, even if the grant is an old one."""
        old, fresh = self._memory, {grant.id for grant in grants}
        self._granted.update(dict.fromkeys(fresh, self._clock()))
        missing = {one: since for one, since in old.missing.items() if one not in fresh}
        self._memory = replace(old, missing=missing, listed=old.listed - fresh, inherited=old.inherited - fresh)

    async def _release(self, ids: Sequence[str], op: str) -> tuple[Grant, ...]:
        named = [self.ledger.grants[one] for one in ids if one in self.ledger.grants]
        claims = {grant.holder.uid for grant in named if grant.holder.api == CLAIM}
        others = [grant for grant in self.ledger.grants.values() if grant.holder.uid in claims]
        gone = tuple({grant.id: grant for grant in (*named, *others)}.values())
        await self._let_go(gone, "an admin released it", op)
        return gone

    async def _let_go(self, gone: Sequence[Grant], why: str, op: str) -> None:
        """Release grants of the ledger for a reason."""
        await self._save(ledger_of.released(gone, why), ledger_of.release(self.ledger, [one.id for one in gone]), op)

    async def _reconcile(
        self,
        holdings: Sequence[Holding],
        resources: Sequence[ResourceKind],
        op: str,
        asked_at: float,
        witnesses: Witnesses,
    ) -> Findings:
        found = self._compare(holdings, {one.name: one for one in resources}, asked_at, witnesses)
        ledger = ledger_of.release(self.ledger, [grant.id for grant in found.released])
        ledger = ledger_of.amend(ledger, [grant for grant in found.confirmed if grant.id in ledger.grants])
        adoption, conflicts = decide.adopt(self.inventory, ledger, found.adopted)
        await self._save([*found.changes, *adoption.changes], adoption.ledger, op)
        self._take_absences(found.absences)
        self._granted = {one: at for one, at in self._granted.items() if at >= asked_at}
        self._say_conflicts((*conflicts, *(f"{h.namespace}/{h.pod}: {why}" for h, why in found.unknown)))
        self._observe_others(holdings, {one.name: one for one in resources}, asked_at, witnesses)
        self.listed_at = time.time()
        return replace(found, adopted=adoption.grants)

    def _observe_others(
        self, holdings: Sequence[Holding], served: Mapping[str, ResourceKind], asked_at: float, witnesses: Witnesses
    ) -> None:
        patience, see = self.settings.patience, self._others.observe
        self._take_foreign(see(self.inventory, self.ledger, served, holdings, witnesses, asked_at, patience))

    def hold_back(self, parts: Mapping[str, Grant], by: str = "partitions") -> None:
        """Grant nothing that these parts exclude, by grant id, as if another plugin held them: what still exists of
        grants that have ended, or is about to change. They replace those of the call before of the same manager, which
        `by` names."""
        if parts != self._ending_by.get(by, {}):
            self._ending_by[by] = dict(parts)
            self._ending = {id: one for some in self._ending_by.values() for id, one in some.items()}
            self._take_foreign(self._foreign)

    def _take_foreign(self, foreign: Mapping[str, Grant]) -> None:
        self._foreign = foreign
        before, self.ledger = self.ledger, ledger_of.with_foreign(self.ledger, {**foreign, **self._ending})
        if before is not self.ledger:
            self.revisions.ledger.bump()

    def _take_absences(self, found: Absences) -> None:
        for one in found.disputed - self.disputed:
            log.warning("grant-disputed", grant=one, holder=str(self.ledger.grants[one].holder), why=found.held[one])
        if found.disputed != self.disputed:
            self._tell(self.revisions.ledger.bump)
        self._memory, self.held_back, self.disputed = found.memory, found.held, found.disputed
        self._release_due_s = found.due_s

    async def _release_ended(self, there: Container[str], op: str) -> tuple[Grant, ...]:
        patience_s = self.settings.patience.confirmed_s
        found = imports.ended(self.ledger, there, self._ended, self._clock(), patience_s)
        living = await self._living(found.released)
        released = tuple(grant for grant in found.released if grant.id not in living)
        await self._let_go(released, imports.ENDED, op)
        self._ended = found.missing
        return released

    def _compare(
        self,
        holdings: Sequence[Holding],
        resources: Mapping[str, ResourceKind],
        asked_at: float,
        witnesses: Witnesses,
    ) -> Findings:
        return compare(
            self.ledger,
            holdings,
            self._memory,
            asked_at,
            self.settings.patience,
            resources,
            lambda holding: self._adoptable(resources[holding.resource], holding),
            young={one for one, at in self._granted.items() if at >= asked_at},
            witnesses=witnesses,
        )

    def _say_conflicts(self, conflicts: tuple[str, ...]) -> None:
        for one in conflicts:
            if one not in self.conflicts:
                log.warning("ledger-and-kubelet-disagree", why=one)
        self.conflicts = conflicts

    def _adoptable(self, resource: ResourceKind, holding: Holding) -> Grant:
        stamp = self._stamp()
        grant = decide.grant_of(self.inventory, resource, holding.ids, stamp.new_id(), stamp)
        names = {"namespace": holding.namespace, "pod": holding.pod, "container": holding.container}
        return replace(grant, holder=replace(grant.holder, **names), confirmed=True)

    async def _prune(self, before: float) -> int:
        return await self._on_disk(self._store.prune, before)


async def _nothing() -> None:
    """Decide nothing in a turn."""


def _say_granted(op: str, resource: str, grants: Iterable[Grant]) -> None:
    log.info("granted", op=op, resource=resource, grants=[f"{one.id}: {', '.join(one.ids)}" for one in grants])
