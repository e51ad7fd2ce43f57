"""Rebuilds a ledger that may lack decisions from what is really in use, and reports what is still missing.

The sources are the claims' own files, kubelet's state on disk and its list, and the containers that the runtime shows.
What is known exactly is restored. For the rest the sources are read again until it is known, has been prepared again,
or has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from nodeagent.aio.supervise import race
from nodeagent.core.deviceplugin.view import ResourceKind
from nodeagent.core.ledger.rebuild import ClaimInUse, Sources
from nodeagent.core.model.claim import ClaimRef
from nodeagent.core.model.container import STOPPED
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.pinning.plan import named_by
from nodeagent.errors import HostError, InputError, NodeagentError, PeerError, StateError
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.kube.kubelet.pod_resources import NO_LISTING, Listing, PodResources, given
from nodeagent.kube.kubelet_files.claim_state import prepared
from nodeagent.managers.manager import Manager
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.managers.pod_witness import PodWitness
from nodeagent.resources.offer import Offer
from nodeagent.state import grant_json as storedgrant
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.telemetry.log import new_op
from nodeagent.telemetry.once import Once

_NOT_LISTED = "kubelet has listed no pod of the API server since it started"
LOOK_S = 1.0
"""How often the sources are read again while something is missing."""
log = structlog.get_logger()


class LedgerRecovery(Manager):
    """Rebuilds the ledger after a loss. Building one reads nothing."""

    name = "recovery"

    def __init__(
        self,
        agent: Agent,
        pods: PodResources,
        witness: PodWitness,
        table: ContainerTable,
        kubelet_dir: Path,
        plugins: Path,
        cdi: CdiFolder,
        readable: ClaimFiles,
        driver: str,
        offers: Callable[[], Sequence[Offer]],
    ) -> None:
        """Store the sources.

        `plugins` is kubelet's device-plugins folder; `driver` the DRA driver's name.
        """
        self._agent = agent
        self._pods = pods
        self._witness = witness
        self._table = table
        self._kubelet_dir = kubelet_dir
        self._plugins = plugins
        self._cdi = cdi
        self._readable = readable
        self._driver = driver
        self._offers = offers
        self._failed = Once("ledger-not-rebuilt")

    def look_for_losses(self, store: Store, served: Iterable[ResourceKind]) -> None:
        """Record at start that the ledger lacks something if kubelet or a claim's files show it. served: the resources
        that the agent is configured for. Blocks. Raise StateError on failure."""
        if store.fresh and (traces := self._traces()):
            store.lose(f"there was no ledger in {store.path.parent}, and {traces}")
        # Query the ledger last: another agent may have made a grant a moment ago.
        if not store.loss and (missed := store.never_had(self._claims_in_use())):
            why = "kubelet has claims prepared that it never had, and their files are there"
            store.lose(f"{store.path}: {why}: {', '.join(missed)}")
        if not store.loss and (missed := store.never_had_of_pods(self._given_of(served))):
            store.lose(f"{store.path}: kubelet has given devices to pods that it never had: {', '.join(missed)}")

    def _traces(self) -> str:
        """Return, as a clause, evidence that claims were prepared here before, or "" if there is none."""
        if files := self._claims_with_files():
            return f"there are files of {len(files)} claims"
        if claims := self._prepared():
            return f"kubelet has {len(claims)} claims prepared"
        return ""

    def _claims_in_use(self) -> frozenset[str]:
        """Return the UIDs of claims that kubelet has prepared and whose files exist.

        Kubelet's record alone is no proof: it outlives the response that a claim was released.
        """
        with contextlib.suppress(HostError):
            return self._prepared() & self._claims_with_files()
        return frozenset()

    def _given_of(self, served: Iterable[ResourceKind]) -> Mapping[str, frozenset[tuple[str, str]]]:
        """Return the (resource, id) pairs of some resources that kubelet's checkpoint has given to each pod, by UID.
        Ids of another plugin that served a resource of the same name before are left out."""
        kinds, found = {one.name: one for one in served}, dict[str, frozenset[tuple[str, str]]]()
        for (uid, _), parts in self._witness.given().items():
            mine = frozenset((name, one) for name, one in parts if name in kinds and self._is_id(kinds[name], one))
            found[uid] = found.get(uid, frozenset()) | mine
        return found

    def _is_id(self, resource: ResourceKind, id: str) -> bool:
        try:
            return bool(resource.parts(self._agent.inventory, [id]))
        except InputError:
            return False

    def _prepared(self) -> frozenset[str]:
        """Return the UIDs of the claims that kubelet has prepared, as far as its record is readable."""
        with contextlib.suppress(InputError):
            return frozenset(prepared(self._kubelet_dir, self._driver) or ())
        return frozenset()

    def _claims_with_files(self) -> frozenset[str]:
        return frozenset(self._cdi.uids() | self._readable.uids())

    async def lead(self) -> None:
        """While the ledger may lack something, look until it does not."""
        seen, ledger = 0, self._agent.revisions.ledger
        while True:
            if self._agent.loss:
                await self.look()
                await race(asyncio.sleep(LOOK_S), ledger.changed(ledger.value))
            else:
                seen = await ledger.changed(seen)

    def not_ready(self) -> list[str]:
        """Return why nothing new is granted: how the ledger was lost, then each thing that it may still lack."""
        agent = self._agent
        missing = list(agent.unaccounted.values()) or ["it is being rebuilt"]
        return [f"ledger: {one}" for one in (agent.loss, *missing)] if agent.loss else []

    async def look(self) -> Mapping[str, str]:
        """Query every source once. Return what is still missing, mapped to the reason."""
        listing, silent = NO_LISTING, ""
        try:
            listing = await self._pods.listing()
        except PeerError as error:
            silent = str(error)
        try:
            sources = await self._sources(listing, silent)
            return await self._agent.rebuild(sources, [one.resource for one in self._offers()], new_op())
        except (HostError, InputError, StateError) as error:
            self._failed.report(str(error))
            return self._agent.unaccounted

    # ---------------------------------------------------------------- the sources

    async def _sources(self, listing: Listing, silent: str) -> Sources:
        """Read all sources.

        A claim's file alone does not prove that the claim is in use: an agent killed while releasing a claim leaves it
        behind. The file counts unless kubelet's own record lacks the claim and nothing of its pods is running.
        """
        recorded, unreadable = await asyncio.to_thread(self._files)
        claims = await asyncio.to_thread(prepared, self._kubelet_dir, self._driver)
        devices = await asyncio.to_thread(given, self._plugins)
        known = [*self._agent.ledger.grants.values(), *(grant for grants in recorded.values() for grant in grants)]
        living = await self._witness.living(known)
        named = {**self._prepared_or_listed(claims or {}, listing), **dict(self._named_by_containers())}
        counts = not silent and self._witness.knows_pods(listing)
        if claims is None and not counts:
            named = {**{uid: ClaimInUse(name=uid, source=why) for uid, why in unreadable.items()}, **named}
            used = recorded
        else:
            run = {one.rpartition("-")[0] for one in living}
            used = {uid: grants for uid, grants in recorded.items() if uid in named or uid in run}
        silences = [
            "" if counts or claims is not None or not (silent or recorded or unreadable) else silent or _NOT_LISTED,
            "" if counts or devices is not None else silent or _NOT_LISTED,
        ]
        return Sources(
            recorded=used,
            in_use=named,
            given=devices,
            living=frozenset(living),
            kubelet_silent=next(filter(None, silences), ""),
        )

    def _files(self) -> tuple[dict[str, tuple[Grant, ...]], dict[str, str]]:
        """Return, by claim UID, the grants in the claim's file, and why a file's grants cannot be read."""
        recorded, unreadable = dict[str, tuple[Grant, ...]](), dict[str, str]()
        for uid in sorted(self._claims_with_files()):
            try:
                recorded[uid] = _grants(uid, self._readable.read(uid), str(self._readable.path(uid)))
            except NodeagentError as error:
                unreadable[uid] = str(error)
        return recorded, unreadable

    def _prepared_or_listed(self, claims: Mapping[str, ClaimRef], listing: Listing) -> dict[str, ClaimInUse]:
        """Return the claims that kubelet has prepared, from its state on disk or its list."""
        listed = {uid: ref for device, ref in listing.claims.items() if (uid := self._cdi.claim_of(device))}
        return {
            **{
                uid: ClaimInUse(name=_name(ref), source="kubelet lists a container that uses it")
                for uid, ref in listed.items()
            },
            **{uid: ClaimInUse(name=_name(ref), source="kubelet has it prepared") for uid, ref in claims.items()},
        }

    def _named_by_containers(self) -> Iterator[tuple[str, ClaimInUse]]:
        """Yield the claims that containers name in their environment; a grant's id begins with its claim's UID."""
        for container in (one for one in self._table.containers() if one.state != STOPPED):
            for uid in {one.rpartition("-")[0] for one in named_by(container)}:
                yield uid, ClaimInUse(name=uid, source=f"container {container} uses it")


def _grants(uid: str, document: Any, source: str) -> tuple[Grant, ...]:
    """Return the grants in a claim's file. Raise StateError if they are not the claim's."""
    bodies = document.get("grants") if isinstance(document, dict) else None
    if not isinstance(bodies, list) or not bodies:
        raise StateError(f"cannot read {source}: it carries no grants")
    found = tuple(storedgrant.from_document(one, source) for one in bodies)
    if any(one.holder.api != CLAIM or one.holder.uid != uid or not one.id.startswith(f"{uid}-") for one in found):
        raise StateError(f"cannot read {source}: it carries grants of another claim")
    return found


def _name(ref: ClaimRef) -> str:
    return f"{ref.namespace}/{ref.name}"
