"""What kubelet allows whole pods of hugepages, read from their cgroups before the agent raises the limits there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType

import structlog

from nodeagent.core.pinning.page_limits import allowed_to_pod
from nodeagent.core.pinning.plan import Situation
from nodeagent.errors import HostError
from nodeagent.host.cgroup.enforcer import Enforcer
from nodeagent.managers.pinning.containers import ContainerTable

log = structlog.get_logger()


class PodPages:
    """`allowed` has, by pod UID and page_bytes, the bytes that kubelet allows a pod in addition to what it holds. It is
    another object after each change."""

    def __init__(self, table: ContainerTable, kubelet_counts_claims: Callable[[], bool]) -> None:
        """Set up. `kubelet_counts_claims` returns whether kubelet's limits may include what claims hold."""
        self.allowed: Mapping[str, Mapping[int, int]] = MappingProxyType({})
        self._table = table
        self._counts = kubelet_counts_claims

    async def learn(self, enforcer: Enforcer, situation: Situation) -> bool:
        """Read the limits of pods that hold pages and are not known yet, and forget pods that are gone. Return whether
        anything changed."""
        pods = self._table.inhabited() if situation.has_pages else {}
        unknown = ((uid, containers) for uid, containers in pods.items() if uid not in self.allowed)
        new = {uid: pages for uid, containers in unknown if (pages := situation.pages_of(uid, containers))}
        kept = {uid: one for uid, one in self.allowed.items() if uid in self._table.pods}
        if not new and len(kept) == len(self.allowed):
            return False
        counted = self._counts()
        limits = await asyncio.to_thread(lambda: {uid: self._limits(enforcer, uid) for uid in new})
        known = {uid: found for uid, found in limits.items() if found is not None}
        ran = self._table.pod_ran_before
        read = {uid: allowed_to_pod(known[uid], new[uid], ran=ran(uid), counted=counted) for uid in known}
        self.allowed = MappingProxyType({**kept, **read})
        return True

    def _limits(self, enforcer: Enforcer, uid: str) -> Mapping[int, int] | None:
        """Return the limits of a pod's cgroup, or None if they cannot be read for the moment."""
        try:
            return enforcer.page_limits(self._table.pods.get(uid, ""))
        except HostError as error:
            log.warning("page-limits-not-read", pod=uid, error=str(error))
            return None
