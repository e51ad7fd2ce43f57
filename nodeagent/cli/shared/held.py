"""What is held, as `nodeagent grants -o json` writes it, as grants and a ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from nodeagent.cli.shared.request_options import MOST, shortened
from nodeagent.cli.shared.source import LARGEST_FILE_BYTES
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import KUBELET, OTHER_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import parse_size
from nodeagent.core.model.request import Pages
from nodeagent.errors import InputError


class _HeldPages(msgspec.Struct):
    size: str
    numa_node: int
    pages: Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class _HeldMemory(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
    numa_node: int


class _HeldAmount(msgspec.Struct):
    device: str
    capacity: str
    amount: Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _HeldResult(msgspec.Struct):
    request: str
    pool: str
    device: str
    share_id: str = ""
    admin: bool = False
    consumed: dict[str, int] = {}


class _Held(msgspec.Struct):
    """A grant as the page shows it. A placement needs no names, which documents of older agents lack."""

    id: str
    api: str = ""
    resource: str = ""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    claim: str = ""
    uid: str = ""
    pod_uids: list[str] = []
    cpus: str = ""
    hugepages: list[_HeldPages] = []
    memory: list[_HeldMemory] = []
    devices: list[str] = []
    shares: list[str] = []
    amounts: list[_HeldAmount] = []
    things: list[tuple[str, str]] = []
    ids: list[str] = []
    confirmed: bool = False
    granted_at: float = 0.0
    result: _HeldResult | None = None
    settings: str = ""


def online_cpus(inventory: Inventory, text: str, name: str) -> CpuSet:
    """Return the online CPUs of a list. Raise InputError if it names CPUs that this machine cannot have."""
    named = CpuSet.parse(text, source=name)
    possible = inventory.cpus_possible | inventory.cpus_online | inventory.cpus_offline
    if strange := named - possible:
        raise InputError(f"cannot use {name} {shortened(text)}: this machine can have CPUs {possible}, not {strange}")
    return named & inventory.cpus_online


def read_grants(path: str) -> tuple[Grant, ...]:
    """Return the grants of a file as `nodeagent grants -o json` writes it. Raise InputError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return grants_of(file.read(LARGEST_FILE_BYTES + 1))
    except OSError as error:
        raise InputError(f"cannot read --state {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"cannot read --state {path}: {error}") from None


def grants_of(text: bytes) -> tuple[Grant, ...]:
    """Return the grants of a document, as the page /v1/grants of the status socket. Raise InputError if it is none."""
    try:
        grants = tuple(_grant(one) for one in msgspec.json.decode(text, type=list[_Held]))
    except (msgspec.MsgspecError, UnicodeError, RecursionError, InputError) as error:
        raise InputError(" ".join(str(error).split())) from None
    if twice := [one for one, count in Counter(grant.id for grant in grants).items() if count > 1]:
        raise InputError(f"grant {twice[0]!r} stands twice")
    return grants


def _grant(held: _Held) -> Grant:
    pages = (Pages(node=one.numa_node, page_bytes=parse_size(one.size), pages=one.pages) for one in held.hugepages)
    return Grant(
        id=held.id,
        holder=_holder(held),
        ids=tuple(held.ids),
        cpus=CpuSet.parse(held.cpus, source=f"grant {held.id}"),
        hugepages=tuple(pages),
        memory=tuple((one.numa_node, one.bytes) for one in held.memory),
        devices=tuple(one for one in held.devices if one not in held.shares),
        shares=tuple(held.shares),
        amounts=tuple((one.device, one.capacity, one.amount) for one in held.amounts),
        things=tuple(held.things),
        granted_at=held.granted_at,
        confirmed=held.confirmed,
        result=_result(held),
        settings=held.settings,
        pods=() if held.api == KUBELET else tuple(held.pod_uids),
    )


def _holder(held: _Held) -> Holder:
    return Holder(
        api=held.api,
        resource=held.resource,
        namespace=held.namespace,
        pod=held.pod,
        container=held.container,
        claim=held.claim,
        uid=held.uid,
    )


def _result(held: _Held) -> Result | None:
    """Return what the scheduler allocated to a claim; the driver is the end of the grant's resource, KIND.DRIVER."""
    one = held.result
    if one is None:
        return None
    return Result(
        request=one.request,
        driver=held.resource.partition(".")[2],
        pool=one.pool,
        device=one.device,
        share_id=one.share_id,
        admin=one.admin,
        consumed=one.consumed,
    )


def ledger_of(grants: Iterable[Grant], reserved: CpuSet) -> Ledger:
    """Return the ledger that an agent with these grants and reserved CPUs decides on."""
    every = list(grants)
    return Ledger(
        grants={one.id: one for one in every if one.holder.api != OTHER_PLUGIN},
        reserved=reserved,
        foreign={one.id: one for one in every if one.holder.api == OTHER_PLUGIN},
    )
