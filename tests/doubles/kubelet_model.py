"""A model of kubelet's device manager and pod workers, as far as an agent can see them from outside, and of an agent
that goes by core.ledger.release: what is on disk, in cgroups and in memory, and what each of them forgets at a restart.

Nothing here runs or waits: a history is a list of steps drawn at random, checked after each. The behaviour is that of
pkg/kubelet of Kubernetes 1.36 and 1.37: devices are restored from the checkpoint; ended pods are cleared from it only
by an admission after "sources ready", folders and cgroups only by housekeeping after it; lists show a pod from the
moment that its source has delivered it until its worker has seen it end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.reconcile import compare
from nodeagent.core.ledger.release import Memory, Patience, lives
from nodeagent.core.ledger.witness import Given, Sight, Sighting, Witnesses, pods_by_checkpoint
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder, Holding

RESOURCE, CONTAINER = "r", "c"
IDS = tuple(f"id{number}" for number in range(5))
PATIENCE = Patience(unconfirmed_s=60, confirmed_s=5, unobserved_s=600)
ROUND_S = 1.0


@dataclass
class Pod:
    """One pod of the API server, or a static one, which kubelet has from a file."""

    uid: str
    name: str
    want: int
    static: bool = False
    deleting: bool = False


@dataclass
class Disk:
    """What outlives kubelet; cgroups do not outlive a reboot."""

    checkpoint: dict[str, set[str]] | None = None
    """Ids by pod UID; None: there is no file."""
    folders: set[str] = field(default_factory=set)
    cgroups: dict[str, bool] = field(default_factory=dict)
    """Whether a pod's cgroup has processes, by UID."""
    started_with: dict[str, set[str]] = field(default_factory=dict)
    """Ids that a pod's containers were started with, by UID: they keep them although kubelet may forget."""


@dataclass
class Kubelet:
    """One process."""

    number: int
    devices: dict[str, set[str]]
    """Ids by pod UID: what the device manager has given, restored from the checkpoint."""
    ready: bool = False
    """Every source has delivered."""
    pods: dict[str, Pod] = field(default_factory=dict)
    """What the pod manager has, by UID."""
    admitted: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    """UIDs of the pods that their workers have seen end."""

    def active(self) -> list[Pod]:
        return [one for one in self.pods.values() if one.uid not in self.ended]


@dataclass
class Sent:
    """A list, and when it was asked for."""

    asked_at: float
    kubelet: int
    pods: tuple[Pod, ...]
    holdings: tuple[Holding, ...]


class World:
    """A node, its kubelet, its agent and the API server."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 1000.0
        self.api: dict[str, Pod] = {}
        self.api_silent = False
        self.disk = Disk()
        self.kubelets = self.boots = 1
        self.kubelet: Kubelet | None = Kubelet(number=1, devices={})
        self.sees_cgroups = self.draw.random() < 0.7
        self.sees_runtime = self.draw.random() < 0.6
        self.sees_folders = self.draw.random() < 0.6
        self.runtime_away = False
        self.ledger, self.memory = Ledger(), Memory()
        self.granted: dict[str, float] = {}
        self.made = 0
        self.sent: Sent | None = None
        self.last: tuple[str, ...] = ()
        self.counts: dict[str, int] = {}

    @property
    def blind(self) -> bool:
        """Whether kubelet alone can be asked."""
        return not self.sees_cgroups and (not self.sees_runtime or self.runtime_away)

    # ---------------------------------------------------------------- the cluster

    def create(self) -> None:
        """A pod of a new UID; its name may be one that was used before."""
        self.made += 1
        name = f"p{self.draw.randrange(3)}"
        static = self.draw.random() < 0.15
        name = f"{name}-node" if static else name
        if all(one.name != name for one in self.api.values()):
            uid = f"u{self.made}"
            self.api[uid] = Pod(uid=uid, name=name, want=self.draw.choice((0, 1, 1, 2)), static=static)

    def delete(self) -> None:
        if self.api:
            pod = self.api[self.draw.choice(list(self.api))]
            pod.deleting = True
            if self.draw.random() < 0.3:
                del self.api[pod.uid]  # forced, or a static pod's file removed

    def api_goes_silent(self) -> None:
        self.api_silent = not self.api_silent

    # ---------------------------------------------------------------- kubelet

    def kubelet_stops(self) -> None:
        self.kubelet = None

    def kubelet_starts(self) -> None:
        self.kubelets += 1
        devices = {uid: set(ids) for uid, ids in (self.disk.checkpoint or {}).items()}
        self.kubelet = Kubelet(number=self.kubelets, devices=devices)

    def kubelet_restarts(self) -> None:
        self.kubelet_stops()
        # The agent reads each new checkpoint within moments. Of one that is lost before, it is not known whose it was.
        read = {(uid, one) for grant in self.ledger.grants.values() for uid in grant.pods for one in grant.ids}
        written = {(uid, one) for uid, ids in (self.disk.checkpoint or {}).items() for one in ids}
        if self.draw.random() < 0.1 and written <= read:
            self.disk.checkpoint = None
        if self.draw.random() < 0.8:
            self.kubelet_starts()

    def kubelet_works(self) -> None:
        """One step of one of its loops."""
        if self.kubelet is None:
            self.kubelet_starts()
            return
        self.draw.choice((self._deliver, self._deliver, self._sync, self._sync, self._sync, self._clean))(self.kubelet)

    def _deliver(self, kubelet: Kubelet) -> None:
        """A pod reaches the pod manager and is admitted, one at a time; after the last one all sources are ready:
        kubelet notes a source only when it has gone through its first update."""
        for pod in [*self.api.values()]:
            if pod.uid not in kubelet.pods and (pod.static or not self.api_silent):
                kubelet.pods[pod.uid] = pod
                self._admit(kubelet, pod)
                return
        if not self.api_silent:
            kubelet.ready = True

    def _admit(self, kubelet: Kubelet, pod: Pod) -> None:
        if pod.want == 0 or pod.uid in kubelet.devices or pod.deleting:
            kubelet.admitted.add(pod.uid)
            return
        if kubelet.ready:
            active = {one.uid for one in kubelet.active()}
            kubelet.devices = {uid: ids for uid, ids in kubelet.devices.items() if uid in active}
        taken = {one for ids in kubelet.devices.values() for one in ids}
        free = [one for one in IDS if one not in taken and one not in self.unhealthy()]
        if len(free) < pod.want:
            kubelet.ended.add(pod.uid)
            return
        ids = tuple(self.draw.sample(free, pod.want))
        if not self.allocate(kubelet, ids):
            kubelet.ended.add(pod.uid)
            return
        kubelet.devices[pod.uid] = set(ids)
        self.disk.folders.add(pod.uid)
        self.disk.checkpoint = {uid: set(ids) for uid, ids in kubelet.devices.items()}
        kubelet.admitted.add(pod.uid)

    def _sync(self, kubelet: Kubelet) -> None:
        """One pod's worker goes one step on."""
        pods = [one for one in kubelet.pods.values() if one.uid in kubelet.admitted or one.uid in self.disk.cgroups]
        if not pods:
            return
        pod, cgroups = self.draw.choice(pods), self.disk.cgroups
        known = not self.api_silent and pod.uid not in self.api
        if pod.uid in kubelet.ended:
            cgroups.pop(pod.uid, None)
        elif pod.deleting or known:
            if cgroups.get(pod.uid):
                cgroups[pod.uid] = False
            else:
                kubelet.ended.add(pod.uid)
        elif pod.uid not in self.disk.folders:
            self.disk.folders.add(pod.uid)
        elif not cgroups.get(pod.uid):
            cgroups[pod.uid] = pod.uid in cgroups
            self.disk.started_with[pod.uid] = set(kubelet.devices.get(pod.uid, ()))

    def _clean(self, kubelet: Kubelet) -> None:
        """Housekeeping: what is in no source any longer is killed, then cleared away."""
        if not kubelet.ready or self.api_silent:
            return
        for uid in [uid for uid in (*self.disk.folders, *self.disk.cgroups) if uid not in self.api]:
            if self.disk.cgroups.get(uid):
                self.disk.cgroups[uid] = False
                kubelet.ended.add(uid)
            else:
                self.disk.cgroups.pop(uid, None)
                self.disk.folders.discard(uid)
                kubelet.pods.pop(uid, None)
        for uid in [uid for uid, pod in self.api.items() if pod.deleting and uid in kubelet.ended]:
            del self.api[uid]
        for uid in [uid for uid in kubelet.pods if uid not in self.api and uid in kubelet.ended]:
            del kubelet.pods[uid]

    # ---------------------------------------------------------------- the machine

    def sandbox_dies(self) -> None:
        for uid in self.disk.cgroups:
            if self.draw.random() < 0.5:
                self.disk.cgroups[uid] = False

    def runtime_restarts(self) -> None:
        self.runtime_away = not self.runtime_away

    def reboot(self) -> None:
        self.boots += 1
        self.disk.cgroups.clear()
        self.kubelet_stops()
        self.agent_restarts()

    # ---------------------------------------------------------------- the agent

    def agent_restarts(self) -> None:
        self.memory, self.granted, self.sent = Memory(), {}, None

    def unhealthy(self) -> set[str]:
        return set()

    def allocate(self, kubelet: Kubelet, ids: tuple[str, ...]) -> bool:
        """What Agent.allocate does with ids that others hold: who lives or is listed keeps them."""
        old = {self.ledger.by_id[RESOURCE, one] for one in ids if (RESOURCE, one) in self.ledger.by_id}
        witnesses = self.witnesses(kubelet.number, (), self.checkpoint())
        listed = {one for holding in self.list_of(kubelet).holdings for one in holding.ids}
        if any(lives(one, witnesses) or (one.confirmed and listed.intersection(ids)) for one in old):
            self.counts["refused"] = self.counts.get("refused", 0) + 1
            return False
        for one in old:
            self.check_release(one)
        self.made += 1
        holder = Holder(api=DEVICE_PLUGIN, resource=RESOURCE)
        grant = Grant(id=f"g{self.made}", holder=holder, ids=ids, boot_id=str(self.boots))
        self.ledger = ledger_of.grant(ledger_of.release(self.ledger, [one.id for one in old]), grant)
        self.granted[grant.id] = self.now
        self.counts["granted"] = self.counts.get("granted", 0) + 1
        return True

    def list_of(self, kubelet: Kubelet) -> Sent:
        pods = tuple(kubelet.active())
        holdings = tuple(
            Holding(namespace="ns", pod=one.name, container=CONTAINER, resource=RESOURCE, ids=tuple(sorted(ids)))
            for one in pods
            if (ids := kubelet.devices.get(one.uid))
        )
        return Sent(self.now, kubelet.number, pods, holdings)

    def ask(self) -> None:
        """The list of this moment; what is made of it comes later, or never."""
        self.sent = self.list_of(self.kubelet) if self.kubelet is not None else None

    def reconcile(self) -> None:
        """What is made of the list that was asked for last."""
        if self.sent is None or self.kubelet is None or self.kubelet.number != self.sent.kubelet:
            return
        sent, self.sent = self.sent, None
        witnesses = self.witnesses(sent.kubelet, sent.pods, self.checkpoint())
        young = {one for one, at in self.granted.items() if at >= sent.asked_at}
        found = compare(self.ledger, sent.holdings, self.memory, sent.asked_at, PATIENCE, (), _never, young, witnesses)
        for one in found.released:
            self.check_release(one)
        confirmed = [one for one in found.confirmed if one.id in self.ledger.grants]
        self.ledger = ledger_of.amend(self.ledger, confirmed)
        self.ledger = ledger_of.release(self.ledger, [one.id for one in found.released])
        self.memory = found.absences.memory
        self.granted = {one: at for one, at in self.granted.items() if at >= sent.asked_at}
        self.counts["released"] = self.counts.get("released", 0) + len(found.released)

    def round(self) -> None:
        self.ask()
        self.reconcile()

    def time_goes_on(self) -> None:
        self.now += self.draw.choice((0.5, 1, 3, 8, 30, 100))

    def checkpoint(self) -> Given | None:
        if self.disk.checkpoint is None:
            return None
        every = self.disk.checkpoint.items()
        return {(uid, CONTAINER): frozenset((RESOURCE, one) for one in ids) for uid, ids in every}

    def witnesses(self, kubelet: int, pods: tuple[Pod, ...], given: Given | None) -> Witnesses:
        holders = pods_by_checkpoint(self.ledger.grants.values(), given)
        return Witnesses(
            kubelet=kubelet,
            knows_pods=any(not one.name.endswith("-node") for one in pods),
            boot_id=str(self.boots),
            given=given,
            folders=frozenset(self.disk.folders) if self.sees_folders else None,
            sights={uid: self._sighting(uid) for uids in holders.values() for uid in uids},
            pods_of=holders,
        )

    def _sighting(self, uid: str) -> Sighting:
        alive, there = self.disk.cgroups.get(uid, False), uid in self.disk.cgroups
        if self.sees_cgroups:
            return Sighting(Sight.LIVES if alive else Sight.EMPTY if there else Sight.ABSENT, "it runs")
        if self.sees_runtime and not self.runtime_away:
            return Sighting(Sight.LIVES if alive else Sight.STOPPED, "it runs")
        return Sighting(Sight.UNSEEN)

    # ---------------------------------------------------------------- what must hold

    def users(self) -> Iterator[tuple[str, frozenset[str]]]:
        """(pod UID, ids) of every pod that runs, and of those that kubelet starts again without asking."""
        yield from ((uid, frozenset(self.disk.started_with[uid])) for uid, runs in self.disk.cgroups.items() if runs)
        given = self.kubelet.devices if self.kubelet is not None else self.disk.checkpoint or {}
        for uid, ids in given.items():
            coming = uid in self.api and not self.api[uid].deleting
            over = self.kubelet is not None and uid in self.kubelet.ended
            if coming and not over:
                yield uid, frozenset(ids)

    def check_release(self, grant: Grant) -> None:
        """A pod that cannot be seen may be taken for gone, at kubelet's word or after a long time; no other ever."""
        if self.blind:
            for ids in self.disk.started_with.values():
                ids.difference_update(grant.ids)
            return
        for uid in grant.pods:
            assert not self.disk.cgroups.get(uid), f"{grant.id} of {uid} is released while it runs"
        for uid, ids in self.users():
            assert not ids.intersection(grant.ids), f"{grant.id} is released while {uid} has {sorted(ids)}"

    def check(self) -> None:
        """What runs is in the ledger."""
        if self.blind:
            return
        held = {one for _, one in self.ledger.by_id}
        for uid, ids in self.users():
            assert ids <= held, f"{uid} uses {sorted(ids - held)}, which no grant holds"

    # ---------------------------------------------------------------- histories

    def step(self) -> None:
        weights = {
            self.create: 8, self.delete: 6, self.api_goes_silent: 2, self.kubelet_restarts: 3, self.kubelet_works: 45,
            self.sandbox_dies: 2, self.runtime_restarts: 2, self.reboot: 0.5, self.agent_restarts: 1.5, self.round: 14,
            self.ask: 4, self.reconcile: 4, self.time_goes_on: 14,
        }  # fmt: skip
        (chosen,) = self.draw.choices(list(weights), list(weights.values()))
        chosen()
        self.check()

    def settle(self) -> None:
        """Everybody is back and has all the time in the world; a pod comes, another one where that is refused, and one
        more when everything else has ended: its admission clears the checkpoint."""
        self.api_silent = self.runtime_away = False
        for number in range(200):
            self.kubelet_works()
            if number % 8 == 0:
                ended = self.kubelet.ended if self.kubelet is not None else set[str]()
                if number == 120 or ended.intersection(self.last):
                    self.last = ()
                if not self.last:
                    self.last = (f"last{number}",)
                    self.api[self.last[0]] = Pod(uid=self.last[0], name=self.last[0], want=1)
                self.round()
                self.now += PATIENCE.unobserved_s / 5
            self.check()
        for _ in range(3):
            self.round()
            self.now += PATIENCE.unobserved_s

    def forgotten(self) -> set[str]:
        """Ids of grants of which no pod is left. One that kubelet gave other ids after it had lost its checkpoint may
        still run with the old ones: it keeps both."""
        there = {uid for uid in self.api if self.kubelet is None or uid not in self.kubelet.ended}
        return {one for grant in self.ledger.grants.values() if not there.intersection(grant.pods) for one in grant.ids}


def _never(holding: Holding) -> Grant:
    raise AssertionError(f"{holding} was never recorded")
