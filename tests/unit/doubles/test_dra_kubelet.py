"""The fake kubelet is strict: what a plugin does against the contract is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from nodeagent.aio.revision import Revision
from nodeagent.pb import dra_v1_pb2, drahealth_v1alpha1_pb2
from nodeagent.pb import pluginregistration_pb2 as pb
from tests.doubles import dra_kubelet as drakubelet
from tests.doubles.dra_kubelet import DraCallError, FakeDraKubelet
from tests.pb import dra_v1_pb2_grpc, drahealth_v1alpha1_pb2_grpc
from tests.pb import pluginregistration_pb2_grpc as rpc
from tests.support import channels
from tests.support.claim_desk import ref

DRIVER = "example.com"


class Rogue(
    rpc.RegistrationServicer, dra_v1_pb2_grpc.DRAPluginServicer, drahealth_v1alpha1_pb2_grpc.DRAResourceHealthServicer
):
    """A plugin that says what it is told to."""

    def __init__(self, folder: Path, **info: Any) -> None:
        self.socket = folder / "plugins" / "rogue.sock"
        good = {
            "type": "DRAPlugin",
            "name": DRIVER,
            "endpoint": str(self.socket),
            "supported_versions": ["v1.DRAPlugin"],
        }
        self.info = pb.PluginInfo(**{**good, **info})
        self.slow = False
        self.answers: Mapping[str, dict[str, Any]] | None = {}
        self.health: list[dict[str, Any]] = []
        self.ended = asyncio.Event()
        self.told: list[tuple[bool, str]] = []
        self._heard = Revision()

    async def wait_told(self, times: int) -> tuple[bool, str]:
        """What kubelet said of the registration, that many times in."""
        async with asyncio.timeout(10):
            while len(self.told) < times:
                await self._heard.changed(self._heard.value)
        return self.told[times - 1]

    def add_to(self, server: grpc.aio.Server) -> None:
        rpc.add_RegistrationServicer_to_server(self, server)
        dra_v1_pb2_grpc.add_DRAPluginServicer_to_server(self, server)
        drahealth_v1alpha1_pb2_grpc.add_DRAResourceHealthServicer_to_server(self, server)

    async def GetInfo(self, request: Any, context: Any) -> pb.PluginInfo:  # noqa: N802
        if self.slow:
            await asyncio.Event().wait()
        return self.info

    async def NotifyRegistrationStatus(self, request: Any, context: Any) -> pb.RegistrationStatusResponse:  # noqa: N802
        self.told.append((request.plugin_registered, request.error))
        self._heard.bump()
        return pb.RegistrationStatusResponse()

    async def NodePrepareResources(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.slow:
            await asyncio.Event().wait()
        if self.answers is None:
            await context.abort(grpc.StatusCode.INTERNAL, "out of order")
        claims = {uid: _claim(**one) for uid, one in self.answers.items()}
        return dra_v1_pb2.NodePrepareResourcesResponse(claims=claims)

    async def NodeUnprepareResources(self, request: Any, context: Any) -> Any:  # noqa: N802
        return dra_v1_pb2.NodeUnprepareResourcesResponse()

    async def NodeWatchResources(self, request: Any, context: Any) -> None:  # noqa: N802
        health = drahealth_v1alpha1_pb2
        await context.write(health.NodeWatchResourcesResponse(devices=[_health(**one) for one in self.health]))
        await self.ended.wait()
        self.ended.clear()
        self.health = []


def _claim(error: str = "", devices: Any = ()) -> Any:
    return dra_v1_pb2.NodePrepareResourceResponse(error=error, devices=[dra_v1_pb2.Device(**one) for one in devices])


def _health(pool_name: str = "pool", device_name: str = "gpu-0", **other: Any) -> Any:
    device = drahealth_v1alpha1_pb2.DeviceIdentifier(pool_name=pool_name, device_name=device_name)
    usual = {"health": 1, "last_updated_time": int(time.time()), "health_check_timeout_seconds": 30}
    return drahealth_v1alpha1_pb2.DeviceHealth(device=device, **{**usual, **other})


@contextlib.asynccontextmanager
async def offered(rogue: Rogue, kubelet: FakeDraKubelet, name: str = "rogue-reg.sock") -> AsyncIterator[Rogue]:
    rogue.socket.parent.mkdir(parents=True, exist_ok=True)
    servers = [await channels.serve(path, rogue.add_to) for path in (rogue.socket, kubelet.registry / name)]
    try:
        yield rogue
    finally:
        await asyncio.gather(*(server.stop(0) for server in servers))


@contextlib.asynccontextmanager
async def watching(folder: Path, **how: Any) -> AsyncIterator[FakeDraKubelet]:
    """A kubelet whose violations the test looks at itself."""
    kubelet = FakeDraKubelet(folder, **how)
    await kubelet.start()
    try:
        yield kubelet
    finally:
        await kubelet.stop()


async def violation(kubelet: FakeDraKubelet) -> str:
    """The first one, once there is one; leaving such a kubelet raises it."""
    async with asyncio.timeout(10):
        await kubelet.until(lambda: bool(kubelet.violations))
    with pytest.raises(ExceptionGroup):
        kubelet.check()
    return str(kubelet.violations[0])


@pytest.mark.parametrize(
    ("info", "what"),
    [
        ({"type": "DevicePlugin"}, "no handler registered for plugin type: DevicePlugin"),
        ({"name": "No_Driver"}, "'No_Driver' is no name of a driver"),
        ({"endpoint": "dra.sock"}, "endpoint 'dra.sock' must be an absolute path"),
        ({"endpoint": "/run/%2e%2e/dra.sock"}, "endpoint '/run/%2e%2e/dra.sock' must be a plain path"),
        ({"endpoint": "/run/dra.sock?x"}, "endpoint '/run/dra.sock?x' must be a plain path"),
        ({"endpoint": "/" + "x" * 107}, "must not be longer than 108 bytes"),
        ({"endpoint": "/dev/null"}, "endpoint '/dev/null' is not the absolute path of a socket"),
        ({"supported_versions": []}, "supported versions []: none"),
        ({"supported_versions": ["1.0.0"]}, "supported versions ['1.0.0']: ['1.0.0']"),
        ({"supported_versions": ["v1beta1.DRAPlugin", "v1.DRAPlugin"]}, "are not newest first"),
        ({"supported_versions": ["v1.DRAPlugin", "v1.DRAPlugin"]}, "are not newest first"),
    ],
)
async def test_a_plugin_that_introduces_itself_wrongly_is_refused(
    info: dict[str, Any], what: str, folder: Path
) -> None:
    """It is told why, and never registered."""
    async with watching(folder) as kubelet, offered(Rogue(folder, **info), kubelet) as rogue:
        assert what in await violation(kubelet)
        taken, error = await rogue.wait_told(1)
        assert not taken
        assert what in error
        assert kubelet.plugins == {}


async def test_a_plugin_that_thinks_before_it_says_its_name_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second is all there is."""
    monkeypatch.setattr(drakubelet, "GET_INFO_S", 0.05)
    rogue = Rogue(folder)
    rogue.slow = True
    async with watching(folder) as kubelet, offered(rogue, kubelet):
        assert await violation(kubelet) == "GetInfo takes more than 0.05 s"


async def test_a_socket_whose_name_starts_with_a_dot_is_not_looked_at(folder: Path) -> None:
    """One that comes after it is registered first."""
    async with watching(folder) as kubelet, offered(Rogue(folder), kubelet, ".rogue.sock") as hidden:
        async with offered(Rogue(folder / "other", name="other.dev"), kubelet, "other.sock"):
            await kubelet.wait_registered("other.dev")
        assert hidden.told == []


async def test_one_endpoint_is_registered_once(folder: Path) -> None:
    """A second socket for it is refused with kubelet's words."""
    async with watching(folder) as kubelet, offered(Rogue(folder), kubelet) as rogue:
        await kubelet.wait_registered(DRIVER)
        server = await channels.serve(kubelet.registry / "again.sock", rogue.add_to)
        try:
            taken, error = await rogue.wait_told(2)
        finally:
            await server.stop(0)
    assert not taken
    assert error == f"endpoint {rogue.socket} already registered for DRA driver plugin {DRIVER}"


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ({}, "skipped ['uid-1']"),
        ({"uid-1": {}, "uid-2": {}}, "result for unknown claim UID ['uid-2']"),
        ({"uid-1": {"error": "no", "devices": [{"pool_name": "p", "device_name": "d"}]}}, "both devices and an error"),
        ({"uid-1": {"devices": [{"device_name": "d"}]}}, "no pool"),
        ({"uid-1": {"devices": [{"pool_name": "p"}]}}, "no DNS label"),
        ({"uid-1": {"devices": [{"pool_name": "p", "device_name": "d", "cdi_device_ids": ["x"]}]}}, "no CDI device"),
        ({"uid-1": {"devices": [{"pool_name": "p", "device_name": "d", "share_id": ""}]}}, "set and empty"),
        ({"uid-1": {"devices": [{"pool_name": "p", "device_name": "d", "request_names": [""]}]}}, "name of a request"),
        ({"uid-1": {"devices": [{"pool_name": "p", "device_name": "d"}] * 2}}, "stands twice"),
        (None, "a call failed as a whole: INTERNAL: out of order"),
    ],
)
async def test_an_answer_against_the_contract_is_noticed(answers: Any, what: str, folder: Path) -> None:
    """Each of them would keep pods from starting."""
    rogue = Rogue(folder)
    rogue.answers = answers
    async with watching(folder) as kubelet, offered(rogue, kubelet):
        await kubelet.wait_registered(DRIVER)
        with contextlib.suppress(DraCallError):
            await kubelet.prepare(DRIVER, [ref(1)])
        assert what in await violation(kubelet)


async def test_unprepare_that_forgets_a_claim_is_noticed(folder: Path) -> None:
    """As in prepare."""
    async with watching(folder) as kubelet, offered(Rogue(folder), kubelet):
        await kubelet.wait_registered(DRIVER)
        await kubelet.unprepare(DRIVER, [ref(1)])
        assert "skipped ['uid-1']" in await violation(kubelet)


async def test_a_plugin_that_lets_kubelet_wait_is_noticed(folder: Path) -> None:
    """The call fails when its time is over."""
    rogue = Rogue(folder)
    async with watching(folder) as kubelet, offered(rogue, kubelet):
        await kubelet.wait_registered(DRIVER)
        rogue.slow = True
        with pytest.raises(DraCallError) as caught:
            await kubelet.prepare(DRIVER, [ref(1)], timeout_s=0.05)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "DEADLINE_EXCEEDED" in await violation(kubelet)


async def test_without_a_plugin_there_is_nobody_to_call(folder: Path) -> None:
    """That is the node's state, no plugin's fault."""
    async with FakeDraKubelet(folder) as kubelet:
        with pytest.raises(DraCallError, match="is not registered"):
            await kubelet.prepare(DRIVER, [ref(1)])


@pytest.mark.parametrize(
    ("health", "what"),
    [
        ([{}, {}], "stands twice"),
        ([{"pool_name": ""}], "no pool"),
        ([{"last_updated_time": 1}], "which is not now"),
        ([{"health_check_timeout_seconds": -1}], "a time-out of -1 s"),
        ([{"health": 0}], "it is not said why"),
    ],
)
async def test_a_list_of_health_against_the_contract_is_noticed(health: Any, what: str, folder: Path) -> None:
    """Kubelet would show something else than was meant."""
    rogue = Rogue(folder)
    rogue.health = health
    async with watching(folder) as kubelet, offered(rogue, kubelet):
        assert what in await violation(kubelet)


async def test_health_is_forgotten_when_it_is_old_and_when_its_stream_ends(folder: Path) -> None:
    """Old health is unknown; none is none."""
    rogue = Rogue(folder)
    rogue.health = [{"message": "fine", "health_check_timeout_seconds": 20}]
    async with watching(folder) as kubelet, offered(rogue, kubelet):
        await kubelet.wait_health(DRIVER, "pool", "gpu-0", "HEALTHY")
        kubelet.age(15)
        assert kubelet.health(DRIVER) == {("pool", "gpu-0"): ("HEALTHY", "fine")}
        kubelet.age(15)
        assert kubelet.health(DRIVER) == {("pool", "gpu-0"): ("UNKNOWN", "")}
        rogue.ended.set()
        await kubelet.until(lambda: kubelet.health(DRIVER) == {})


async def test_a_refusal_on_purpose_ends_when_it_was_told_to(folder: Path) -> None:
    """The next try is taken; no rule was violated."""
    async with FakeDraKubelet(folder) as kubelet:
        kubelet.refuse(DRIVER, 2)
        async with offered(Rogue(folder), kubelet) as rogue:
            await kubelet.wait_registered(DRIVER)
    assert [taken for taken, _ in rogue.told] == [False, False, True]
