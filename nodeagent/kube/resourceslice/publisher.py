"""Keeps this node's ResourceSlices equal to the pools: created late, edited or deleted by others, refused, forgotten.

The stored state is known from one list and the watch that follows it; a slice is written only where it differs from the
pools. An unreachable server costs only freshness: it is retried indefinitely, and the status reports it. A pool that is
refused or breaks a rule never prevents another from being published.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog
from msgspec.structs import replace

from nodeagent.aio.revision import Revision
from nodeagent.core.dra.node_allocatable import FEATURE
from nodeagent.core.dra.pool import ALL_FEATURES, NO_FEATURES, Features, Pool
from nodeagent.errors import NodeagentError, PeerError
from nodeagent.kube.resourceslice.api import Api, Blind, NodeSight, SliceEvent, SliceList
from nodeagent.kube.resourceslice.pool_writer import (
    DEFAULT_PACE,
    FAILED,
    PUBLISHED,
    WAITING,
    PoolLane,
    PoolStanding,
    PublishPace,
    PublishState,
    retry_after_s,
    uid,
    version,
)
from nodeagent.kube.resourceslice.render import (
    Object,
    Owner,
    SlicePlan,
    belongs,
    counts,
    lists,
    lost_features,
    plan,
    seen_features,
    strays,
)
from nodeagent.kube.resourceslice.withholding import Withholding
from nodeagent.telemetry.event_timer import EventTimer

_FORBIDDEN, _NOT_FOUND, _INVALID = 403, 404, 422
"""Status of a write that is not allowed; of one whose slice was deleted after it was planned; of one that breaks a
rule, such as a list without its feature gate (Kubernetes 1.36 and later take its values away and refuse the rest)."""
_NO_LISTS = replace(ALL_FEATURES, lists=False)
_OUT_OF_DATE = (409, 410)
"""Another writer was faster; not logged if it happens only once."""
_NEVER_S = float("inf")
log = structlog.get_logger()


class _NoNodeError(PeerError):
    """The Node object does not exist."""


class PublicationState(msgspec.Struct, frozen=True, kw_only=True):
    """Publication status of all pools."""

    state: PublishState = WAITING
    reason: str = ""
    """What is being waited for, or why the last attempt failed."""
    since_unix_s: float = 0.0
    """When the state began."""
    pools: tuple[PoolStanding, ...] = ()
    lost: tuple[str, ...] = ()
    """Names of Features that the server does not keep."""
    kept: tuple[str, ...] = ()
    """Names of Features that the server is known to keep: of the others that are not lost, nothing was published since
    the start."""
    broken: tuple[str, ...] = ()
    """Rules that our own slices would break; the offending devices or pools are not written."""
    withheld: str = ""
    """Why the server refuses to store what claims take of the Node's resources; the pools are published without it."""
    writes: int = 0
    """Requests that create, replace or delete a slice since the start."""


class Publisher:
    """Publishes pools while run() is running. Building one starts nothing."""

    def __init__(
        self,
        api: Api,
        driver: str,
        node_name: str,
        pools: Callable[[Features], Sequence[Pool]],
        pools_changed: Callable[[int], Awaitable[int]],
        *,
        nodes: Any,
        slices: Any,
        node: NodeSight | None = None,
        pace: PublishPace = DEFAULT_PACE,
        clock: Callable[[], float] = time.monotonic,
        timer: EventTimer | None = None,
    ) -> None:
        """Set up without starting anything. Without a `node_name`, the pools are those that nodes share.

        `nodes` and `slices` are the names that `api` uses for these two resources. `pools()` returns one pool per kind.
        `clock` is monotonic, in seconds. `node` is given the Node object whenever it was read.
        `timer` is told when slices are written and when a pool is in force.
        """
        self._api, self._nodes, self._slices = api, nodes, slices
        self._owner = Owner(driver=driver, node_name=node_name, shared=not node_name)
        self._fields = {"spec.nodeName": node_name, "spec.driver": driver}
        self._pools, self._pools_changed = pools, pools_changed
        self._pace = pace
        self._clock = clock
        self._timer = timer or EventTimer("dra")
        self._features = ALL_FEATURES
        self._kept = NO_FEATURES
        self._server_version = ""
        self._node: NodeSight = node or Blind()
        self._withholding = Withholding(pace)
        self._stored: dict[str, Object] = {}
        self._own_writes: set[str] = set()
        self._lanes: dict[str, PoolLane] = {}
        self._sweeper = PoolLane(pace, name="of kinds not served")
        self._woken = asyncio.Event()
        self._stale = False
        self._retry_s = pace.first_retry_s
        self._writes = 0
        self._jitter = random.Random(f"{driver}/{node_name}")  # noqa: S311  spreads nodes; the name makes it repeatable
        self._revision = Revision()
        self._standing = PublicationState(since_unix_s=time.time(), reason="not started")

    @property
    def standing(self) -> PublicationState:
        """Return the current publication status."""
        return self._standing

    async def changed(self, seen: int) -> int:
        """Return the version of `standing`, counted from 1, as soon as it differs from `seen` (0: immediately)."""
        return await self._revision.changed(seen)

    async def run(self) -> None:
        """Keep the slices correct until cancelled; they remain after that."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._heed())
            tasks.create_task(self._keep())

    async def withdraw(self) -> bool:
        """Delete every slice of this driver and node within withdraw_s and return whether none is left.

        Not to be called while run() is running.
        """
        try:
            async with asyncio.timeout(self._pace.withdraw_s):
                found = [one for one in (await self._list()).items if belongs(one, self._owner)]
                results = await asyncio.gather(*map(self._delete, found), return_exceptions=True)
        except (NodeagentError, TimeoutError) as error:
            results = [error]
        failed = [one for one in results if isinstance(one, BaseException)]
        if failed:
            log.warning("slices-not-withdrawn", error=_text(failed[0]), failed=len(failed))
            self._show(FAILED, f"not withdrawn: {_text(failed[0])}")
        else:
            self._show(WAITING, "withdrawn", pools=())
        return not failed

    async def _heed(self) -> None:
        seen = 0
        while True:
            seen = await self._pools_changed(seen)
            self._woken.set()

    async def _keep(self) -> None:
        """Retry indefinitely; errors are reported, never raised."""
        delay_s = self._jitter.uniform(0, self._pace.start_jitter_s)
        self._show(WAITING, f"starting {delay_s:.1f} s late, so that not all nodes write at once")
        await asyncio.sleep(delay_s)
        while True:
            began_s = self._clock()
            try:
                await self._session()
                rest_s = self._pace.settle_s
            except Exception as error:
                if self._clock() - began_s > self._pace.steady_s:
                    self._retry_s = self._pace.first_retry_s
                rest_s = self._failed(error)
            await asyncio.sleep(rest_s)

    async def _session(self) -> None:
        """Publish from one list until the stored slices have to be listed again."""
        owner = await self._find_owner()
        await self._meet_server()
        listing = await self._list()
        self._stored = {one["metadata"]["name"]: one for one in listing.items if belongs(one, owner)}
        self._own_writes.clear()
        self._stale = False
        watcher = asyncio.create_task(self._listen(listing.revision))
        try:
            while not self._stale:
                self._woken.clear()
                rest_s = await self._publish(owner)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if rest_s == _NEVER_S else rest_s):
                        await self._woken.wait()
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})
            fault = None if watcher.cancelled() else watcher.exception()
        if fault is not None:
            raise fault

    async def _find_owner(self) -> Owner:
        if self._owner.shared:
            return self._owner
        name = self._owner.node_name
        node = await self._api.get(self._nodes, name)
        if node is None:
            raise _NoNodeError(f"cannot publish ResourceSlices: node {name} does not exist (yet)")
        self._node.take(node)
        return replace(self._owner, node_uid=node["metadata"].get("uid", ""))

    async def _list(self) -> SliceList:
        return await self._api.list(self._slices, fields=self._fields)

    # Changes by others

    async def _listen(self, revision: str) -> None:
        """Apply changes on the server to the stored state; ends only with an error."""
        try:
            pause_s = self._pace.first_retry_s
            while True:
                began_s = self._clock()
                async for event in self._api.watch(self._slices, fields=self._fields, revision=revision):
                    revision = event.object["metadata"].get("resourceVersion", revision)
                    self._take_in(event)
                lasted = self._clock() - began_s > self._pace.steady_s
                pause_s = self._pace.first_retry_s if lasted else min(2 * pause_s, self._pace.last_retry_s)
                await asyncio.sleep(pause_s)
                await self._meet_server()
        finally:
            self._stale = True
            self._woken.set()

    async def _meet_server(self) -> None:
        """Publish again what was found lost if the server is of another version now: it was upgraded, or rolled
        back."""
        with contextlib.suppress(PeerError):  # what follows asks the same server, and reports it
            before, self._server_version = self._server_version, await self._api.version()
            if before not in ("", self._server_version) and self._features != ALL_FEATURES:
                log.info("features-tried-again", lost=self._features.names(kept=False), server=self._server_version)
                self._features = ALL_FEATURES
                self._woken.set()

    def _take_in(self, event: SliceEvent) -> None:
        metadata = event.object["metadata"]
        name, revision = metadata.get("name", ""), metadata.get("resourceVersion", "")
        known = self._stored.get(name)
        if event.type == "BOOKMARK" or not belongs(event.object, self._owner):
            return
        if event.type == "DELETED":
            # Not by us, or it would be unknown. The Node may have been replaced, so everything is listed again.
            self._stale = self._stale or (known is not None and uid(known) == uid(event.object))
        elif revision in self._own_writes or (known is not None and version(known) == revision):
            self._own_writes.discard(revision)
            return
        else:
            self._stored[name] = event.object
        self._woken.set()

    # Writing

    async def _publish(self, owner: Owner) -> float:
        """Write what differs and may be written now; return after how many seconds there is more to do."""
        withheld_s = self._withheld_s()
        pools = self._pools(replace(self._features, allocatable=self._features.allocatable and not withheld_s))
        lanes = {pool.kind: self._lanes.get(pool.kind) or PoolLane(self._pace) for pool in pools}
        if len(lanes) != len(pools):
            raise AssertionError(f"two pools of one kind: {[pool.kind for pool in pools]}")
        self._lanes = lanes
        waits = [withheld_s or _NEVER_S, await self._sweep(owner)]
        for pool in pools:
            waits.append(await self._settle(lanes[pool.kind], pool, owner))
            if not withheld_s and self._withheld_s():
                break  # the others would be refused too: form all of them again
        self._show_pools()
        return min(waits)

    def _withheld_s(self) -> float:
        return self._withholding.left_s(self._node.books, self._clock())

    async def _settle(self, lane: PoolLane, pool: Pool, owner: Owner) -> float:
        lane.take(pool, owner)
        if lane.is_written(self._stored):
            self._timer.in_force(lane.name)
            return _NEVER_S
        todo = SlicePlan() if lane.unfit else plan(self._stored.values(), lane.pool, owner, lane.taint_times)
        if todo:
            return await self._write(lane, todo)
        lane.mark_written(self._stored)
        self._timer.in_force(lane.name)
        return _NEVER_S

    async def _sweep(self, owner: Owner) -> float:
        """Delete stored slices of pools that are not served."""
        surplus = strays(self._stored.values(), self._lanes, owner)
        return await self._write(self._sweeper, SlicePlan(delete=surplus)) if surplus else _NEVER_S

    async def _write(self, lane: PoolLane, todo: SlicePlan) -> float:
        """Write if the lane may write now; return after how many seconds to look again. Raise a PeerError that concerns
        all pools."""
        wait_s = lane.wait_s(self._clock())
        if wait_s > 0:
            return wait_s
        try:
            kept = await self._apply(todo)
        except PeerError as error:
            return self._not_written(lane, todo, error)
        lane.wrote(self._clock())
        self._timer.sent(lane.name)
        log.info("slices-written", pool=lane.name, **{verb: len(bodies) for verb, bodies in todo._asdict().items()})
        self._lose(kept)
        return 0.0  # to check the result

    def _not_written(self, lane: PoolLane, todo: SlicePlan, error: PeerError) -> float:
        """Return after how many seconds to look again. Raise the error if it concerns all pools."""
        now_s = self._clock()
        if _status(error) == _NOT_FOUND:
            # The slice to be replaced has just been deleted: list everything again, immediately.
            lane.missed(now_s)
            self._stale = True
            return 0.0
        if FEATURE in str(error) and self._withhold(todo, error, now_s):
            return 0.0
        if _status(error) == _FORBIDDEN and (todo.replace or todo.delete) and lane.doubts(now_s, error):
            self._stale = True
            return lane.wait_s(now_s)
        if _status(error) == _INVALID and any(map(lists, (*todo.create, *todo.replace))):
            self._lose(_NO_LISTS)
            return 0.0
        if not _lasts(error):
            raise error
        return 0.0 if self._withhold(todo, error, now_s) else lane.refused(now_s, error)

    def _withhold(self, todo: SlicePlan, error: PeerError, now_s: float) -> bool:
        """Leave out of all pools what claims take of the Node's resources, if it was to be written. Return whether it
        was."""
        if not any(map(counts, (*todo.create, *todo.replace))):
            return False
        if self._withholding.reason != str(error):
            log.warning("allocatable-withheld", error=str(error))
        self._withholding.refused(self._node.books, now_s, str(error))
        return True

    async def _apply(self, todo: SlicePlan) -> Features:
        """Perform the writes in order and return which features the server kept.

        Stop at the first write that lost a field: the rest would only complete an incorrect pool.
        """
        changes = [
            *((self._api.replace, one) for one in todo.replace),
            *((self._api.create, one) for one in todo.create),
        ]
        for write, body in changes:
            kept = lost_features(body, await self._stored_by(write, body))
            if kept != ALL_FEATURES:
                return kept
        for one in todo.delete:
            await self._delete(one)
        return ALL_FEATURES

    async def _stored_by(self, write: Callable[[Any, Object], Awaitable[Object]], body: Object) -> Object:
        name = body["metadata"]["name"]
        before = self._stored.get(name)
        self._writes += 1
        answer = await write(self._slices, body)
        told = self._stored.get(name)
        # The watch may have been faster than the response. Other events that it delivered may be older or newer.
        self._stale = self._stale or (told is not before and (told is None or version(told) != version(answer)))
        if told is before:
            self._own_writes.add(version(answer))
        self._stored[name] = answer
        return answer

    async def _delete(self, one: Object) -> None:
        name = one["metadata"]["name"]
        self._writes += 1
        self._stored.pop(name, None)
        await self._api.delete(self._slices, name, uid=uid(one))

    def _lose(self, kept: Features) -> None:
        both = kept & self._features
        if both != self._features:
            self._features = both
            log.warning("features-lost", lost=both.names(kept=False))

    # Reporting

    def _failed(self, error: Exception) -> float:
        """Report a failure, log it once, and return how long to wait, in seconds."""
        reason = _text(error)
        state = WAITING if isinstance(error, _NoNodeError) else FAILED
        said = (self._standing.state, self._standing.reason) == (state, reason)
        first = self._retry_s == self._pace.first_retry_s
        if not said and not (first and _status(error) in _OUT_OF_DATE):
            log.warning(
                "slices-not-published", error=reason, exc_info=None if isinstance(error, NodeagentError) else error
            )
        self._show(state, reason)
        rest_s = self._retry_s * self._jitter.uniform(0.5, 1.0)
        self._retry_s = min(2 * self._retry_s, self._pace.last_retry_s)
        if _lasts(error):
            rest_s = max(rest_s, self._pace.refused_s * self._jitter.uniform(0.5, 1.0))
        return max(rest_s, retry_after_s(error))

    def _show_pools(self) -> None:
        shown = tuple(lane.standing(self._stored) for lane in self._lanes.values())
        broken = tuple(str(one) for lane in self._lanes.values() for one in lane.broken)
        bad = [one for one in shown if one.state == FAILED] or [one for one in shown if one.state == WAITING]
        state, reason = (bad[0].state, bad[0].reason) if bad else (PUBLISHED, "")
        self._kept = self._features & (self._kept | seen_features(self._stored.values()))
        self._show(
            state,
            reason,
            pools=shown,
            broken=broken,
            lost=self._features.names(kept=False),
            kept=self._kept.names(),
            withheld=self._withholding.reason if self._withheld_s() else "",
        )

    def _show(self, state: PublishState, reason: str, **more: Any) -> None:
        before = self._standing
        since_s = before.since_unix_s if state == before.state else time.time()
        after = replace(before, state=state, reason=reason, since_unix_s=since_s, writes=self._writes, **more)
        if after != before:
            self._standing = after
            self._revision.bump()


def _status(error: Exception) -> int:
    return error.status if isinstance(error, PeerError) else 0


def _lasts(error: Exception) -> bool:
    return isinstance(error, PeerError) and error.lasting


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
