"""Work on claims between kubelet's calls: restoring files, writing status, releasing forgotten claims.

Each loop runs until cancelled; nothing here makes kubelet wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import race
from nodeagent.core.dra.interfaces import network_data
from nodeagent.core.model.claim import Claim, ClaimRef, Result
from nodeagent.core.model.grant import Grant, describe
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError, PeerError
from nodeagent.kube import resourceclaim as wire
from nodeagent.managers.dra.claim_files import ClaimRenderer, claims_held
from nodeagent.state.agent import Agent
from nodeagent.telemetry.log import new_op

FOLDER_POLL_S = 30.0
"""Fallback poll interval in addition to the folder watches."""
AFRESH_S = 300.0
"""How often files are rendered again although nothing shows that they have to be."""
SETTLE_S = 1.0
"""How long to wait after a change before files are checked, so that further changes are collected."""
LOOK_S, SECOND_LOOK_S = 3600.0, 60.0
"""How often to check whether claims still exist, and how long one must be gone before it is released."""
FORGOTTEN = "garbage collection: kubelet uses it no longer, and it is gone or reserved for no pod"
"""Why the collector releases a claim, for the audit."""
MOST_WAITING = 1000
"""Maximum number of claims whose status is waiting to be written."""
NOT_ALLOWED_S = 600.0
"""How long no status is written after the API server has forbidden it."""
NOT_PREPARED = "NotPrepared"
"""Reason of a condition."""
log = structlog.get_logger()


async def keep_rendered(rendered_of: Revision, rendering: ClaimRenderer, folder: Path) -> None:
    """Render at start, whenever the input changes, and whenever another process changes the CDI folder; from time to
    time afresh."""
    afresh_at_s = 0.0
    with FolderWatch(folder, poll_s=FOLDER_POLL_S) as watch:
        while True:
            seen, afresh = rendered_of.value, time.monotonic() >= afresh_at_s
            await rendering.restore(afresh=afresh)
            if afresh:
                afresh_at_s = time.monotonic() + AFRESH_S
            await race(watch.wait(), rendered_of.changed(seen))
            await asyncio.sleep(SETTLE_S)


# ---------------------------------------------------------------- forgotten claims


class ClaimGarbageCollector:
    """Releases what is held by claims that no longer exist or are no longer reserved for anyone.

    Kubelet unprepares each claim; this covers those it forgot. Both the API server and kubelet must confirm it, again
    SECOND_LOOK_S later, and no process of the claim's pods may be running: a container may outlive its pod object.
    """

    def __init__(
        self,
        agent: Agent,
        fetch: Callable[[ClaimRef], Awaitable[Mapping[str, Any] | None]],
        in_use: Callable[[], Awaitable[frozenset[tuple[str, str]]]],
        driver: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store the sources.

        `in_use` returns (namespace, name) of the claims that kubelet's containers use, or raises PeerError. `clock` is
        in seconds.
        """
        self._agent = agent
        self._fetch = fetch
        self._in_use = in_use
        self._driver = driver
        self._clock = clock
        self._gone_since: dict[str, float] = {}
        self._hinted = asyncio.Event()

    def hint(self) -> None:
        """Look soon: a claim is probably gone."""
        self._hinted.set()

    async def follow(self) -> None:
        while True:
            await self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SECOND_LOOK_S if self._gone_since else LOOK_S):
                    await self._hinted.wait()
            self._hinted.clear()

    async def look(self) -> tuple[Grant, ...]:
        """Look once and return what was released. If the API server or kubelet does not answer, claims whose check
        depends on it are not released."""
        released: list[Grant] = []
        try:
            for uid, ref in (await self._idle()).items():
                released += await self._release_gone(uid, await self._is(ref))
        except PeerError as error:
            log.debug("claims-not-looked-for", error=str(error))
        for grant in released:
            log.warning("claim-forgotten", claim=str(grant.holder), uid=grant.holder.uid, grant=grant.id)
        return tuple(released)

    async def _release_gone(self, uid: str, there: bool) -> tuple[Grant, ...]:
        """Release a claim that has been gone long enough. Must follow the API server's answer immediately: a claim
        without a reservation may be needed again."""
        if there:
            self._gone_since.pop(uid, None)
            return ()
        since = self._gone_since.setdefault(uid, self._clock())
        if self._clock() - since < SECOND_LOOK_S:
            return ()
        done = await self._agent.unprepare([uid], FORGOTTEN, new_op())
        if done.living:
            why = f"cannot release claim {uid}, which is gone: it is in use, {done.living[uid]}"
            log.warning("claim-in-use", uid=uid, error=why)
        else:
            del self._gone_since[uid]
        return done.released

    async def _idle(self) -> dict[str, ClaimRef]:
        """Return the claims that hold something and that no container uses."""
        held = {uid: _ref(grants) for uid, grants in claims_held(self._agent.ledger).items()}
        used = await self._in_use() if held else frozenset()
        idle = {uid: ref for uid, ref in held.items() if (ref.namespace, ref.name) not in used}
        self._gone_since = {uid: since for uid, since in self._gone_since.items() if uid in idle}
        return idle

    async def _is(self, ref: ClaimRef) -> bool:
        """Return whether a claim still exists and is reserved; an unreadable claim counts as both."""
        document = await self._fetch(ref)
        if document is None:
            return False
        try:
            found: Claim = wire.read(document, self._driver)
        except InputError:
            return True
        return found.ref.uid == ref.uid and found.allocated and bool(found.reserved_for)


def _ref(grants: Sequence[Grant]) -> ClaimRef:
    holder = grants[0].holder
    return ClaimRef(namespace=holder.namespace, name=holder.claim, uid=holder.uid)


# ---------------------------------------------------------------- status.devices


class StatusSender(Protocol):
    """Writes a body to the status of a claim as a field manager. Raises PeerError, including ApiError."""

    async def __call__(self, ref: ClaimRef, body: Mapping[str, Any], manager: str) -> None: ...


class StatusWriter:
    """Writes the result of prepare to the status of claims: conditions, and the interface of a network adapter."""

    def __init__(self, tell: StatusSender, driver: str, inventory: Callable[[], Inventory]) -> None:
        self._tell = tell
        self._driver = driver
        self._inventory = inventory
        self._waiting: dict[str, tuple[ClaimRef, list[Any]]] = {}
        """The newest status of each claim, by UID."""
        self._news = asyncio.Event()
        self._written: dict[str, list[Any]] = {}
        self._not_before_s = 0.0

    def told(self, ref: ClaimRef, grants: Sequence[Grant], error: str) -> None:
        """Queue the status, unless it equals the one written last."""
        devices = self._devices(grants, error)
        self._waiting.pop(ref.uid, None)
        full, silent = len(self._waiting) >= MOST_WAITING, time.monotonic() < self._not_before_s
        if not devices or self._written.get(ref.uid) == devices or full or silent:
            return
        self._waiting[ref.uid] = ref, devices
        self._news.set()

    async def answer(self, claim: Claim, grants: Sequence[Grant], error: str) -> None:
        """Write the result of preparing a claim for which the scheduler waits, `error` if it cannot be prepared. Raise
        PeerError."""
        mine = [one for one in claim.results if one.driver == self._driver]
        devices = [self._refused(one, error) for one in mine] if error else self._devices(grants, "")
        await self._tell(claim.ref, wire.device_status(claim.ref, devices), self._driver)
        self._written[claim.ref.uid] = devices
        self._forget_oldest()

    async def follow(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                await self._write(*self._waiting.pop(next(iter(self._waiting))))

    async def _write(self, ref: ClaimRef, devices: list[Any]) -> None:
        try:
            await self._tell(ref, wire.device_status(ref, devices), self._driver)
        except PeerError as error:
            self._failed(ref, error)
        else:
            self._written[ref.uid] = devices
            self._forget_oldest()

    def _failed(self, ref: ClaimRef, error: PeerError) -> None:
        """Log a failure. A status is optional: it is not retried, and after a 403 none is written for a while."""
        log.warning("claim-status-not-written", claim=str(ref), error=str(error))
        if isinstance(error, PeerError) and error.status == 403:
            self._not_before_s = time.monotonic() + NOT_ALLOWED_S
            self._waiting.clear()

    def _forget_oldest(self) -> None:
        while len(self._written) > MOST_WAITING:
            del self._written[next(iter(self._written))]

    def _devices(self, grants: Sequence[Grant], error: str) -> list[Any]:
        """Return the status of the devices of this node's own pools: the right that agents have covers claims of one
        node, and a device that nodes share may be used on any (resourceclaims/driver, Kubernetes 1.36)."""
        own = ((grant, grant.result) for grant in grants if grant.result is not None and "/" in grant.result.pool)
        return [self._device(grant, result, error) for grant, result in own]

    def _refused(self, result: Result, error: str) -> Any:
        at = _rfc3339(time.time())
        return wire.one_status(result, ready=False, reason=NOT_PREPARED, message=error, at=at, refused=True)

    def _device(self, grant: Grant, result: Result, error: str) -> Any:
        at = _rfc3339(grant.granted_at)
        reason, message = (NOT_PREPARED, error) if error else ("Prepared", describe(grant))
        network = network_data(self._inventory(), grant)
        data = {"networkData": network} if network else {}
        return wire.one_status(result, ready=not error, reason=reason, message=message, at=at, data=data)


def _rfc3339(at_unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_unix_s))
