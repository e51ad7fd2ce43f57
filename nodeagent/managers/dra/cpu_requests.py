"""Notes claims that give exclusive CPUs to pods that ask kubelet for none.

Such a pod has the lowest CPU weight, and where it requests nothing at all it is BestEffort: the first to be evicted and
to be killed when memory runs out. That is rarely meant, so it is reported once, by an Event on the pod, and stands
among the notes of the status. Whether a pod asks for CPUs is read from its cgroup, which kubelet makes before it has
claims prepared (SyncPod in pkg/kubelet/kubelet.go); a cgroup that is not there proves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import structlog

from nodeagent.core.events.happenings import PodRef, Report, no_cpu_request, pods_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.grant import CLAIM, Grant

MOST_WAITING, MOST_NAMED = 1000, 5
"""How many claims may wait to be looked at; how many a note names."""
log = structlog.get_logger()


class _Look(NamedTuple):
    """A claim with CPUs whose pods are to be looked at."""

    name: str
    """NAMESPACE/NAME of the claim."""
    cpus: CpuSet
    uids: tuple[str, ...]
    """Of its pods."""
    pods: tuple[PodRef, ...] = ()
    """Those to which an Event may be sent."""


class CpuRequests:
    """Looks at the pods of claims after they have been prepared."""

    def __init__(
        self,
        requests_cpus: Callable[[str], bool | None],
        ledger: Callable[[], Ledger],
        report: Report,
    ) -> None:
        """`requests_cpus` returns whether a pod, by its UID, asks kubelet for CPUs, or None if that is unknown; it may
        block."""
        self._requests_cpus = requests_cpus
        self._ledger = ledger
        self._report = report
        self._waiting: dict[str, _Look] = {}
        self._news = asyncio.Event()
        self._noted: dict[str, str] = {}
        """Claims with their CPUs, by UID."""

    def prepared(self, claim: Claim, grants: Sequence[Grant]) -> None:
        """Have the pods of a claim looked at."""
        cpus = union(one.cpus for one in grants)
        if not cpus or len(self._waiting) >= MOST_WAITING:
            return
        self._waiting[claim.ref.uid] = _Look(str(claim.ref), cpus, claim.pods_with(()), pods_of(claim))
        self._news.set()

    def notes(self) -> list[str]:
        """Return which claims give CPUs to pods that ask for none, in one sentence, or nothing if there is none."""
        held = {one.holder.uid for one in _of_claims(self._ledger())}
        self._noted = {uid: note for uid, note in self._noted.items() if uid in held}
        if not self._noted:
            return []
        names = sorted(self._noted.values())
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        return [f"pods with CPUs of claims request no CPU of kubelet: {', '.join(names[:MOST_NAMED])}{more}"]

    async def follow(self) -> None:
        """Look at the pods of all claims with CPUs, then at those of each one that is prepared, until cancelled."""
        for uid, look in _held(self._ledger()).items():
            self._waiting.setdefault(uid, look)
        while True:
            while self._waiting:
                uid = next(iter(self._waiting))
                await self._look(uid, self._waiting.pop(uid))
            self._news.clear()
            await self._news.wait()

    async def _look(self, uid: str, look: _Look) -> None:
        asks = await asyncio.to_thread(lambda: [self._requests_cpus(one) for one in look.uids])
        silent = {one for one, known in zip(look.uids, asks, strict=True) if known is False}
        known = uid in self._noted
        if not silent:
            self._noted.pop(uid, None)
            return
        self._noted[uid] = f"{look.name} ({look.cpus})"
        for pod in look.pods if not known else ():
            if pod.uid in silent:
                log.info("no-cpu-request", pod=f"{pod.namespace}/{pod.name}", claim=look.name, cpus=str(look.cpus))
                self._report(no_cpu_request(look.name, look.cpus, pod))


def _of_claims(ledger: Ledger) -> Iterable[Grant]:
    return (one for one in ledger.grants.values() if one.holder.api == CLAIM and one.cpus)


def _held(ledger: Ledger) -> dict[str, _Look]:
    """Return the claims with CPUs, by UID. Their pods' names are not known."""
    found: dict[str, _Look] = {}
    for one in _of_claims(ledger):
        before = found.get(one.holder.uid)
        cpus = one.cpus | before.cpus if before is not None else one.cpus
        found[one.holder.uid] = _Look(f"{one.holder.namespace}/{one.holder.claim}", cpus, one.pods)
    return found
