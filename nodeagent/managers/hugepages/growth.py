"""Hugepage pools that grow while claims need it, and shrink again.

Growing and deciding happen under one lock: pages grown for one claim are not taken by another. Pages grown for a
refused claim are returned immediately, those of a released claim after a delay, because pages once returned may not be
available again. If the agent is killed or the call cancelled in between, the record on disk says what to return.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import msgspec
import structlog

from nodeagent.config.hugepages import KEEP_FREE
from nodeagent.config.schema import Config
from nodeagent.core.dra.hugepage_demand import Amounts, Demand, concerned, demand, idle, is_granted
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.ledger.free import grantable
from nodeagent.core.model.claim import Claim
from nodeagent.core.model.quantity import format_size, parse_size
from nodeagent.core.model.topology import HugepagePool
from nodeagent.errors import HostError, StateError
from nodeagent.managers.hugepages.journal import Grown, Key
from nodeagent.managers.hugepages.pool_resizer import PoolResizer
from nodeagent.resources.catalog import page_limits
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

Explain = Callable[[str], str]
"""Return why the pools for a claim (by UID) did not grow as needed, or "" if they did or need not."""
log = structlog.get_logger()


class GrowthTiming(msgspec.Struct, frozen=True, kw_only=True):
    """Time limits. Kubelet waits 45 s for a claim, of which reading it may take 25."""

    poll_s: float = 2.0
    """How often pools are read: the kernel does not announce changes."""
    rest_s: float = 10.0
    """How long a grown pool must be unneeded before it shrinks."""
    lock_s: float = 6.0
    grow_s: float = 8.0


class PoolGrowth:
    """Grows pools for claims and shrinks them again. Building one changes nothing."""

    def __init__(
        self,
        agent: Agent,
        sizes: PoolResizer,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        pace: GrowthTiming,
    ) -> None:
        """Store the parts. `rescan` makes the agent take a new snapshot of the machine."""
        self._agent = agent
        self._sizes = sizes
        self._config = config
        self._rescan = rescan
        self._pace = pace
        self._idle_since: dict[Key, float] = {}
        self._not_given_back = Once("pages-not-given-back")

    # ---------------------------------------------------------------- what claims need

    @contextlib.asynccontextmanager
    async def growing(self, catalog: Catalog, claims: Sequence[Claim]) -> AsyncIterator[Explain]:
        """Grow pools by what the claims lack, as far as possible, while the caller decides on them.

        On exit, pages not needed by the claims that were granted are returned. If deciding failed or was cancelled,
        they are returned later.
        """
        limits = page_limits(self._config())
        if not concerned(self._agent.inventory, catalog, claims, limits):
            yield lambda uid: ""
            return
        async with contextlib.AsyncExitStack() as held:
            try:
                await held.enter_async_context(self._sizes.alone(self._pace.lock_s))
            except StateError as error:
                why = str(error)
                yield lambda uid: why
                return
            wants = await self._demand(catalog, claims)
            grown, missing = await self._grow(wants.growth)
            yield lambda uid: "; ".join(missing[key] for key in wants.wanted.get(uid, ()) if key in missing)
            granted = {one.ref.uid for one in claims if is_granted(self._agent.ledger, catalog, one)}
            await self._take_back(wants.unneeded(grown, granted))

    async def _demand(self, catalog: Catalog, claims: Sequence[Claim]) -> Demand:
        """Return what is lacking. If anything is, take a new snapshot of the machine and compute it again."""
        agent, limits = self._agent, page_limits(self._config())
        await agent.refresh()
        found = demand(agent.inventory, agent.ledger, catalog, claims, limits)
        if not found.growth:
            return found
        await self._rescan()
        return demand(agent.inventory, agent.ledger, catalog, claims, limits)

    async def _grow(self, growth: Amounts) -> tuple[Amounts, Mapping[Key, str]]:
        """Return (by how many pages each pool grew, why that is too little)."""
        grown, missing = dict[Key, int](), dict[Key, str]()
        until_s = time.monotonic() + self._pace.grow_s
        for key, pages in growth.items():
            grown[key], why = await self._grow_one(key, pages, until_s)
            if why:
                missing[key] = why
            log.info("pages-grown", **_names(key), wanted=pages, given=grown[key], reason=why)
        if growth:
            await self._rescan()
        return grown, missing

    async def _grow_one(self, key: Key, pages: int, until_s: float) -> tuple[int, str]:
        """Return by how many pages a pool grew, and why by no more, or ""."""
        keep = self._keep_free(key)
        try:
            given, left = await self._sizes.grow(key, pages, until_s - time.monotonic(), parse_size(keep))
        except HostError as error:
            return 0, str(error)
        if given == pages:
            return given, ""
        if left < parse_size(keep) + key[1]:
            kept = f"{left} bytes of NUMA node {key[0]} are available, of which {keep} stay free (keepFree)"
            return given, f"the pool was to grow by {pages} pages and grew by {given}: {kept}"
        return given, f"the pool was to grow by {pages} pages, the kernel gave {given}"

    async def _take_back(self, unneeded: Amounts) -> None:
        """Return unneeded pages, except those granted to others meanwhile. Failures are retried later."""
        pools = self.pools()
        spare = {key: min(pages, grantable(pools[key], self._agent.ledger)) for key, pages in unneeded.items()}
        for key, pages in spare.items():
            try:
                await self._shrink(key, pages, "refused")
            except HostError as error:
                log.warning("pages-not-given-back", **_names(key), error=str(error))

    async def _shrink(self, key: Key, pages: int, why: str) -> None:
        gone = await self._sizes.shrink(key, pages, self._configured(key))
        if gone:
            log.info("pages-given-back", **_names(key), pages=gone, why=why)
            await self._rescan()

    # ---------------------------------------------------------------- what claims no longer need

    async def give_back(self) -> None:
        """Shrink pools that have not been needed for a while to their original size. A failure is logged once."""
        try:
            await self._give_back_rested()
            self._not_given_back.clear()
        except (HostError, StateError) as error:
            self._not_given_back.report(str(error))

    async def _give_back_rested(self) -> None:
        found = self._needless(await self._sizes.grown())
        now = time.monotonic()
        self._idle_since = {key: self._idle_since.get(key, now) for key in found}
        for key in [key for key, since in self._idle_since.items() if now - since >= self._pace.rest_s]:
            async with self._sizes.alone(self._pace.lock_s):
                await self._give_back(key)

    async def _give_back(self, key: Key) -> None:
        """Shrink one pool, after taking into account what others decided and mapped meanwhile."""
        await self._agent.refresh()
        await self._rescan()
        found = self._needless(await self._sizes.grown())
        if (pages := found.get(key)) is None:
            return
        if pages:
            await self._shrink(key, pages, "needed no longer")
        else:
            await self._sizes.forget(key)

    def _needless(self, grown: Mapping[Key, Grown]) -> dict[Key, int]:
        """Return, for each pool whose growth can be undone completely, how many pages can be returned."""
        found, pools = dict[Key, int](), self.pools()
        for key in grown.keys() & pools.keys():
            now = pools[key].persistent_pages
            floor = max(grown[key].floor(now), self._configured(key))
            pages = idle(pools[key], self._agent.ledger, floor)
            if pages or now <= floor:
                found[key] = pages
        return found

    def _configured(self, key: Key) -> int:
        """Return the minimum size of a pool that the configuration demands, in pages."""
        rules = (one for one in self._config().hugepages if (one.node, parse_size(one.page_size)) == key)
        return max((one.pages for one in rules), default=0)

    def _keep_free(self, key: Key) -> str:
        """Return how much memory of a pool's node stays free when it grows, as configured."""
        rules = (one for one in self._config().hugepages if (one.node, parse_size(one.page_size)) == key)
        return next((one.keep_free for one in rules), KEEP_FREE)

    def pools(self) -> dict[Key, HugepagePool]:
        """Return the pools of the machine by NUMA node and page_bytes."""
        every = (pool for node in self._agent.inventory.numa_nodes for pool in node.hugepages)
        return {(pool.node, pool.page_bytes): pool for pool in every}


def _names(key: Key) -> dict[str, object]:
    return {"size": format_size(key[1]), "node": key[0]}
