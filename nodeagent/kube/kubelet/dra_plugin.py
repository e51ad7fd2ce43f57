"""Dynamic Resource Allocation, v1 and v1beta1: kubelet's calls to prepare and unprepare claims. Protobuf in, core
values, protobuf out.

Guarantees: every call is answered, with exactly the claims it asked for. A failure of one claim is reported for that
claim and affects no other. Work that kubelet no longer waits for is still finished, so its next attempt finds it done.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeVar

import structlog

from nodeagent.core.model.claim import ClaimRef, Prepared, PreparedDevice
from nodeagent.errors import NodeagentError, Refused
from nodeagent.kube.rpc.server import Server
from nodeagent.pb import dra_v1_pb2, dra_v1beta1_pb2

SERVICES = ("v1.DRAPlugin", "v1beta1.DRAPlugin")
"""Service names used at registration, newest first."""
CALL_S = 40.0
"""How long a call waits for its claims; kubelet gives up after 45 s."""

PREPARE, UNPREPARE = "prepare", "unprepare"
_UID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
T = TypeVar("T")
Work = Callable[[Sequence[ClaimRef], str], Coroutine[Any, Any, Mapping[str, Any]]]
log = structlog.get_logger()


class ClaimHandler(Protocol):
    """Prepares claims. Both calls may be repeated at any time, even while the previous one is in progress."""

    async def prepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, Prepared]:
        """Return one result per claim, by UID, for exactly the requested claims. Durable on return."""

    async def unprepare(self, claims: Sequence[ClaimRef], op: str) -> Mapping[str, str]:
        """Return, by UID, "" or why the claim is still held. Durable on return; an unknown claim is not an error."""


def add_to(server: Server, claims: ClaimHandler, *, call_s: float = CALL_S) -> None:
    """Serve `claims` on a server, in both API versions. `call_s` limits how long one call waits."""
    calls = _Calls(claims, call_s)
    for pb in (dra_v1_pb2, dra_v1beta1_pb2):
        server.add(pb.DESCRIPTOR, "DRAPlugin", _Service(pb, calls))


class _Service:
    """The two calls in one version; `pb` is its message module."""

    def __init__(self, pb: ModuleType, calls: _Calls) -> None:
        self._pb: Any = pb
        self._calls = calls

    async def NodePrepareResources(self, request: Any, context: Any) -> Any:  # noqa: N802
        answers = await self._calls.answers(PREPARE, request.claims, self._prepared, self._not_prepared)
        return self._pb.NodePrepareResourcesResponse(claims=answers)

    async def NodeUnprepareResources(self, request: Any, context: Any) -> Any:  # noqa: N802
        answers = await self._calls.answers(UNPREPARE, request.claims, self._unprepared, self._not_unprepared)
        return self._pb.NodeUnprepareResourcesResponse(claims=answers)

    def _prepared(self, one: Prepared) -> Any:
        if one.error:
            return self._not_prepared(one.error)
        return self._pb.NodePrepareResourceResponse(devices=[self._device(device) for device in one.devices])

    def _not_prepared(self, error: str) -> Any:
        return self._pb.NodePrepareResourceResponse(error=error)

    def _unprepared(self, error: str) -> Any:
        if not isinstance(error, str):
            raise TypeError(f"{error!r} is no text")  # protobuf would take None for success
        return self._not_unprepared(error)

    def _not_unprepared(self, error: str) -> Any:
        return self._pb.NodeUnprepareResourceResponse(error=error)

    def _device(self, one: PreparedDevice) -> Any:
        device = self._pb.Device(
            request_names=one.requests, pool_name=one.pool, device_name=one.device, cdi_device_ids=one.cdi_ids
        )
        if one.share_id and "share_id" in device.DESCRIPTOR.fields_by_name:
            device.share_id = one.share_id
        return device


class _Calls:
    """What both versions share: the requested claims, and an answer for each."""

    def __init__(self, claims: ClaimHandler, call_s: float) -> None:
        self._work: Mapping[str, Work] = {PREPARE: claims.prepare, UNPREPARE: claims.unprepare}
        self._call_s = call_s
        self._under_way: set[asyncio.Task[Mapping[str, Any]]] = set()

    async def answers(
        self, verb: str, claims: Iterable[Any], build: Callable[[Any], T], failed: Callable[[str], T]
    ) -> dict[str, T]:
        """Return one answer per UID: `build` applied to the result of the claim, or `failed` applied to its error."""
        op = secrets.token_hex(4)
        with structlog.contextvars.bound_contextvars(op=op):
            good, bad = _sorted_out(verb, claims)
            found = await self._results(verb, good, op) if good else {}
            answers = {uid: _answer(verb, ref, found, build, failed, op) for uid, ref in good.items()}
            for uid, error in bad.items():
                log.warning("claim-refused", verb=verb, uid=uid, error=error)
            return answers | {uid: failed(_sendable(error)) for uid, error in bad.items()}

    async def _results(self, verb: str, refs: Mapping[str, ClaimRef], op: str) -> Mapping[str, Any]:
        """Return, by UID, a result or the exception for it. Work that exceeds the wait continues in the background."""
        task = asyncio.create_task(self._do(verb, refs, op))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        done, _ = await asyncio.wait({task}, timeout=self._call_s)
        if not done:
            log.warning("claims-not-done", verb=verb, claims=len(refs), after_s=self._call_s)
            return dict.fromkeys(refs, TimeoutError(f"not done after {self._call_s:g} s, and still under way"))
        return dict.fromkeys(refs, InterruptedError("it was cancelled")) if task.cancelled() else task.result()

    async def _do(self, verb: str, refs: Mapping[str, ClaimRef], op: str) -> Mapping[str, Any]:
        try:
            found = dict(await self._work[verb](tuple(refs.values()), op))
        except Exception as error:
            known = isinstance(error, NodeagentError | OSError)
            log.warning(
                "claims-failed", verb=verb, claims=len(refs), error=str(error), exc_info=None if known else error
            )
            return dict.fromkeys(refs, error)
        if found.keys() != refs.keys():
            missing, unasked = sorted(refs.keys() - found.keys()), sorted(map(str, found.keys() - refs.keys()))
            log.error("claims-not-as-asked", verb=verb, missing=missing, unasked=unasked)
        return found


def _sorted_out(verb: str, claims: Iterable[Any]) -> tuple[dict[str, ClaimRef], dict[str, str]]:
    """Return the valid claims by UID, and why the others are invalid; duplicates count once."""
    good: dict[str, ClaimRef] = {}
    bad: dict[str, str] = {}
    for one in claims:
        ref = ClaimRef(namespace=one.namespace, name=one.name, uid=one.uid)
        why = _wrong_with(verb, ref, good.get(ref.uid, ref))
        if why:
            bad[ref.uid] = f"cannot {verb} claim {ref}: {why}"
        else:
            good.setdefault(ref.uid, ref)
    return {uid: ref for uid, ref in good.items() if uid not in bad}, bad


def _wrong_with(verb: str, ref: ClaimRef, earlier: ClaimRef) -> str:
    """Return what is wrong with a claim as kubelet names it, or "". Unprepare needs only the UID."""
    if not _UID.fullmatch(ref.uid):
        return f"uid {ref.uid!r} is not one that Kubernetes gives"
    if verb == UNPREPARE:
        return ""
    if not ref.namespace or not ref.name:
        return f"it has namespace {ref.namespace!r} and name {ref.name!r}, expected both"
    return "" if ref == earlier else f"uid {ref.uid} is asked for twice, also as {earlier}"


def _answer(
    verb: str, ref: ClaimRef, found: Mapping[str, Any], build: Callable[[Any], T], failed: Callable[[str], T], op: str
) -> T:
    """Return the answer for one claim; any fault in its result becomes its own error."""
    cannot = f"cannot {verb} claim {ref}"
    try:
        result = found.get(ref.uid, KeyError("no result"))
        if isinstance(result, Exception):
            return failed(_sendable(_text(result, cannot, op)))
        return build(result)
    except Exception as error:
        log.error("claim-not-sent", verb=verb, claim=str(ref), uid=ref.uid, exc_info=error)
        return failed(_sendable(_text(error, cannot, op)))


def _text(error: Exception, cannot: str, op: str) -> str:
    """Return the error text for kubelet, never empty. An unexpected error shows only its type and the op id."""
    name = type(error).__name__
    match error:
        case Refused() | OSError():
            return f"{cannot}: {str(error) or name}"
        case NodeagentError():
            return str(error) or f"{cannot}: {name}"
    return f"{cannot}: unexpected {name}, see op {op} in the agent's log"


def _sendable(text: str) -> str:
    """Return the text as valid UTF-8, which protobuf requires; file names may contain arbitrary bytes."""
    return text.encode(errors="backslashreplace").decode()
