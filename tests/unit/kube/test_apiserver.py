"""The Kubernetes API client against a real HTTP server that is as strict as the real one, and on its bad days."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.core.model.claim import ClaimRef
from nodeagent.errors import ConfigError, PeerError
from nodeagent.kube.apiserver.call import MOST_CALLS
from nodeagent.kube.apiserver.client import (
    BOOKMARK,
    CLAIMS,
    NODES,
    SLICES,
    ApiError,
    ApiResource,
    ApiServer,
    Expired,
    WatchEvent,
    access,
)
from nodeagent.kube.apiserver.credentials import Access, TlsContexts
from nodeagent.kube.apiserver.lazy import LazyApi
from tests.doubles.api_server import CONSUMABLE, COUNTERS, TAINTS, FakeApiServer, Fault

NODE = "worker-1"
DRIVER = "cpu.nodeagent.dev"
PODS = ApiResource("", "v1", "pods", "Pod", True)

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
STATUS: dict[str, Any] = {"force": True, "subresource": "status"}


def at(server: FakeApiServer, **more: Any) -> Access:
    return Access(source="test", host="127.0.0.1", port=server.port, tls=False, **more)


@asynccontextmanager
async def pair(**more: Any) -> AsyncIterator[tuple[FakeApiServer, ApiServer]]:
    """A server and a client of it."""
    async with FakeApiServer() as server:
        client = ApiServer(at(server), **more)
        try:
            yield server, client
        finally:
            await client.close()


def a_slice(name: str = "worker-1-cpu", devices: list[dict[str, Any]] | None = None, **spec: Any) -> dict[str, Any]:
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    whole = {"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": devices or [{"name": "cpu-0"}], **spec}
    return {"metadata": {"name": name}, "spec": {key: value for key, value in whole.items() if value is not None}}


# What is asked and answered


async def test_a_slice_is_created_read_replaced_and_deleted() -> None:
    async with pair() as (server, client):
        created = await client.create(SLICES, a_slice())
        assert created["metadata"]["uid"] and created["metadata"]["generation"] == 1
        assert await client.get(SLICES, "worker-1-cpu") == created
        created["spec"]["devices"].append({"name": "cpu-1"})
        replaced = await client.replace(SLICES, created)
        assert replaced["metadata"]["generation"] == 2
        assert int(replaced["metadata"]["resourceVersion"]) > int(created["metadata"]["resourceVersion"])
        assert await client.delete(SLICES, "worker-1-cpu", uid=created["metadata"]["uid"]) is True
        assert server.slices() == []


async def test_what_is_not_there_is_none_and_was_not_deleted() -> None:
    async with pair() as (_, client):
        assert await client.get(CLAIMS, "none", "default") is None
        assert await client.delete(SLICES, "none") is False


async def test_a_server_without_the_kind_is_not_taken_for_an_absent_object() -> None:
    async with pair() as (server, client):
        server.absent.add("resourceslices")
        with pytest.raises(ApiError, match=r"cannot get resourceslices one at 127.0.0.1:.*could not find") as caught:
            await client.get(SLICES, "one")
        assert caught.value.status == 404 and caught.value.lasting
        with pytest.raises(ApiError, match=r"delete resourceslices one"):
            await client.delete(SLICES, "one")


async def test_a_list_follows_all_pages_and_tells_its_revision() -> None:
    async with pair() as (server, client):
        server.page = 2
        for number in range(5):
            await client.create(SLICES, a_slice(f"one-{number}"))
        server.add("resourceslices", a_slice("other", nodeName="worker-2"))
        found = await client.list(SLICES, fields={"spec.nodeName": NODE, "spec.driver": DRIVER})
        assert [one["metadata"]["name"] for one in found.items] == [f"one-{number}" for number in range(5)]
        assert found.revision == server.revision
        assert server.count("list") == 3


async def test_pages_that_ran_out_of_date_are_expired() -> None:
    async with pair() as (server, client):
        server.page = 1
        for number in range(3):
            await client.create(SLICES, a_slice(f"one-{number}"))
        listing = asyncio.create_task(client.list(SLICES))
        await server.until(lambda: server.count("list") == 1)
        server.add_node("new")
        server.forget()
        with pytest.raises(Expired, match=r"410 Expired"):
            await listing


async def test_claims_are_listed_in_one_namespace() -> None:
    async with pair() as (server, client):
        server.add_claim("a", namespace="one")
        server.add_claim("b", namespace="two")
        assert len((await client.list(CLAIMS)).items) == 2
        assert [one["metadata"]["name"] for one in (await client.list(CLAIMS, namespace="two")).items] == ["b"]


async def test_what_exists_is_not_created_again() -> None:
    async with pair() as (_, client):
        await client.create(SLICES, a_slice())
        with pytest.raises(ApiError, match=r"cannot create resourceslices worker-1-cpu .*409 AlreadyExists") as caught:
            await client.create(SLICES, a_slice())
        assert (caught.value.status, caught.value.reason, caught.value.lasting) == (409, "AlreadyExists", False)


async def test_a_stale_object_is_not_replaced() -> None:
    async with pair() as (_, client):
        stale = await client.create(SLICES, a_slice())
        await client.replace(SLICES, a_slice(devices=[{"name": "cpu-7"}]))
        with pytest.raises(ApiError, match=r"has been modified") as caught:
            await client.replace(SLICES, stale)
        assert (caught.value.status, caught.value.reason) == (409, "Conflict")


async def test_another_object_of_the_same_name_is_not_deleted() -> None:
    async with pair() as (server, client):
        await client.create(SLICES, a_slice())
        with pytest.raises(ApiError, match=r"Precondition failed") as caught:
            await client.delete(SLICES, "worker-1-cpu", uid="another")
        assert caught.value.status == 409 and len(server.slices()) == 1


async def test_an_equal_object_gets_no_new_revision() -> None:
    async with pair() as (server, client):
        created = await client.create(SLICES, a_slice())
        before = server.revision
        assert await client.replace(SLICES, created) == created
        assert server.revision == before


async def test_the_agent_says_its_name_and_keeps_its_connection() -> None:
    async with pair() as (server, client):
        for _ in range(5):
            await client.list(NODES)
        assert server.connections == 1
        assert server.requests[0].headers["user-agent"].startswith("nodeagent/")


async def test_a_connection_whose_peer_is_silent_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.kube.apiserver.connection.SILENT_S", 0.0)
    async with pair() as (server, client):
        await client.list(NODES)
        await client.list(NODES)
        assert server.connections == 2


async def test_a_connection_is_ready_before_a_call_needs_it() -> None:
    """Also again after the server has closed it."""
    async with pair() as (server, client):
        await client.warm()
        assert (server.connections, len(server.requests)) == (1, 0)
        await client.list(NODES)
        await server.cut()
        await client.warm()
        assert server.connections == 2
        await client.warm()
        await client.list(NODES)
        assert server.connections == 2


async def test_a_server_that_is_away_cannot_be_reached_ahead() -> None:
    async with pair() as (server, client):
        await server.stop()
        with pytest.raises(ApiError, match="cannot reach the API server"):
            await client.warm()
        await server.start()
        await client.warm()
        await client.list(NODES)
        assert server.connections == 1


async def test_many_calls_at_once_share_few_connections() -> None:
    async with pair() as (server, client):
        await asyncio.gather(*(client.get(NODES, f"n{number}") for number in range(40)))
        assert server.count("get") == 40
        assert server.connections <= 40 // 2


async def test_a_claim_is_read_while_a_slow_server_holds_up_everything_else(tmp_path: Path) -> None:
    """More Events, labels and slices than there are slots wait for their answers; a pod that starts does not."""
    async with FakeApiServer() as server:
        server.add_claim("c")
        server.add_node(NODE)
        server.answers += [Fault(kind="hang", verb=verb) for verb in ("create", "apply", "list") for _ in range(8)]
        api = LazyApi(server.kubeconfig(tmp_path))
        event = {"metadata": {"name": "e", "namespace": "default"}}
        waiting = [
            asyncio.create_task(call)
            for _ in range(8)
            for call in (
                api.create_event(event),
                api.apply(NODES, NODE, {"metadata": {}}, manager=DRIVER, force=True),
                api.list(SLICES, fields={"spec.nodeName": NODE}),
            )
        ]
        try:
            await server.until(lambda: len(server.requests) == MOST_CALLS)
            async with asyncio.timeout(5):
                found = await asyncio.gather(
                    *(api.claim(ClaimRef(namespace="default", name="c", uid="")) for _ in range(8))
                )
            assert all(one is not None and one["metadata"]["name"] == "c" for one in found)
            assert not any(one.done() for one in waiting)
            assert len(server.requests) == MOST_CALLS + 8
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await api.close()


# Server-side apply

RESULT = {"request": "cpus", "driver": DRIVER, "pool": NODE, "device": "cpu-0"}
CONDITION = {
    "type": "Ready",
    "status": "True",
    "reason": "Prepared",
    "message": "",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
}


def device_status(**more: Any) -> dict[str, Any]:
    return {"driver": DRIVER, "pool": NODE, "device": "cpu-0", **more}


async def test_a_claims_device_status_is_applied_and_taken_back_beside_that_of_others() -> None:
    async with pair() as (server, client):
        other = {"request": "nic", "driver": "nic.other", "pool": "p", "device": "d"}
        server.add_claim("c", results=[RESULT, other])
        theirs = {"driver": "nic.other", "pool": "p", "device": "d", "data": {"mtu": 9000}}
        await client.apply(CLAIMS, "c", "default", {"status": {"devices": [theirs]}}, manager="other", **STATUS)
        ours = device_status(conditions=[CONDITION], data={"cpus": "2-3"})
        stored = await client.apply(CLAIMS, "c", "default", {"status": {"devices": [ours]}}, manager="us", **STATUS)
        stored_theirs = {**theirs, "conditions": None}
        assert stored["status"]["devices"] == [stored_theirs, ours]
        assert stored["status"]["allocation"] and stored["status"]["reservedFor"]
        stored = await client.apply(CLAIMS, "c", "default", {"status": {"devices": []}}, manager="us", **STATUS)
        assert stored["status"]["devices"] == [stored_theirs]


async def test_what_two_managers_share_stays_until_both_take_it_back() -> None:
    async with pair() as (server, client):
        server.add_claim("c", results=[RESULT])

        async def applied(manager: str, *devices: dict[str, Any]) -> Any:
            body = {"status": {"devices": [*devices]}}
            stored = await client.apply(CLAIMS, "c", "default", body, manager=manager, **STATUS)
            return stored["status"].get("devices")

        await applied("us", device_status(conditions=[CONDITION], data={"cpus": "2-3"}))
        taken = await applied("third", device_status(data={"cpus": "4"}))
        assert taken == [device_status(conditions=[CONDITION], data={"cpus": "4"})]
        assert await applied("us") == [device_status(conditions=None, data={"cpus": "4"})]
        assert await applied("third") is None


async def test_a_condition_given_twice_cannot_be_applied() -> None:
    async with pair() as (server, client):
        server.add_claim("c", results=[RESULT])
        body = {"status": {"devices": [device_status(conditions=[CONDITION, CONDITION])]}}
        with pytest.raises(ApiError, match=r"500 InternalError: .*duplicate"):
            await client.apply(CLAIMS, "c", "default", body, manager="us", **STATUS)


async def test_applying_the_same_status_again_changes_nothing() -> None:
    async with pair() as (server, client):
        server.add_claim("c", results=[RESULT])
        body = {"status": {"devices": [device_status(conditions=[CONDITION])]}}
        first = await client.apply(CLAIMS, "c", "default", body, manager="us", **STATUS)
        assert await client.apply(CLAIMS, "c", "default", body, manager="us", **STATUS) == first
        assert server.requests[-1].query == {"fieldManager": "us", "force": "true"}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (device_status(device="cpu-9"), "must be an allocated device"),
        (device_status(shareID="ABC"), "RFC 4122"),
        (device_status(conditions=[{**CONDITION, "reason": ""}]), "reason"),
        (device_status(conditions=[{**CONDITION, "status": "Maybe"}]), "Unsupported value"),
        (device_status(conditions=[{"type": "Ready", "status": "True", "reason": "R"}]), "lastTransitionTime"),
        (device_status(data={"a": "x" * 10240}), "Too long"),
        (device_status(networkData={"ips": ["10.0.0.1"]}), "CIDR"),
    ],
)
async def test_a_bad_device_status_is_refused_with_its_place(status: dict[str, Any], said: str) -> None:
    async with pair() as (server, client):
        server.add_claim("c", results=[RESULT])
        with pytest.raises(ApiError, match=said) as caught:
            await client.apply(CLAIMS, "c", "default", {"status": {"devices": [status]}}, manager="us", **STATUS)
        assert caught.value.status == 422 and caught.value.lasting and len(server.rejected) == 1


async def test_the_status_of_a_claim_that_is_gone_is_an_error() -> None:
    async with pair() as (_, client):
        with pytest.raises(ApiError, match=r"cannot apply the status of resourceclaims default/c .*404 NotFound"):
            await client.apply(CLAIMS, "c", "default", {"status": {}}, manager="us", **STATUS)


# Watches


async def collect(events: AsyncIterator[WatchEvent], count: int) -> list[WatchEvent]:
    found: list[WatchEvent] = []
    async for event in events:
        found.append(event)
        if len(found) == count:
            break
    return found


async def test_a_watch_tells_what_changed_since_the_list_and_nothing_else() -> None:
    async with pair() as (server, client):
        await client.create(SLICES, a_slice("old"))
        start = (await client.list(SLICES)).revision
        await client.create(SLICES, a_slice("missed"))
        events = client.watch(SLICES, fields={"spec.nodeName": NODE}, revision=start)
        assert [(e.type, e.object["metadata"]["name"]) for e in await collect(events, 1)] == [("ADDED", "missed")]
        await events.aclose()
        await server.until(lambda: server.watching == 0)
        watching = asyncio.create_task(collect(client.watch(SLICES, fields={"spec.nodeName": NODE}, revision=start), 4))
        await server.until(lambda: server.watching == 1)
        server.add("resourceslices", a_slice("other", nodeName="worker-2"))
        await client.replace(SLICES, a_slice("old", [{"name": "cpu-9"}]))
        await client.delete(SLICES, "old")
        server.bookmark()
        found = [(event.type, event.object["metadata"].get("name")) for event in await watching]
        assert found == [("ADDED", "missed"), ("MODIFIED", "old"), ("DELETED", "old"), (BOOKMARK, None)]


async def test_a_bookmark_carries_the_revision_to_go_on_from() -> None:
    async with pair() as (server, client):
        watching = asyncio.create_task(collect(client.watch(SLICES, revision=server.revision), 1))
        await server.until(lambda: server.watching == 1)
        server.add_node("unrelated")
        server.bookmark()
        (event,) = await watching
        assert event.type == BOOKMARK and event.object["metadata"]["resourceVersion"] == server.revision


@pytest.mark.parametrize("in_stream", [False, True], ids=["as-the-status", "as-an-event"])
async def test_a_forgotten_revision_is_expired(in_stream: bool) -> None:
    async with pair() as (server, client):
        start = server.revision
        server.add_node("one")
        server.forget()
        server.expired_in_stream = in_stream
        with pytest.raises(Expired, match=r"cannot watch resourceslices at .*410 Expired: too old") as caught:
            await collect(client.watch(SLICES, revision=start), 1)
        assert caught.value.status == 410 and not caught.value.lasting


async def test_an_open_watch_that_falls_behind_is_expired() -> None:
    async with pair() as (server, client):
        watching = asyncio.create_task(collect(client.watch(SLICES, revision=server.revision), 1))
        await server.until(lambda: server.watching == 1)
        server.expire_watches()
        with pytest.raises(Expired):
            await watching


async def test_a_watch_ends_quietly_when_the_server_ends_it() -> None:
    async with pair() as (server, client):
        watching = asyncio.create_task(collect(client.watch(SLICES, revision=server.revision), 1))
        await server.until(lambda: server.watching == 1)
        server.end_watches()
        assert await watching == []


async def test_a_watch_lasts_no_longer_than_was_asked() -> None:
    async with pair(watch_s=1.0) as (server, client):
        assert await collect(client.watch(SLICES, revision=server.revision), 1) == []
        assert server.requests[-1].query["timeoutSeconds"] == "1"
        assert server.requests[-1].query["allowWatchBookmarks"] == "true"


async def test_a_watch_whose_peer_says_nothing_any_more_ends_with_an_error() -> None:
    async with silent(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n") as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False), timeout_s=0.2, watch_s=0.2)
        with pytest.raises(ApiError, match=r"silent past the end"):
            await collect(client.watch(SLICES, revision="1"), 1)


async def test_a_watch_that_is_cut_between_two_events_just_ends() -> None:
    line = b'{"type": "ADDED", "object": {"metadata": {}}}\n'
    async with saying(_chunked(line)) as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False))
        assert len(await collect(client.watch(SLICES, revision="1"), 9)) == 1


async def test_a_watch_that_is_cut_in_the_middle_of_an_event_is_an_error() -> None:
    async with saying(_chunked(b'{"type": "ADDED", "obj')) as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False))
        with pytest.raises(ApiError, match=r"cannot watch resourceslices at 127.0.0.1:.*not a whole HTTP answer"):
            await collect(client.watch(SLICES, revision="1"), 9)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"no json\n", "no JSON object"),
        (b"[]\n", "no JSON object"),
        (b'{"type": "ADDED"}\n', "without an object"),
        (b'{"type": "NEWS", "object": {"metadata": {}}}\n', "type 'NEWS'"),
        (b'{"type": "ADDED", "object": {}}\n', "without metadata"),
        (b'{"type": "ERROR", "object": {"code": 500, "reason": "InternalError"}}\n', "500 InternalError"),
        (b'{"type": "ERROR", "object": {"code": "x"}}\n', "cannot watch"),
    ],
)
async def test_a_nonsensical_event_is_an_error(line: bytes, said: str) -> None:
    async with saying(_chunked(line)) as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False))
        with pytest.raises(ApiError, match=said):
            await collect(client.watch(SLICES, revision="1"), 9)


async def test_a_watch_that_nobody_reads_any_more_is_closed() -> None:
    async with pair() as (server, client):
        watching = asyncio.create_task(collect(client.watch(SLICES, revision=server.revision), 1))
        await server.until(lambda: server.watching == 1)
        watching.cancel()
        await server.until(lambda: server.watching == 0)


# Bad days


@pytest.mark.parametrize(
    ("status", "reason", "lasting"),
    [
        (400, "BadRequest", True),
        (401, "Unauthorized", False),
        (403, "Forbidden", True),
        (405, "MethodNotAllowed", True),
        (409, "Conflict", False),
        (410, "Expired", False),
        (422, "Invalid", True),
        (429, "TooManyRequests", False),
        (500, "InternalError", False),
        (503, "ServiceUnavailable", False),
    ],
)
async def test_a_refusal_carries_status_reason_and_the_servers_words(status: int, reason: str, lasting: bool) -> None:
    async with pair() as (server, client):
        server.fail(status)
        with pytest.raises(ApiError, match=f"cannot list nodes at .*: {status} {reason}: on purpose") as caught:
            await client.list(NODES)
        assert (caught.value.status, caught.value.reason, caught.value.lasting) == (status, reason, lasting)
        assert isinstance(caught.value, Expired) == (status == 410)
        assert (await client.list(NODES)).items == ()


async def test_the_server_says_when_to_come_back() -> None:
    async with pair() as (server, client):
        server.fail(429, retry_after_s=7)
        with pytest.raises(ApiError) as caught:
            await client.list(NODES)
        assert caught.value.retry_after_s == 7.0
        server.fail(500)
        with pytest.raises(ApiError) as caught:
            await client.list(NODES)
        assert caught.value.retry_after_s == 0.0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("half", "not a whole HTTP answer"),
        ("close", "not a whole HTTP answer|reset by peer"),
        ("garbage", "no JSON object"),
    ],
)
async def test_half_an_answer_or_garbage_is_an_error_and_the_next_call_works(kind: str, said: str) -> None:
    async with pair() as (server, client):
        server.answers.append(Fault(kind=kind, verb="list"))
        with pytest.raises(ApiError, match=f"cannot list nodes at 127.0.0.1:{server.port}: .*({said})") as caught:
            await client.list(NODES)
        assert caught.value.status == 0 and not caught.value.lasting
        assert (await client.list(NODES)).items == ()


async def test_a_write_whose_answer_is_lost_was_done_all_the_same() -> None:
    async with pair() as (server, client):
        server.answers.append(Fault(kind="half", done=True, verb="create"))
        with pytest.raises(ApiError):
            await client.create(SLICES, a_slice())
        assert len(server.slices()) == 1


@pytest.mark.parametrize("kind", ["hang", "slow"])
async def test_a_peer_that_never_finishes_meets_the_deadline(kind: str) -> None:
    async with pair(timeout_s=0.2) as (server, client):
        server.answers.append(Fault(kind=kind, pause_s=0.1))
        with pytest.raises(ApiError, match=r"no whole answer within 0.2 s") as caught:
            await client.list(NODES)
        assert caught.value.status == 0
        assert (await client.list(NODES)).items == ()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b'"text"', "no JSON object"),
        (b"\xff\xfe", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"{}", "kind None, expected 'NodeList'"),
        (b'{"kind": "PodList"}', "kind 'PodList', expected 'NodeList'"),
        (b'{"kind": "NodeList"}', "no metadata"),
        (b'{"kind": "NodeList", "metadata": {"resourceVersion": "1"}, "items": {"a": 1}}', "not a list of objects"),
        (b'{"kind": "NodeList", "metadata": {"resourceVersion": "1"}, "items": [1]}', "not a list of objects"),
        (b'{"kind": "NodeList", "metadata": {"resourceVersion": 1}, "items": []}', "resourceVersion is 1"),
    ],
)
async def test_an_answer_of_another_shape_is_an_error(body: bytes, said: str) -> None:
    async with pair() as (server, client):
        server.answers.append(Fault(kind="garbage", body=body))
        with pytest.raises(ApiError, match=said):
            await client.list(NODES)


async def test_what_is_not_http_is_an_error() -> None:
    async with saying(b"SSH-2.0-OpenSSH_9\r\n") as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False))
        with pytest.raises(ApiError, match=r"not a whole HTTP answer"):
            await client.list(NODES)


async def test_a_refusal_that_is_no_status_is_shown_as_it_is() -> None:
    async with saying(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 5\r\nretry-after: soon\r\n\r\nsorry") as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False))
        with pytest.raises(ApiError, match=r"502: Bad Gateway 'sorry'") as caught:
            await client.list(NODES)
        assert caught.value.retry_after_s == 0.0
        await client.close()


async def test_a_status_may_say_when_to_come_back_too() -> None:
    status = b'{"kind": "Status", "reason": "ServerTimeout", "details": {"retryAfterSeconds": 3}}'
    raw = b"HTTP/1.1 504 Gateway Timeout\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(status), status)
    async with saying(raw) as port:
        client = ApiServer(Access(source="t", host="127.0.0.1", port=port, tls=False))
        with pytest.raises(ApiError, match=r"504 ServerTimeout") as caught:
            await client.list(NODES)
        assert caught.value.retry_after_s == 3.0


async def test_a_server_that_restarts_is_an_error_while_it_is_away_and_none_afterwards() -> None:
    async with pair() as (server, client):
        await client.create(SLICES, a_slice())
        async with server.away():
            with pytest.raises(ApiError, match=r"Connection refused"):
                await client.list(SLICES)
        assert len((await client.list(SLICES)).items) == 1


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again() -> None:
    async with pair() as (server, client):
        await client.list(NODES)
        await server.cut()
        await client.get(NODES, "any")
        assert server.connections == 2


async def test_a_name_that_is_no_host_is_an_error() -> None:
    client = ApiServer(Access(source="t", host="no-such-host.invalid", port=1, tls=False), timeout_s=5)
    with pytest.raises(ApiError, match=r"cannot list nodes at no-such-host.invalid:1: "):
        await client.list(NODES)


@asynccontextmanager
async def saying(raw: bytes, *, stay: bool = False) -> AsyncIterator[int]:
    """A port where every client is told the same bytes, whatever it asks."""

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)
            await writer.drain()
            if stay:
                await reader.read()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(attend, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def silent(raw: bytes) -> Any:
    return saying(raw, stay=True)


def _chunked(data: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%s\r\n" % (len(data), data)


# Who we are


async def test_a_replaced_token_is_used_from_the_next_call_on(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with FakeApiServer(tokens={"first"}) as server:
        client = ApiServer(at(server, token_file=token))
        await client.list(NODES)
        server.tokens = {"second"}
        with pytest.raises(ApiError, match=r"401 Unauthorized") as caught:
            await client.list(NODES)
        assert not caught.value.lasting
        fresh = tmp_path / "fresh"
        fresh.write_text("second")
        fresh.replace(token)
        await client.list(NODES)
        await client.close()


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("", "it is empty"), ("a b", "not one word")])
async def test_a_token_that_cannot_be_read_fails_the_call_with_its_path(
    tmp_path: Path, content: str | None, said: str
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    async with FakeApiServer() as server:
        client = ApiServer(at(server, token_file=token))
        with pytest.raises(ApiError, match=f"cannot list nodes at .*cannot read token {token}: {said}"):
            await client.list(NODES)
        assert server.requests == []


@needs_openssl
async def test_a_pod_uses_its_service_account(tmp_path: Path) -> None:
    async with FakeApiServer(tls=tmp_path, tokens={"pod"}) as server:
        account = tmp_path / "account"
        account.mkdir()
        (account / "token").write_text("pod")
        shutil.copy(tmp_path / "tls.crt", account / "ca.crt")
        environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port)}
        client = ApiServer(access(None, environ=environ, account=account))
        await client.list(NODES)
        await client.close()


@pytest.mark.parametrize(
    ("environ", "files", "said"),
    [
        ({}, {}, "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, "are not set"),
        ({"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "tcp"}, {}, "PORT is 'tcp'"),
        ({"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "1"}, {}, "ca.crt: No such file"),
        ({"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "1"}, {"ca.crt": "x"}, "ca.crt: "),
    ],
)
def test_what_is_no_pod_says_what_it_lacks(
    tmp_path: Path, environ: dict[str, str], files: dict[str, str], said: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        access(None, environ=environ, account=tmp_path)


def test_an_address_of_ipv6_is_written_in_brackets() -> None:
    assert Access(source="t", host="fd00::1", port=443).authority == "[fd00::1]:443"


# Kubeconfigs


async def test_a_kubeconfig_with_a_token_is_used(tmp_path: Path) -> None:
    async with FakeApiServer(tokens={"abc"}) as server:
        client = ApiServer(access(server.kubeconfig(tmp_path, token="abc")))
        await client.list(NODES)
        await client.close()


async def test_a_token_file_is_found_beside_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc")
    async with FakeApiServer(tokens={"abc"}) as server:
        client = ApiServer(access(server.kubeconfig(tmp_path, tokenFile="token")))
        await client.list(NODES)
        await client.close()


@needs_openssl
@pytest.mark.parametrize("as_data", [False, True], ids=["files", "data"])
async def test_a_client_certificate_is_shown(tmp_path: Path, as_data: bool) -> None:
    async with FakeApiServer(tls=tmp_path) as server:
        server.demand_certificate = True
        user = {"client-certificate": "tls.crt", "client-key": "tls.key"}
        if as_data:
            user = {f"{k}-data": base64.b64encode((tmp_path / v).read_bytes()).decode() for k, v in user.items()}
        client = ApiServer(access(server.kubeconfig(tmp_path, **user)))
        await client.list(NODES)
        await client.close()
        nobody = ApiServer(access(server.kubeconfig(tmp_path)))
        with pytest.raises(ApiError, match=r"401"):
            await nobody.list(NODES)
        await nobody.close()


def edited(path: str, change: Callable[[dict[str, Any]], None]) -> str:
    config = yaml.safe_load(Path(path).read_text())
    change(config["clusters"][0]["cluster"])
    Path(path).write_text(yaml.safe_dump(config))
    return path


@needs_openssl
async def test_a_server_whose_certificate_is_not_trusted_is_not_told_the_token(tmp_path: Path) -> None:
    async with FakeApiServer(tls=tmp_path) as server:
        path = server.kubeconfig(tmp_path, token="secret")
        client = ApiServer(access(edited(path, lambda cluster: cluster.pop("certificate-authority"))))
        with pytest.raises(ApiError, match=r"certificate is not accepted: self.signed certificate"):
            await client.list(NODES)
        client = ApiServer(access(edited(path, lambda cluster: cluster.update({"insecure-skip-tls-verify": True}))))
        await client.list(NODES)
        await client.close()
        assert len(server.requests) == 1


@needs_openssl
async def test_the_name_in_the_servers_certificate_counts(tmp_path: Path) -> None:
    async with FakeApiServer(tls=tmp_path) as server:
        path = server.kubeconfig(tmp_path)
        client = ApiServer(access(edited(path, lambda cluster: cluster.update({"tls-server-name": "other"}))))
        with pytest.raises(ApiError, match=r"certificate is not accepted: .*other"):
            await client.list(NODES)


@needs_openssl
async def test_authorities_are_loaded_once_until_their_file_is_replaced(tmp_path: Path) -> None:
    """A connection that was opened with the old ones is not used any longer."""
    async with FakeApiServer(tls=tmp_path) as server:
        found = access(server.kubeconfig(tmp_path))
        contexts, client, file = TlsContexts(found), ApiServer(found), tmp_path / "tls.crt"
        first = contexts.get()
        await client.list(NODES)
        assert contexts.get() is first
        (tmp_path / "new").write_bytes(file.read_bytes())
        (tmp_path / "new").rename(file)
        assert contexts.get() is not first
        await client.list(NODES)
        await client.list(NODES)
        assert server.connections == 2
        file.unlink()
        await client.list(NODES)  # on the connection that is open
        assert server.connections == 2
        await server.cut()
        with pytest.raises(ApiError, match="cannot read certificate authority"):
            await client.list(NODES)
        await client.close()


async def test_a_path_before_the_api_is_kept(tmp_path: Path) -> None:
    async with FakeApiServer() as server:
        path = edited(server.kubeconfig(tmp_path), lambda cluster: cluster.update(server=f"{server.url}/k8s/c-1/"))
        found = access(path)
        assert (found.path, found.host, found.port) == ("/k8s/c-1", "127.0.0.1", server.port)
        client = ApiServer(found)
        with pytest.raises(ApiError, match=r"404"):
            await client.list(NODES)
        await client.close()


GOOD = {
    "current-context": "c",
    "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    "clusters": [{"name": "k", "cluster": {"server": "https://127.0.0.1:6443"}}],
    "users": [{"name": "u", "user": {}}],
}


def with_user(**user: Any) -> dict[str, Any]:
    return {**GOOD, "users": [{"name": "u", "user": user}]}


def with_cluster(**cluster: Any) -> dict[str, Any]:
    return {**GOOD, "clusters": [{"name": "k", "cluster": {"server": "https://h", **cluster}}]}


EXEC = {"apiVersion": "client.authentication.k8s.io/v1", "command": "x"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "cannot use kubeconfig .*: "),
        ("text", "Expected `object`"),
        ("", "Expected `object`"),
        ("a: \x01", "cannot use kubeconfig .*: "),
        ({**GOOD, "clusters": {}}, r"Expected `array.*`, got `object` - at `\$.clusters`"),
        ({}, "current-context is not set"),
        ({**GOOD, "current-context": "x"}, "current-context 'x' is not in the file"),
        ({**GOOD, "clusters": []}, "cluster 'k' is not in the file"),
        ({**GOOD, "clusters": [{"name": "k"}]}, "cluster 'k' is empty"),
        ({**GOOD, "users": None}, "user 'u' is not in the file"),
        (with_cluster(server="10.0.0.1:6443"), "server '10.0.0.1:6443' is no https"),
        (with_cluster(server="https://h:99999"), "(?i)port out of range"),
        (with_cluster(server=1), r"Expected `str`, got `int` - at `\$.clusters\[0\].cluster.server`"),
        (with_cluster(**{"proxy-url": "http://p"}), "proxy-url is not supported"),
        (with_cluster(**{"certificate-authority": "no.crt"}), "no.crt: No such file"),
        (with_cluster(**{"certificate-authority-data": "%%"}), "certificate-authority-data is not base64"),
        (with_cluster(**{"certificate-authority-data": "YWJj"}), "certificate authority given as data: "),
        (with_user(username="a", password="b"), "username is not supported"),
        (with_user(**{"auth-provider": {"name": "gcp"}}), "auth-provider is not supported"),
        (with_user(**{"as": "root"}), "as is not supported"),
        (with_user(tokenFile="gone"), "cannot read token .*gone: No such file"),
        (with_user(**{"client-certificate": "a"}), "need each other"),
        (with_user(**{"client-certificate": "a", "client-key": "b"}), "a with key .*b: No such file"),
        (with_user(exec={**EXEC, "apiVersion": "client.authentication.k8s.io/v1alpha1"}), "exec.apiVersion is"),
        (with_user(exec={**EXEC, "interactiveMode": "Always"}), "there is no terminal to ask at"),
    ],
)
def test_a_bad_kubeconfig_is_refused_with_place_and_cause(tmp_path: Path, config: Any, said: str) -> None:
    path = tmp_path / "config"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=said) as caught:
        access(str(path))
    assert str(path) in str(caught.value)


def test_a_kubeconfig_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read kubeconfig /nowhere/config: No such file or directory"):
        access("/nowhere/config")


def test_secrets_are_not_shown() -> None:
    shown = repr(Access(source="t", host="h", port=1, token="secret", certificate=(b"secret", b"secret")))
    assert "secret" not in shown


# Programs that say who we are


def program(folder: Path, body: str) -> dict[str, Any]:
    """An exec entry for a Python program that counts its runs in the file `runs`."""
    path = folder / "who"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\nopen({str(folder / 'runs')!r}, 'a').write('x')\n{body}"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**EXEC, "command": "./who", "env": [{"name": "WHO", "value": "me"}]}


def telling(**status: Any) -> str:
    answer = {"apiVersion": EXEC["apiVersion"], "kind": "ExecCredential", "status": status}
    return f"print({json.dumps(json.dumps(answer))})"


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


async def test_a_programs_token_is_remembered_until_it_is_refused(tmp_path: Path) -> None:
    async with FakeApiServer(tokens={"abc"}) as server:
        client = ApiServer(access(server.kubeconfig(tmp_path, exec=program(tmp_path, telling(token="abc")))))
        await client.list(NODES)
        await client.list(NODES)
        assert runs(tmp_path) == 1
        server.fail(401)
        with pytest.raises(ApiError, match=r"401"):
            await client.list(NODES)
        await client.list(NODES)
        assert runs(tmp_path) == 2
        await client.close()


async def test_a_programs_token_is_asked_for_again_before_it_expires(tmp_path: Path) -> None:
    async with FakeApiServer(tokens={"abc"}) as server:
        body = telling(token="abc", expirationTimestamp="2020-01-01T00:00:00Z")
        client = ApiServer(access(server.kubeconfig(tmp_path, exec=program(tmp_path, body))))
        await client.list(NODES)
        await client.list(NODES)
        assert runs(tmp_path) == 2
        await client.close()


@needs_openssl
async def test_a_program_may_give_a_certificate_and_is_told_of_the_cluster(tmp_path: Path) -> None:
    async with FakeApiServer(tls=tmp_path) as server:
        server.demand_certificate = True
        body = (
            "told = json.loads(os.environ['KUBERNETES_EXEC_INFO'])\n"
            f"assert told['spec']['cluster']['server'] == '{server.url}' and os.environ['WHO'] == 'me'\n"
            f"status = {{'clientCertificateData': open('{tmp_path}/tls.crt').read(),"
            f" 'clientKeyData': open('{tmp_path}/tls.key').read()}}\n"
            "print(json.dumps({'apiVersion': told['apiVersion'], 'kind': 'ExecCredential', 'status': status}))"
        )
        entry = {**program(tmp_path, body), "provideClusterInfo": True}
        client = ApiServer(access(server.kubeconfig(tmp_path, exec=entry)))
        await client.list(NODES)
        await client.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('no ticket')", "who: it ended with status 1: no ticket"),
        ("print('{')", "cannot read the answer of .*who"),
        (telling(), "neither a token nor a certificate"),
        (telling(clientKeyData="k"), "neither a token nor a certificate"),
        (telling(token=1), "Expected `str`"),
        ('print(\'{"apiVersion": "v1", "kind": "Pod", "status": {}}\')', "it is a v1 Pod"),
        ("time.sleep(60)", "no whole answer within"),
    ],
)
async def test_a_program_that_fails_fails_the_call(tmp_path: Path, body: str, said: str) -> None:
    async with FakeApiServer() as server:
        found = access(server.kubeconfig(tmp_path, exec=program(tmp_path, body)))
        client = ApiServer(found, timeout_s=0.5 if "sleep" in body else 10)
        with pytest.raises(ApiError, match=f"cannot list nodes at .*{said}"):
            await client.list(NODES)


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with FakeApiServer() as server:
        client = ApiServer(access(server.kubeconfig(tmp_path, exec={**EXEC, "command": "no-such-program"})))
        with pytest.raises(PeerError, match=r"cannot run no-such-program: No such file"):
            await client.list(NODES)


ABSENT = """
import asyncio, os, sys
from nodeagent.errors import PeerError
from nodeagent.kube.apiserver.exec_plugin import VERSIONS, Plugin, run
if os.getuid() == 0:
    os.setuid(65534)
try:
    asyncio.run(run(Plugin(version=VERSIONS[0], command=("no-such-program",), environment=(("PATH", sys.argv[1]),))))
except PeerError as error:
    print(error)
"""
"""Run by a plain user, whom folders may be closed to."""


def test_a_program_that_is_not_there_is_named_also_where_a_folder_of_path_is_closed(tmp_path: Path) -> None:
    """One closed folder must not look as if the program was there and might not run."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    done = subprocess.run(
        [sys.executable, "-c", ABSENT, f"{closed}:/bin"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == (
        f"cannot run no-such-program: No such file or directory; cannot search {closed} of PATH: Permission denied\n"
    )


async def test_a_program_that_may_not_run_is_named_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "program").touch(mode=0o644)
    path = {"name": "PATH", "value": f"/bin:{tmp_path}"}
    async with FakeApiServer() as server:
        client = ApiServer(access(server.kubeconfig(tmp_path, exec={**EXEC, "command": "program", "env": [path]})))
        with pytest.raises(PeerError, match=f"cannot run program: {tmp_path}/program: Permission denied"):
            await client.list(NODES)


def test_the_client_costs_no_new_library() -> None:
    script = "import sys, nodeagent.kube.apiserver.client as a; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert not {"grpc", "h2", "httpx", "httpx2", "lightkube", "kubernetes"} & set(eval(done.stdout))


# The double is as strict as the real server


def shared_capacity(policy: dict[str, Any] | None, *, value: str = "8", shared: bool = True) -> dict[str, Any]:
    amount = {"value": value} | ({"requestPolicy": policy} if policy is not None else {})
    return {"name": "d", "capacity": {"cpus": amount}} | ({"allowMultipleAllocations": True} if shared else {})


def ranged(default: str | None = "1", **limits: str) -> dict[str, Any]:
    return {"validRange": limits} | ({"default": default} if default is not None else {})


COUNTER_SET = {"name": "gpu-0", "counters": {"memory": {"value": "80Gi"}}}
CONSUMES = {"counterSet": "gpu-0", "counters": {"memory": {"value": "10Gi"}}}
TAINT = {"key": "nodeagent.dev/unhealthy", "value": "yes", "effect": "NoSchedule"}


def many(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"name": f"d{number}", **more} for number in range(count)]


@pytest.mark.parametrize(
    "body",
    [
        a_slice(devices=many(128)),
        a_slice(devices=many(64, taints=[TAINT])),
        a_slice(devices=many(2, consumesCounters=[CONSUMES])),
        a_slice(devices=None, sharedCounters=[COUNTER_SET])
        | {"spec": {**a_slice(devices=[])["spec"], "devices": None}},
        a_slice(devices=[shared_capacity(ranged(min="1", step="1", max="8"))]),
        a_slice(devices=[shared_capacity({"default": "2", "validValues": ["2", "4"]})]),
        a_slice(devices=[{"name": "d", "attributes": {"a": {"int": 1}, "dra.cpu/b": {"bool": False}}}]),
        a_slice(devices=[{"name": "d", "attributes": {"v": {"version": "1.2.3-rc.1+x"}, "s": {"string": "x" * 64}}}]),
        a_slice(pool={"name": "a/b.c", "generation": 0, "resourceSliceCount": 3}),
        a_slice(nodeName=None, allNodes=True),
        a_slice(devices=[{"name": "d", "taints": [{"key": "k", "effect": "None"}]}]),
    ],
)
async def test_a_good_slice_is_taken(body: dict[str, Any]) -> None:
    async with pair() as (server, client):
        await client.create(SLICES, body)
        assert server.rejected == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (a_slice(name="Upper"), "metadata.name"),
        (a_slice(driver=""), "spec.driver: Required"),
        (a_slice(driver="x" * 64), "spec.driver: Too long"),
        (a_slice(nodeName=None), "exactly one of"),
        (a_slice(allNodes=True), "exactly one of"),
        (a_slice(allNodes=False), "spec.allNodes"),
        (a_slice(sharedCounters=[COUNTER_SET]), "only one of `sharedCounters` or `devices`"),
        (a_slice(pool={"name": "a//b", "generation": 1, "resourceSliceCount": 1}), "spec.pool.name"),
        (a_slice(pool={"name": "x" * 254, "generation": 1, "resourceSliceCount": 1}), "253"),
        (a_slice(pool={"name": "p", "generation": 1, "resourceSliceCount": 0}), "greater than zero"),
        (a_slice(pool={"name": "p", "generation": -1, "resourceSliceCount": 1}), "greater than or equal"),
        (a_slice(devices=many(129)), "Too many: 129: must have at most 128"),
        (a_slice(devices=many(65, taints=[TAINT])), "at most 64"),
        (a_slice(devices=many(65, consumesCounters=[CONSUMES])), "at most 64"),
        (a_slice(devices=[*many(65), {"name": "l", "attributes": {"a": {"ints": [1]}}}]), "at most 64"),
        (a_slice(devices=[{"name": "d"}, {"name": "d"}]), "Duplicate value"),
        (a_slice(devices=[{"name": "a.b"}]), "RFC 1123 label"),
        (a_slice(devices=[{"name": "x" * 64}]), "RFC 1123 label"),
        (a_slice(devices=[{"name": "d", "attributes": {f"a{n}": {"int": n} for n in range(33)}}]), "exceed 32"),
        (a_slice(devices=[{"name": "d", "attributes": {"a": {}}}]), "exactly one value"),
        (a_slice(devices=[{"name": "d", "attributes": {"a": {"int": 1, "bool": True}}}]), "exactly one value"),
        (a_slice(devices=[{"name": "d", "attributes": {"a": {"string": "x" * 65}}}]), "64 bytes"),
        (a_slice(devices=[{"name": "d", "attributes": {"a": {"version": "535.104"}}}]), "semver"),
        (a_slice(devices=[{"name": "d", "attributes": {"a-b": {"int": 1}}}]), "C identifier"),
        (a_slice(devices=[{"name": "d", "attributes": {"x" * 33: {"int": 1}}}]), "32 bytes"),
        (a_slice(devices=[{"name": "d", "attributes": {"x" * 64 + "/a": {"int": 1}}}]), "63 bytes"),
        (a_slice(devices=[{"name": "d", "taints": [{**TAINT, "effect": "Never"}]}]), "Unsupported value: 'Never'"),
        (a_slice(devices=[{"name": "d", "taints": [{**TAINT, "key": ""}]}]), "key"),
        (a_slice(devices=[{"name": "d", "taints": [{**TAINT, "value": "a b"}]}]), "label"),
        (a_slice(devices=[{"name": "d", "taints": [TAINT] * 17}]), "at most 16"),
        (a_slice(devices=[{"name": "d", "consumesCounters": [CONSUMES, CONSUMES]}]), "Duplicate"),
        (a_slice(devices=[{"name": "d", "consumesCounters": [{**CONSUMES, "counters": {}}]}]), "Required"),
        (a_slice(devices=many(1, consumesCounters=[{**CONSUMES, "counterSet": f"s{n}"} for n in range(3)])), "most 2"),
        (a_slice(devices=[shared_capacity(ranged(min="1"), shared=False)]), "allowMultipleAllocations must be true"),
        (a_slice(devices=[shared_capacity(ranged(None, min="1"))]), "default: Required"),
        (a_slice(devices=[shared_capacity(ranged())]), "min: Required"),
        (a_slice(devices=[shared_capacity(ranged("9", min="9"))]), "min is larger than capacity"),
        (a_slice(devices=[shared_capacity(ranged("1", min="2"))]), "default is less than min"),
        (a_slice(devices=[shared_capacity(ranged(min="1", max="9"))]), "max is larger than capacity"),
        (a_slice(devices=[shared_capacity(ranged(min="1", step="1"), value="1")]), "one step is larger"),
        (a_slice(devices=[shared_capacity(ranged("2", min="1", step="2"))]), "not a multiple"),
        (a_slice(devices=[shared_capacity(ranged("1", min="1", max="8", step="2"))]), "not a multiple"),
        (a_slice(devices=[shared_capacity({"default": "3", "validValues": ["2", "4"]})]), "default value is not"),
        (a_slice(devices=[shared_capacity({"default": "2", "validValues": ["4", "2"]})]), "ascending"),
    ],
)
async def test_a_bad_slice_is_refused_with_every_cause(body: dict[str, Any], said: str) -> None:
    async with pair() as (server, client):
        with pytest.raises(ApiError, match=f"422 Invalid: .*{said}") as caught:
            await client.create(SLICES, body)
        assert caught.value.lasting and server.slices() == []
        assert server.rejected[0]["details"]["causes"]


@pytest.mark.parametrize(
    "devices",
    [
        [{"name": "d", "allowMultipleAllocations": "yes"}],
        [{"name": "d", "unknown": 1}],
        [{"name": "d", "attributes": {"a": {"int": True}}}],
        [{"name": "d", "capacity": {"c": {"value": "lots"}}}],
    ],
)
async def test_a_slice_of_another_shape_is_a_bad_request(devices: list[dict[str, Any]]) -> None:
    async with pair() as (_, client):
        with pytest.raises(ApiError, match=r"400 BadRequest: .*decoding") as caught:
            await client.create(SLICES, a_slice(devices=devices))
        assert caught.value.lasting


@pytest.mark.parametrize(
    "change",
    [{"driver": "other.dev"}, {"nodeName": "other"}, {"pool": {"name": "p", "generation": 1, "resourceSliceCount": 1}}],
)
async def test_what_names_a_slice_is_immutable(change: dict[str, Any]) -> None:
    async with pair() as (_, client):
        await client.create(SLICES, a_slice())
        with pytest.raises(ApiError, match=r"field is immutable"):
            await client.replace(SLICES, a_slice(**change))


async def test_the_server_writes_quantities_and_taints_in_its_own_way() -> None:
    async with pair() as (_, client):
        capacity = {"a": {"value": "1024Mi"}, "b": {"value": 4000}, "c": {"value": "512Mi"}, "d": {"value": "0.5"}}
        stored = await client.create(SLICES, a_slice(devices=[{"name": "d", "capacity": capacity, "taints": [TAINT]}]))
        device = stored["spec"]["devices"][0]
        assert {name: one["value"] for name, one in device["capacity"].items()} == {
            "a": "1Gi",
            "b": "4k",
            "c": "512Mi",
            "d": "500m",
        }
        assert device["taints"][0]["timeAdded"].endswith("Z")


async def test_the_server_dates_taints_that_have_no_date_at_every_write() -> None:
    """As SetDefaults of DeviceTaint does: also at a write that concerns another device."""
    async with pair() as (server, client):
        server.clock = lambda: 1_000.0
        stored = await client.create(SLICES, a_slice(devices=[{"name": "d", "taints": [TAINT]}]))
        assert stored["spec"]["devices"][0]["taints"][0]["timeAdded"] == "1970-01-01T00:16:40Z"
        server.clock = lambda: 2_000.0
        dated = {**TAINT, "timeAdded": "1970-01-01T00:00:01Z"}
        devices = [{"name": "d", "taints": [TAINT]}, {"name": "e", "taints": [dated]}]
        stored = await client.replace(SLICES, {**stored, "spec": {**stored["spec"], "devices": devices}})
        found = [one["taints"][0]["timeAdded"] for one in stored["spec"]["devices"]]
        assert found == ["1970-01-01T00:33:20Z", "1970-01-01T00:00:01Z"]


async def test_an_older_server_drops_fields_without_a_word() -> None:
    async with pair() as (server, client):
        server.dropped_fields |= {CONSUMABLE, COUNTERS, TAINTS}
        device = shared_capacity(ranged(min="1")) | {"taints": [TAINT], "consumesCounters": [CONSUMES]}
        stored = await client.create(SLICES, a_slice(devices=[device]))
        assert stored["spec"]["devices"] == [{"name": "d", "capacity": {"cpus": {"value": "8"}}}]


async def test_a_kubelet_that_starts_wipes_the_slices_of_its_node_alone() -> None:
    async with pair() as (server, client):
        await client.create(SLICES, a_slice("ours"))
        server.add("resourceslices", a_slice("theirs", nodeName="worker-2"))
        server.wipe(NODE)
        assert [one["metadata"]["name"] for one in server.slices()] == ["theirs"]


async def test_an_unknown_field_cannot_be_selected() -> None:
    async with pair() as (_, client):
        with pytest.raises(ApiError, match=r"field label not supported"):
            await client.list(SLICES, fields={"spec.pool.name": "p"})


async def test_the_double_counts_reads_and_writes() -> None:
    async with pair() as (server, client):
        await client.create(SLICES, a_slice())
        await client.list(SLICES)
        await client.get(PODS, "p", "default")
        assert (server.writes, server.reads, server.count("list", "resourceslices")) == (1, 2, 1)
