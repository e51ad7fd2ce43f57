"""Files of a claim: one CDI file, and one folder whose files its containers can read. Both are functions of the ledger
and the inventory, are written after the decision is durable, and are restored whenever they are missing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog
from msgspec.structs import replace

from nodeagent.aio.supervise import run_to_end
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Mount
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import HostError, InputError, NodeagentError
from nodeagent.host.cdi import CdiDevice, CdiFolder, ClaimFiles
from nodeagent.managers.dra import container_edits as handover
from nodeagent.managers.dra import device_metadata
from nodeagent.resources.catalog import Dra
from nodeagent.state.agent import Agent

PACK = 16
"""Number of claims whose files are checked in one go."""
log = structlog.get_logger()


class _EveryClaim:
    """Contains every UID."""

    def __contains__(self, uid: object) -> bool:
        return True


_EVERY_CLAIM = _EveryClaim()


class _Rendered(NamedTuple):
    """What a claim's files were last rendered from, and which files came of it."""

    grants: Sequence[Grant]
    dra: Dra
    inventory: Inventory
    versions: tuple[object, object]


class ClaimRenderer:
    """Writes and removes the files of all claims, one call at a time."""

    def __init__(
        self,
        agent: Agent,
        dra: Callable[[], Dra],
        cdi: CdiFolder,
        readable: ClaimFiles,
        mps_folder: Path,
        view: Callable[[Inventory], Inventory] = lambda inventory: inventory,
    ) -> None:
        """Store the folders; mps_folder: of the MPS daemons. `dra` returns what is currently served; `view` the
        inventory with the parts that were made on demand as they are now."""
        self._agent = agent
        self._view = view
        self._dra = dra
        self._cdi = cdi
        self._readable = readable
        self._mps_folder = mps_folder
        self._disk = threading.Lock()
        """Held by the thread that writes or removes files."""
        self._rendered: dict[str, _Rendered] = {}
        """By UID; only for the thread that holds `_disk`."""
        self._unrendered: Mapping[str, str] = {}
        """The last logged errors of claims whose files cannot be written, by UID."""

    def hold(self, grants: Iterable[Grant]) -> bool:
        """Return whether no decision, durable or not yet, ends or changes these grants, apart from the recorded
        pods."""
        now = self._agent.newest.grants
        return all(one.id in now and replace(now[one.id], pods=one.pods) == one for one in grants)

    def inventory(self) -> Inventory:
        """Return the devices as they are handed over now."""
        return self._view(self._agent.inventory)

    def cdi_id(self, grant: Grant) -> str:
        """Return the name of a grant's CDI device, VENDOR/CLASS=NAME."""
        return self._cdi.device_id(grant.holder.uid, _index(grant))

    async def remove(self, uids: Sequence[str]) -> dict[str, str]:
        """Remove the files of some claims. Return, by UID, "" or why something is left."""
        return await run_to_end(asyncio.to_thread(self.remove_now, uids))

    async def restore(self, *, afresh: bool = True) -> None:
        """Restore the missing files of claims and remove files without a claim. Errors are logged per claim. afresh:
        also what neither the ledger nor the inventory shows, such as the mode of a device node, and half-written
        files."""
        on_disk = await asyncio.to_thread(lambda: self._cdi.uids() | self._readable.uids())
        # A file is written after its decision: a claim still unknown after the refresh has no grant.
        await self._agent.refresh()
        held = claims_held(self._agent.ledger)
        inventory = self.inventory()
        there = {uid: grants for uid, grants in held.items() if not any(_is_unmade(inventory, one) for one in grants)}
        before, self._unrendered = self._unrendered, await self._write_all(there, afresh)
        for uid, error in self._unrendered.items():
            if before.get(uid) != error:
                log.warning("claim-not-rendered", claim=str(held[uid][0].holder), error=error)
        if self._agent.loss:
            return  # a claim that is not in the ledger may be one that it lost
        orphans = sorted(on_disk - claims_held(self._agent.ledger).keys())
        await self.remove(orphans)
        drafts = await run_to_end(asyncio.to_thread(self._remove_drafts)) if afresh else []
        if orphans or drafts:
            log.info("orphans-removed", claims=orphans, drafts=drafts)

    async def _write_all(self, claims: Mapping[str, Sequence[Grant]], afresh: bool) -> dict[str, str]:
        """Write the files of many claims, a few at a time, so that kubelet's calls can run in between."""
        errors, every = dict[str, str](), list(claims.items())
        for start in range(0, len(every), PACK):
            errors |= await self.write(dict(every[start : start + PACK]), afresh=afresh)
        return errors

    async def write(self, claims: Mapping[str, Sequence[Grant]], *, afresh: bool = True) -> dict[str, str]:
        """Write the files of those claims whose grants are still in force. Return errors by UID. afresh: whether or not
        they are those last written, and from the same."""
        return await run_to_end(asyncio.to_thread(self._write_held, claims, afresh))

    def _write_held(self, claims: Mapping[str, Sequence[Grant]], afresh: bool) -> dict[str, str]:
        with self._disk:
            wanted = {uid: grants for uid, grants in claims.items() if afresh or not self._is_rendered(uid, grants)}
            return self._write_some({uid: grants for uid, grants in wanted.items() if self.hold(grants)})

    def _is_rendered(self, uid: str, grants: Sequence[Grant]) -> bool:
        """Return whether a claim's files are those last written, and what they were rendered from is the same."""
        last = self._rendered.get(uid)
        if last is None or last.inventory is not self.inventory() or last.dra is not self._dra():
            return False
        return last.grants == grants and last.versions == self._versions(uid)

    def _versions(self, uid: str) -> tuple[object, object]:
        return self._cdi.version(uid), self._readable.version(uid)

    def write_now(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        """Write the files of claims whose grants are durable, whether or not they are in effect yet; blocks. Return
        errors by UID. Their removal must be decided after this has returned."""
        with self._disk:
            return self._write_some(claims)

    def _write_some(self, claims: Mapping[str, Sequence[Grant]]) -> dict[str, str]:
        errors, dra, inventory = dict[str, str](), self._dra(), self.inventory()
        for uid, grants in claims.items():
            self._rendered.pop(uid, None)
            try:
                self._write(dra, inventory, uid, grants)
                self._rendered[uid] = _Rendered(grants, dra, inventory, self._versions(uid))
            except handover.NotPreparedError as error:
                errors[uid] = "; ".join(
                    filter(None, [f"cannot prepare {grants[0].holder}: {error}", self._hidden(uid)])
                )
            except (NodeagentError, OSError) as error:
                errors[uid] = f"cannot prepare {grants[0].holder}: {error}"
        return errors

    def _hidden(self, uid: str) -> str:
        """Remove the file by which a runtime would hand over what is not prepared. Return "" or why it is left."""
        try:
            self._cdi.remove(uid)
        except (NodeagentError, OSError) as error:
            return str(error)
        return ""

    def _write(self, dra: Dra, inventory: Inventory, uid: str, grants: Sequence[Grant]) -> None:
        claim, pod_claim = grants[0].holder.claim, grants[0].holder.pod_claim
        self._readable.write(uid, handover.metadata(dra, inventory, grants, pod_claim))
        standard = device_metadata.streams(dra, inventory, grants, pod_claim)
        self._readable.write_requests(uid, standard)
        paths = {request: str(self._readable.request_path(uid, request)) for request in standard}
        of_request = device_metadata.mounts(paths, dra.catalog.driver, claim, pod_claim)
        edits = handover.edits(dra, inventory, grants, self._mount(uid, claim), of_request, self._mps_folder)
        names = [self._cdi.device_name(uid, _index(grant)) for grant in grants]
        self._cdi.write(uid, [CdiDevice(name=name, edits=one) for name, one in zip(names, edits, strict=True)])

    def _mount(self, uid: str, name: str) -> Mount:
        return Mount(host_path=str(self._readable.path(uid).parent), container_path=f"{handover.CLAIMS_FOLDER}/{name}")

    def remove_now(self, uids: Iterable[str]) -> dict[str, str]:
        """Like `remove`; blocks."""
        with self._disk:
            return {uid: self._removed(uid) for uid in uids}

    def _removed(self, uid: str) -> str:
        self._rendered.pop(uid, None)
        try:
            self._cdi.remove(uid)
            self._readable.remove(uid)
        except InputError:
            return ""  # no file of ours can have such a name
        except (HostError, OSError) as error:
            return f"cannot unprepare claim {uid}: {error}"
        return ""

    def _remove_drafts(self) -> list[str]:
        """Remove files that a killed agent left half-written. A writer that is active now, such as another instance,
        notices and writes again."""
        try:
            with self._disk:
                return [*self._cdi.sweep(_EVERY_CLAIM), *self._readable.sweep(_EVERY_CLAIM)]
        except (HostError, OSError) as error:
            log.warning("drafts-not-removed", error=str(error))
            return []


def claims_held(ledger: Ledger) -> dict[str, tuple[Grant, ...]]:
    """Return what each claim holds, by UID, in the order of its allocation."""
    held: dict[str, list[Grant]] = {}
    for grant in ledger.grants.values():
        if grant.holder.api == CLAIM:
            held.setdefault(grant.holder.uid, []).append(grant)
    return {uid: tuple(sorted(grants, key=lambda one: (len(one.id), one.id))) for uid, grants in held.items()}


def _is_unmade(inventory: Inventory, grant: Grant) -> bool:
    """Return whether a grant has a part that does not exist: its files are written when it is made."""
    parts = (inventory.device_by_id[one].partition for one in grant.devices if one in inventory.device_by_id)
    return any(part is not None and not part.made for part in parts)


def _index(grant: Grant) -> str:
    return grant.id.rpartition("-")[2]
