"""The DRA calls over a real socket, in both versions: each claim has its own answer, whatever happens to others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs

from nodeagent.core.model.claim import ClaimRef, Prepared, PreparedDevice
from nodeagent.errors import InputError, NodeagentError, PeerError, Refused, StateError
from nodeagent.kube.kubelet import dra_plugin as dra
from nodeagent.kube.kubelet import sockets
from nodeagent.pb import dra_v1_pb2, dra_v1beta1_pb2
from tests.pb import dra_v1_pb2_grpc, dra_v1beta1_pb2_grpc
from tests.support import channels
from tests.support.claim_desk import POOL, Desk, device, ref

V1 = (dra_v1_pb2, dra_v1_pb2_grpc.DRAPluginStub)
V1BETA1 = (dra_v1beta1_pb2, dra_v1beta1_pb2_grpc.DRAPluginStub)
both_versions = pytest.mark.parametrize("version", [V1, V1BETA1], ids=["v1", "v1beta1"])


class Client:
    """Calls one version and gives back the answers by UID."""

    def __init__(self, version: Any, channel: grpc.aio.Channel) -> None:
        self._pb, stub = version
        self.stub = stub(channel)

    async def prepare(self, *claims: ClaimRef) -> dict[str, Any]:
        request = self._pb.NodePrepareResourcesRequest(claims=[*map(self._claim, claims)])
        return dict((await self.stub.NodePrepareResources(request, timeout=20)).claims)

    async def unprepare(self, *claims: ClaimRef) -> dict[str, str]:
        request = self._pb.NodeUnprepareResourcesRequest(claims=[*map(self._claim, claims)])
        answer = await self.stub.NodeUnprepareResources(request, timeout=20)
        return {uid: one.error for uid, one in answer.claims.items()}

    def _claim(self, one: ClaimRef) -> Any:
        return self._pb.Claim(namespace=one.namespace, name=one.name, uid=one.uid)


@contextlib.asynccontextmanager
async def served(
    desk: dra.ClaimHandler, folder: Path, version: Any = V1, call_s: float = 20.0
) -> AsyncIterator[Client]:
    """The desk behind its socket, and a client of it."""
    path = folder / "dra.sock"
    server = await sockets.serve(path, lambda server: dra.add_to(server, desk, call_s=call_s))
    try:
        async with channels.channel(path) as channel:
            yield Client(version, channel)
    finally:
        await server.stop(0)


@both_versions
async def test_a_claim_is_prepared_and_unprepared(version: Any, folder: Path) -> None:
    """Requests, pool, device and CDI names arrive as they were given."""
    desk = Desk()
    async with served(desk, folder, version) as client:
        answers = await client.prepare(ref(1))
        (one,) = answers["uid-1"].devices
        assert (one.pool_name, one.device_name) == (POOL, "cpu-0")
        assert [*one.request_names] == ["cpus"]
        assert [*one.cdi_device_ids] == ["nodeagent.dev/claim=uid-1"]
        assert desk.held == {"uid-1"}
        assert await client.unprepare(ref(1)) == {"uid-1": ""}
        assert desk.held == set()


async def test_a_share_is_named_in_v1_alone_and_only_where_there_is_one(folder: Path) -> None:
    """v1beta1 has no field for it; an empty one must not be set."""
    desk = Desk()
    async with served(desk, folder) as client:
        (one,) = (await client.prepare(ref(1)))["uid-1"].devices
        assert not one.HasField("share_id")
        desk.share_id = "7f0c"
        (one,) = (await client.prepare(ref(1)))["uid-1"].devices
        assert one.share_id == "7f0c"
    async with served(desk, folder, V1BETA1) as client:
        (one,) = (await client.prepare(ref(1)))["uid-1"].devices
        assert (one.device_name, one.pool_name) == ("cpu-0", POOL)


@both_versions
async def test_thirty_two_claims_are_one_piece_of_work(version: Any, folder: Path) -> None:
    """One call to the agent, hence one durable write; the answer holds exactly the 32."""
    desk, claims = Desk(), [ref(number) for number in range(32)]
    async with served(desk, folder, version) as client:
        answers = await client.prepare(*claims)
        assert answers.keys() == {one.uid for one in claims}
        assert all(one.devices and not one.error for one in answers.values())
        assert await client.unprepare(*claims) == {one.uid: "" for one in claims}
    assert [(verb, len(uids)) for verb, uids in desk.calls] == [("prepare", 32), ("unprepare", 32)]


async def test_one_claim_that_fails_leaves_its_neighbours_prepared(folder: Path) -> None:
    """Its error is its own; devices alongside an error are not sent."""
    desk = Desk()
    desk.results["uid-1"] = Prepared(devices=(device("uid-1"),), error="cannot prepare claim default/claim-1: no")
    async with served(desk, folder) as client:
        answers = await client.prepare(ref(0), ref(1), ref(2))
    assert answers["uid-1"].error == "cannot prepare claim default/claim-1: no"
    assert not answers["uid-1"].devices
    assert [len(answers[uid].devices) for uid in ("uid-0", "uid-2")] == [1, 1]
    assert not answers["uid-0"].error + answers["uid-2"].error


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        Prepared(devices=(None,)),
        Prepared(devices=(PreparedDevice(requests=("a",), pool="p\udcff", device="d"),)),
        Prepared(devices=(PreparedDevice(requests=(1,), pool="p", device="d"),)),
    ],
    ids=["none", "number", "no-device", "no-utf-8", "no-text"],
)
async def test_a_result_that_cannot_be_sent_is_that_claim_s_error(bad: Any, folder: Path) -> None:
    """The neighbour in the same call is prepared."""
    desk = Desk()
    desk.results["uid-1"] = bad
    async with served(desk, folder) as client:
        with capture_logs() as lines:
            answers = await client.prepare(ref(0), ref(1))
    assert answers["uid-0"].devices
    assert answers["uid-1"].error.startswith("cannot prepare claim default/claim-1: unexpected ")
    (line,) = [one for one in lines if one["event"] == "claim-not-sent"]
    assert desk.ops[0] in answers["uid-1"].error
    assert (line["uid"], line["log_level"]) == ("uid-1", "error")


async def test_no_answer_to_unprepare_is_never_taken_for_success(folder: Path) -> None:
    """None would go over the wire as an empty error."""
    desk = Desk()
    desk.results["uid-1"] = None
    async with served(desk, folder) as client:
        answers = await client.unprepare(ref(0), ref(1))
    assert answers["uid-0"] == ""
    assert answers["uid-1"].startswith("cannot unprepare claim default/claim-1: unexpected TypeError")


@both_versions
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Refused("too few CPUs", want=4, free=1, unit="CPUs"), "cannot prepare claim default/claim-1: too few CPUs"),
        (StateError("cannot save the ledger: disk full"), "cannot save the ledger: disk full"),
        (InputError(""), "cannot prepare claim default/claim-1: InputError"),
        (OSError(28, "No space left on device"), "cannot prepare claim default/claim-1: [Errno 28] No space left"),
        (TimeoutError(), "cannot prepare claim default/claim-1: TimeoutError"),
        (PeerError("cannot read \udcff: no"), "cannot read \\udcff: no"),
        (ZeroDivisionError("x"), "cannot prepare claim default/claim-1: unexpected ZeroDivisionError, see op "),
        (asyncio.CancelledError(), "cannot prepare claim default/claim-1: it was cancelled"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_whatever_is_raised_is_an_error_of_each_claim(
    version: Any, fault: BaseException, text: str, folder: Path
) -> None:
    """The call itself succeeds, and no error is empty: that would mean success."""
    desk = Desk()
    desk.fault = fault
    async with served(desk, folder, version) as client:
        answers = await client.prepare(ref(1), ref(2))
        assert answers.keys() == {"uid-1", "uid-2"}
        assert answers["uid-1"].error.startswith(text)
        assert answers["uid-2"].error
        assert (await client.unprepare(ref(1)))["uid-1"]


async def test_claims_left_out_or_added_are_mended(folder: Path) -> None:
    """Kubelet fails every claim of an answer that holds one too few or one too many."""
    desk = Desk()
    desk.left_out = {"uid-1"}
    desk.results["uid-9"] = Prepared(devices=(device("uid-9"),))
    async with served(desk, folder) as client:
        with capture_logs() as lines:
            answers = await client.prepare(ref(0), ref(1))
    assert answers.keys() == {"uid-0", "uid-1"}
    assert not answers["uid-0"].error
    assert answers["uid-1"].error.startswith("cannot prepare claim default/claim-1: unexpected KeyError")
    (line,) = [one for one in lines if one["event"] == "claims-not-as-asked"]
    assert (line["missing"], line["unasked"]) == (["uid-1"], ["uid-9"])


@both_versions
async def test_a_claim_that_stands_twice_is_asked_for_once(version: Any, folder: Path) -> None:
    """The very same one is one; one UID under two names is refused, and its neighbour prepared."""
    desk = Desk()
    async with served(desk, folder, version) as client:
        answers = await client.prepare(ref(1), ref(1), ref(2))
        assert desk.calls == [("prepare", ["uid-1", "uid-2"])]
        assert answers.keys() == {"uid-1", "uid-2"}
        answers = await client.prepare(ref(1), ref("other", uid="uid-1"), ref(2))
        assert desk.calls[-1] == ("prepare", ["uid-2"])
    assert answers["uid-1"].error == (
        "cannot prepare claim default/claim-other: uid uid-1 is asked for twice, also as default/claim-1"
    )
    assert answers["uid-2"].devices


@both_versions
@pytest.mark.parametrize("uid", ["", "../../etc/passwd", "a b", ".", "-x", "x" * 129, "ü"])
async def test_a_uid_that_cannot_be_one_is_refused_for_itself(version: Any, uid: str, folder: Path) -> None:
    """It reaches no handler; the claim alongside it is served."""
    desk, odd = Desk(), ClaimRef(namespace="default", name="odd", uid=uid)
    async with served(desk, folder, version) as client:
        answers = await client.prepare(odd, ref(1))
        gone = await client.unprepare(odd, ref(1))
    assert desk.calls == [("prepare", ["uid-1"]), ("unprepare", ["uid-1"])]
    assert f"cannot prepare claim default/odd: uid {uid!r}" in answers[uid].error
    assert f"cannot unprepare claim default/odd: uid {uid!r}" in gone[uid]
    assert (answers["uid-1"].error, gone["uid-1"]) == ("", "")


async def test_a_claim_without_a_name_is_unprepared_and_not_prepared(folder: Path) -> None:
    """What is held is found by the UID; what is to be read from the API server needs its name."""
    desk, nameless = Desk(), ClaimRef(namespace="", name="", uid="uid-1")
    async with served(desk, folder) as client:
        assert "it has namespace '' and name ''" in (await client.prepare(nameless))["uid-1"].error
        assert await client.unprepare(nameless) == {"uid-1": ""}
    assert desk.calls == [("unprepare", ["uid-1"])]


@both_versions
async def test_a_request_without_claims_has_an_empty_answer(version: Any, folder: Path) -> None:
    """It calls no handler."""
    desk = Desk()
    async with served(desk, folder, version) as client:
        assert await client.prepare() == {}
        assert await client.unprepare() == {}
    assert desk.calls == []


async def test_every_call_has_an_op_id_of_its_own_that_the_work_logs_under(folder: Path) -> None:
    """The same that is handed over."""
    bound = []

    class Clerk(Desk):
        async def _turn(self, *call: Any) -> None:
            bound.append(get_contextvars()["op"])
            await super()._turn(*call)

    desk = Clerk()
    async with served(desk, folder) as client:
        await client.prepare(ref(1))
        await client.unprepare(ref(1))
    assert desk.ops == bound
    assert len({*bound}) == 2


@both_versions
async def test_claims_that_take_too_long_are_told_so_and_finished(version: Any, folder: Path) -> None:
    """Before kubelet gives up; its next try finds them done."""
    desk = Desk()
    desk.free.clear()
    async with served(desk, folder, version, call_s=0.05) as client:
        answers = await client.prepare(ref(1), ref(2))
        assert {one.error.partition(": ")[2] for one in answers.values()} == {
            "not done after 0.05 s, and still under way"
        }
        assert not desk.done.is_set()
        desk.free.set()
        await desk.done.wait()
        assert desk.held == {"uid-1", "uid-2"}
        assert (await client.prepare(ref(1)))["uid-1"].devices


async def test_kubelet_that_hangs_up_in_the_middle_leaves_no_half_work(folder: Path) -> None:
    """The work goes on to its end; other calls are served meanwhile."""
    desk = Desk()
    desk.free.clear()
    async with served(desk, folder) as client:
        call = asyncio.create_task(client.prepare(ref(1)))
        await desk.busy.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await client.prepare() == {}
        assert not desk.done.is_set()
        desk.free.set()
        await desk.done.wait()
        assert (await client.prepare(ref(1)))["uid-1"].devices
    assert desk.held == {"uid-1"}


async def test_work_that_fails_when_nobody_waits_any_longer_is_said(folder: Path) -> None:
    """In the log, once."""
    desk = Desk()
    desk.free.clear()
    desk.fault = NodeagentError("cannot do it: late")
    async with served(desk, folder, call_s=0.05) as client:
        await client.prepare(ref(1))
        with capture_logs() as lines:
            desk.free.set()
            await desk.done.wait()
            await client.prepare()
    assert [(one["event"], one["error"]) for one in lines] == [("claims-failed", "cannot do it: late")]
