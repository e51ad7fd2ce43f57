"""Conversion of a grant to and from the JSON stored in the ledger file. Fields added by a newer build are ignored."""

from __future__ import annotations

from typing import Any

import msgspec

from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.request import Pages
from nodeagent.errors import InputError, StateError


class _Pages(msgspec.Struct):
    node: int
    page_bytes: int
    pages: int


class _Result(msgspec.Struct, omit_defaults=True):
    request: str
    driver: str
    pool: str
    device: str
    share_id: str = ""
    admin: bool = False
    consumed: dict[str, int] = {}


class _Body(msgspec.Struct, omit_defaults=True):
    """A grant as stored in the file."""

    id: str
    api: str
    resource: str = ""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    claim: str = ""
    uid: str = ""
    ids: list[str] = []
    cpus: str = ""
    hugepages: list[_Pages] = []
    memory: list[tuple[int, int]] = []
    devices: list[str] = []
    shares: list[str] = []
    amounts: list[tuple[str, str, int]] = []
    things: list[tuple[str, str]] = []
    granted_at: float = 0.0
    confirmed: bool = False
    boot_id: str = ""
    result: _Result | None = None
    settings: str = ""
    pods: list[str] = []
    pod_claim: str = ""


def write(grant: Grant) -> str:
    """Return the grant as one line of JSON."""
    return msgspec.json.encode(_body(grant)).decode()


def document(grant: Grant) -> dict[str, Any]:
    """Return the grant as plain types."""
    found: dict[str, Any] = msgspec.to_builtins(_body(grant))
    return found


def _body(grant: Grant) -> _Body:
    return _Body(
        id=grant.id,
        api=grant.holder.api,
        resource=grant.holder.resource,
        namespace=grant.holder.namespace,
        pod=grant.holder.pod,
        container=grant.holder.container,
        claim=grant.holder.claim,
        uid=grant.holder.uid,
        ids=list(grant.ids),
        cpus=str(grant.cpus),
        hugepages=[_Pages(one.node, one.page_bytes, one.pages) for one in grant.hugepages],
        memory=list(grant.memory),
        devices=list(grant.devices),
        shares=list(grant.shares),
        amounts=list(grant.amounts),
        things=list(grant.things),
        granted_at=grant.granted_at,
        confirmed=grant.confirmed,
        boot_id=grant.boot_id,
        result=_result_out(grant.result),
        settings=grant.settings,
        pods=list(grant.pods),
        pod_claim=grant.holder.pod_claim,
    )


def read(body: Any, source: str) -> Grant:
    """Read what `write` wrote. Raise StateError naming the source."""
    try:
        return _grant(msgspec.json.decode(body, type=_Body), source)
    except (msgspec.MsgspecError, TypeError) as error:
        raise StateError(f"cannot read {source}: {error}") from None


def from_document(found: Any, source: str) -> Grant:
    """Read what `document` returned. Raise StateError naming the source."""
    try:
        return _grant(msgspec.convert(found, type=_Body), source)
    except msgspec.MsgspecError as error:
        raise StateError(f"cannot read {source}: {error}") from None


def _grant(found: _Body, source: str) -> Grant:
    try:
        cpus = CpuSet.parse(found.cpus)
    except InputError as error:
        raise StateError(f"cannot read {source}: {error}") from None
    return Grant(
        id=found.id,
        holder=Holder(
            api=found.api,
            resource=found.resource,
            namespace=found.namespace,
            pod=found.pod,
            container=found.container,
            claim=found.claim,
            uid=found.uid,
            pod_claim=found.pod_claim,
        ),
        ids=tuple(found.ids),
        cpus=cpus,
        hugepages=tuple(Pages(node=p.node, page_bytes=p.page_bytes, pages=p.pages) for p in found.hugepages),
        memory=tuple(found.memory),
        devices=tuple(found.devices),
        shares=tuple(found.shares),
        amounts=tuple(found.amounts),
        things=tuple(found.things),
        granted_at=found.granted_at,
        confirmed=found.confirmed,
        boot_id=found.boot_id,
        result=_result_in(found.result),
        settings=found.settings,
        pods=tuple(found.pods),
    )


def _result_out(result: Result | None) -> _Result | None:
    if result is None:
        return None
    return _Result(**{**msgspec.structs.asdict(result), "consumed": dict(result.consumed)})


def _result_in(found: _Result | None) -> Result | None:
    return None if found is None else Result(**msgspec.structs.asdict(found))
