"""What kubelet's own managers assigned, imported as grants and released when its pods have ended.

Pure. Kubelet's state outlives its pods: entries of a pod that no longer has a folder are ignored. Everything that can
be imported becomes a grant of (pod UID, container) with a stable id, so that importing again changes nothing.
CPUs that several containers have are one grant of all of them, named "a,b".
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.kubelet.assigned import Assigned, MemoryBlock, Said
from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.free import MEMORY, memory_left
from nodeagent.core.ledger.ledger import ADOPTED, Change, Ledger, released
from nodeagent.core.model.grant import KUBELET, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.core.model.topology import NodeId
from nodeagent.errors import Refused

_IMPORTED, ENDED = "imported from kubelet's own managers", "kubelet has removed its pod's folder"
OLD_FORM = "this old form of the state does not say which pod it is of: drain the node"


class ImportPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How importing changes the ledger."""

    ledger: Ledger
    taken: tuple[Grant, ...] = ()
    """New grants, and grants that hold something else than before."""
    known: tuple[Grant, ...] = ()
    """Grants that were imported before and are unchanged."""
    released: tuple[Grant, ...] = ()
    """Imported grants that kubelet's state contradicts."""
    ended: tuple[Assigned, ...] = ()
    """Assignments of pods that no longer exist."""
    refused: tuple[tuple[Assigned, str], ...] = ()
    """Assignments that cannot be imported, with the reason."""

    @property
    def changes(self) -> tuple[Change, ...]:
        """Return the changes to the ledger, releases first."""
        gone = released(self.released, "kubelet's own managers no longer assign it")
        return (*gone, *(Change(action=ADOPTED, grant=one, why=_IMPORTED) for one in self.taken))


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at kubelet's pods shows about the imported grants."""

    missing: Mapping[str, float] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Since when the pod of each grant has been gone, by grant id."""
    released: tuple[Grant, ...] = ()


# ---------------------------------------------------------------- importing


def plan(
    inventory: Inventory, ledger: Ledger, said: Said, there: Container[str], *, at: float, boot_id: str = ""
) -> ImportPlan:
    """Plan the import of what kubelet assigned.

    there: UIDs of the pods that exist. at: seconds since the epoch.
    """
    contradicted = [grant for grant in _imported(ledger) if not _still_so(grant, said)]
    after = ledger_of.release(ledger, [one.id for one in contradicted])
    granted: list[Grant] = []
    refused = [(one, OLD_FORM) for one in said.unnamed]
    for one in (one for one in said.assigned if one.uid in there):
        try:
            new = after.grants.get(one.id) or _grant(inventory, after, one, ledger.grants.get(one.id), said)
            new = replace(new, granted_at=new.granted_at or at, boot_id=new.boot_id or boot_id)
            after = ledger_of.grant(after, new)
            granted.append(new)
        except Refused as refusal:
            refused.append((one, refusal.why))
    known = tuple(one for one in granted if ledger.grants.get(one.id) == one)
    # A grant that merely holds something else now is not a release.
    released = tuple(one for one in contradicted if one.id not in after.grants)
    return ImportPlan(
        ledger=after,
        taken=tuple(one for one in granted if one not in known),
        known=known,
        released=released,
        ended=tuple(one for one in said.assigned if one.uid not in there),
        refused=tuple(refused),
    )


def _imported(ledger: Ledger) -> list[Grant]:
    return [grant for grant in ledger.grants.values() if grant.holder.api == KUBELET]


def _still_so(grant: Grant, said: Said) -> bool:
    """Return whether an imported grant still agrees with kubelet's state.

    What a manager that is off does not mention remains in force: the container is still running with it.
    """
    now = next((one for one in said.assigned if one.id == grant.id), Assigned(uid=grant.holder.uid))
    same_cpus = now.cpus == grant.cpus or not (now.cpus or said.cpus)
    same_memory = now.bytes_by_size == _bytes_by_size(grant) or not (now.blocks or said.memory)
    return same_cpus and same_memory


def _bytes_by_size(grant: Grant) -> dict[int, int]:
    found = dict[int, int]()
    for pages in grant.hugepages:
        found[pages.page_bytes] = found.get(pages.page_bytes, 0) + pages.pages * pages.page_bytes
    if memory := sum(amount for _, amount in grant.memory):
        found[MEMORY] = memory
    return found


def _grant(inventory: Inventory, ledger: Ledger, one: Assigned, old: Grant | None, said: Said) -> Grant:
    """Return the grant of an assignment. Raise Refused if the machine does not have it.

    old: what the containers held before.
    """
    old = old or Grant(id=one.id, holder=Holder(api=KUBELET, uid=one.uid, container=one.container))
    cpus = one.cpus if one.cpus or said.cpus else old.cpus
    if lost := cpus - inventory.cpus_online:
        raise Refused(f"CPUs {lost} are not online", want=len(cpus), free=len(cpus - lost), unit="CPUs")
    new = replace(old, cpus=cpus, granted_at=0.0, confirmed=True, boot_id="")
    if not one.blocks and not said.memory:
        return new
    amounts = sorted(_placed(inventory, ledger, one.blocks).items())
    return replace(
        new,
        hugepages=tuple(
            Pages(node=node, page_bytes=size, pages=amount // size)
            for (size, node), amount in amounts
            if size != MEMORY
        ),
        memory=tuple((node, amount) for (size, node), amount in amounts if size == MEMORY),
    )


def _placed(inventory: Inventory, ledger: Ledger, blocks: Iterable[MemoryBlock]) -> dict[tuple[int, NodeId], int]:
    """Return the bytes by (page_bytes, node).

    A block on several nodes takes as much as possible from the first node, then from the next, as kubelet does.
    """
    taken: dict[tuple[int, NodeId], int] = {}
    for block in blocks:
        left = block.size_bytes
        for node in block.nodes:
            key = block.page_bytes, node
            part = min(left, _room(inventory, ledger, *key) - taken.get(key, 0))
            if part:
                taken[key] = taken.get(key, 0) + part
            left -= part
        if left:
            raise _no_room(block, block.size_bytes - left)
        if block.page_bytes != MEMORY and block.size_bytes % block.page_bytes:
            raise Refused(f"{block}, which is no whole number", want=block.size_bytes, free=0, unit="bytes")
    return taken


def _room(inventory: Inventory, ledger: Ledger, page_bytes: int, node: NodeId) -> int:
    """Return the bytes of a node that are not granted.

    Running pods already use what they have, so the number of free pages means nothing here.
    """
    found = inventory.node_by_id.get(node)
    if found is None:
        return 0
    if page_bytes == MEMORY:
        return max(0, memory_left(found) - ledger.memory_held.get(node, 0))
    total = sum(pool.total_pages for pool in found.hugepages if pool.page_bytes == page_bytes)
    return max(0, total - ledger.pages_held.get((node, page_bytes), 0)) * page_bytes


def _no_room(block: MemoryBlock, free: int) -> Refused:
    return Refused(f"{block}, where {free} are not granted", want=block.size_bytes, free=free, unit="bytes")


# ---------------------------------------------------------------- releasing


def ended(ledger: Ledger, there: Container[str], missing: Mapping[str, float], now: float, patience_s: float) -> Ended:
    """Return the imported grants to release: those whose pods were missing in two looks at least patience_s apart.

    there: UIDs of the pods that exist. missing: Ended.missing of the previous look. now: in seconds, of any clock.
    """
    mine = [one for one in _imported(ledger) if one.holder.uid not in there]
    since = {one.id: missing.get(one.id, now) for one in mine}
    released = tuple(one for one in mine if one.id in missing and now - since[one.id] >= patience_s)
    gone = {one.id for one in released}
    return Ended(missing={one: at for one, at in since.items() if one not in gone}, released=released)
