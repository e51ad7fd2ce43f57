"""How many more pods fit: copies of a pod are admitted one after the other, as kubelet and the device plugin do it.

The scheduler counts for each resource what the containers request together, or what an init container requests with the
sidecars before it, if that is more. Kubelet allocates container by container: later containers get the ids of init
containers that have ended, before others; those of sidecars are not given on. It asks which ids to prefer and has them
allocated: both is answered here by what answers in the agent. Kubelet takes the resources of a container in any order,
this takes them by name. Source: Kubernetes 1.37, k8s.io/component-helpers/resource (PodRequests) and
pkg/kubelet/cm/devicemanager (Allocate, devicesToAllocate).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from nodeagent.core.deviceplugin.allocate import Stamp, allocate, near
from nodeagent.core.deviceplugin.view import ResourceKind
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Advertised
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError, Refused

MOST_COPIES = 1000
"""No forecast counts further: kubelet admits far fewer pods."""
Tick = Callable[[int], None]
"""Called with the number of copies so far."""


def no_tick(copies: int) -> None:
    """Show no progress."""


class ContainerDemand(msgspec.Struct, frozen=True, kw_only=True):
    """What one container requests of the device plugin, by full name of the resource."""

    name: str
    amounts: Mapping[str, int]
    init: bool = False
    sidecar: bool = False
    """An init container that is restarted: it runs alongside the others."""


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """How many copies fit, and why not one more."""

    count: int
    why: str
    """Why the next copy does not fit; "" if as many as were asked for do."""
    ledger: Ledger
    """With all copies."""


class PodNode(msgspec.Struct, frozen=True, kw_only=True):
    """What copies of a pod are admitted to."""

    inventory: Inventory
    """With pages that holders use counted as granted only (hypothetical.untouched)."""
    health: Health
    resources: Mapping[str, ResourceKind]
    """By full name."""
    now_s: float
    """Seconds since the epoch."""


def forecast_pods(
    node: PodNode,
    ledger: Ledger,
    containers: Sequence[ContainerDemand],
    most: int = MOST_COPIES,
    tick: Tick = no_tick,
) -> Forecast:
    """Return how many more pods with these containers fit, at most `most`. Raise InputError for an unknown resource."""
    if unknown := sorted(total_of(containers).keys() - node.resources.keys()):
        raise InputError(f"cannot forecast {', '.join(unknown)}: the agent does not serve it through the device plugin")
    if not any(total_of(containers).values()):
        raise InputError("cannot forecast a pod that requests nothing of the agent")
    for count in range(most):
        tick(count)
        try:
            ledger = _Admission(node, ledger, count).admit(containers)
        except Refused as refusal:
            return Forecast(count=count, why=str(refusal), ledger=ledger)
    return Forecast(count=most, why="", ledger=ledger)


def total_of(containers: Iterable[ContainerDemand]) -> Counter[str]:
    """Return what the scheduler counts for a pod, by resource."""
    running, sidecars, largest = Counter[str](), Counter[str](), Counter[str]()
    for one in containers:
        if one.init and not one.sidecar:
            largest |= sidecars + Counter(one.amounts)
            continue
        running.update(one.amounts)
        if one.sidecar:
            sidecars.update(one.amounts)
    return running | largest


class _Admission:
    """One copy of a pod on its way through the scheduler and kubelet."""

    def __init__(self, node: PodNode, ledger: Ledger, number: int) -> None:
        self._node = node
        self._ledger = ledger
        self._number = number
        self._made = 0
        self._reusable: dict[str, set[str]] = {}

    def admit(self, containers: Sequence[ContainerDemand]) -> Ledger:
        """Return the ledger with the pod. Raise Refused if the scheduler or kubelet would."""
        for name, want in sorted(total_of(containers).items()):
            self._schedule(name, want)
        for one in containers:
            for name, want in sorted(one.amounts.items()):
                if want:
                    self._allocate(one, name, want)
        # The next copy is admitted later: it is not taken for a part of this pod.
        return ledger_of.amend(self._ledger, [replace(one, confirmed=True) for one in self._new()])

    def _schedule(self, name: str, want: int) -> None:
        """Raise Refused if the scheduler finds too few: the healthy ids less what pods have requested."""
        held = sum(resource == name for resource, _ in self._ledger.by_id)
        free = sum(one.healthy for one in self._advertised(name)) - held
        if want > free:
            why = f"cannot schedule one more: it requests {want} of {name}, {max(0, free)} are free"
            raise Refused(why, want=want, free=max(0, free), unit="ids")

    def _advertised(self, name: str) -> Sequence[Advertised]:
        return self._node.resources[name].advertised(self._node.inventory, self._ledger, self._node.health)

    def _allocate(self, container: ContainerDemand, name: str, want: int) -> None:
        ids = self._choose(name, want)
        stamp = Stamp(new_id=self._id, at=self._node.now_s)
        self._ledger = allocate(self._node.inventory, self._ledger, self._node.resources[name], [ids], stamp).ledger
        reusable = self._reusable.setdefault(name, set())
        if container.init and not container.sidecar:
            reusable.update(ids)
        else:
            reusable.difference_update(ids)

    def _choose(self, name: str, want: int) -> list[str]:
        """Return the ids that kubelet allocates: first those of ended init containers, the rest as it is advised."""
        again = sorted(self._reusable.get(name, ()))[:want]
        if len(again) == want:
            return again
        used = {id for resource, id in self._ledger.by_id if resource == name}
        free = [one.id for one in self._advertised(name) if one.healthy and one.id not in used]
        if len(free) < want - len(again):
            why = f"cannot admit one more: {want - len(again)} of {name} are needed, {len(free)} are free"
            raise Refused(why, want=want, free=len(free), unit="ids")
        node = self._node
        given = near(node.inventory, self._ledger, node.now_s)
        return node.resources[name].prefer(node.inventory, self._ledger, [*again, *free], again, want, given)

    def _id(self) -> str:
        self._made += 1
        return f"forecast-{self._number}-{self._made}"

    def _new(self) -> list[Grant]:
        mine = f"forecast-{self._number}-"
        return [one for id, one in self._ledger.grants.items() if id.startswith(mine)]
