"""Health over a real socket, in both versions: complete, at once, on every change, and often enough."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from nodeagent.kube.kubelet import dra_health as drahealth
from nodeagent.kube.kubelet import sockets
from nodeagent.pb import drahealth_v1_pb2, drahealth_v1alpha1_pb2
from tests.pb import drahealth_v1_pb2_grpc, drahealth_v1alpha1_pb2_grpc
from tests.support import channels
from tests.support.claim_desk import POOL, Vitals

V1 = (drahealth_v1_pb2, drahealth_v1_pb2_grpc.DRAResourceHealthStub)
V1ALPHA1 = (drahealth_v1alpha1_pb2, drahealth_v1alpha1_pb2_grpc.DRAResourceHealthStub)
both_versions = pytest.mark.parametrize("version", [V1, V1ALPHA1], ids=["v1", "v1alpha1"])
LONG_S = 1000.0


class Stream:
    """One stream as kubelet has it."""

    def __init__(self, version: Any, channel: grpc.aio.Channel) -> None:
        self._pb, stub = version
        self.call = stub(channel).NodeWatchResources(self._pb.NodeWatchResourcesRequest())

    async def next(self) -> Any:
        async with asyncio.timeout(10):
            message = await self.call.read()
        assert message is not grpc.aio.EOF
        return message

    async def states(self) -> dict[str, tuple[str, str]]:
        """(health, message) by device."""
        devices = (await self.next()).devices
        return {one.device.device_name: (self._pb.HealthStatus.Name(one.health), one.message) for one in devices}


class Stand:
    """What serves, and how many streams are open."""

    def __init__(self) -> None:
        self.ending = asyncio.Event()
        self.streams = 0
        self._changed = asyncio.Event()

    def count(self, change: int) -> None:
        self.streams += change
        self._changed.set()

    async def all_closed(self) -> None:
        """Wait for the server's side of every stream: kubelet's side may have its answer a moment earlier."""
        async with asyncio.timeout(10):
            while self.streams:
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def streaming(
    vitals: Vitals, folder: Path, version: Any = V1, *, heartbeat_s: float = LONG_S
) -> AsyncIterator[tuple[Stream, Stand]]:
    stand, path = Stand(), folder / "dra.sock"

    def add(server: grpc.aio.Server) -> None:
        drahealth.add_to(server, vitals, stand.ending, heartbeat_s=heartbeat_s, on_watch=stand.count)

    server = await sockets.serve(path, add)
    try:
        async with channels.channel(path) as channel:
            yield Stream(version, channel), stand
    finally:
        await server.stop(0)


@both_versions
async def test_the_whole_list_comes_at_once_and_after_each_change(version: Any, folder: Path) -> None:
    """Also the devices that did not change, in a fixed order; one that is gone is left out."""
    vitals = Vitals(("gpu-1", HEALTHY), ("gpu-0", HEALTHY))
    async with streaming(vitals, folder, version) as (stream, _):
        first = await stream.states()
        assert first == {"gpu-0": ("HEALTHY", ""), "gpu-1": ("HEALTHY", "")}
        assert [*first] == ["gpu-0", "gpu-1"]
        vitals.put("gpu-0", UNHEALTHY, "Xid 79")
        assert await stream.states() == {"gpu-0": ("UNHEALTHY", "Xid 79"), "gpu-1": ("HEALTHY", "")}
        vitals.drop("gpu-0")
        assert await stream.states() == {"gpu-1": ("HEALTHY", "")}


@both_versions
async def test_a_list_says_when_it_is_true_and_for_how_long(version: Any, folder: Path) -> None:
    """True now, whenever the state began: else kubelet would take an old state for unknown."""
    async with streaming(Vitals(("gpu-0", HEALTHY)), folder, version) as (stream, _):
        (one,) = (await stream.next()).devices
    assert one.device.pool_name == POOL
    assert abs(time.time() - one.last_updated_time) <= 5
    assert one.health_check_timeout_seconds == 30


@both_versions
@pytest.mark.parametrize(("state", "message"), [(UNKNOWN, ""), ("lost", ""), (UNKNOWN, "NVML hangs")])
async def test_what_is_not_known_is_said_to_be_unknown_with_a_reason(
    version: Any, state: str, message: str, folder: Path
) -> None:
    """Never left out, never healthy; a state that this build does not know is unknown too."""
    vitals = Vitals()
    vitals.put("gpu-0", state, message)
    async with streaming(vitals, folder, version) as (stream, _):
        assert await stream.states() == {"gpu-0": ("UNKNOWN", message or "health is not known yet")}


async def test_a_list_is_sent_again_before_kubelet_forgets_it(folder: Path) -> None:
    """Without any change, also while the source of changes hangs."""
    vitals = Vitals(("gpu-0", HEALTHY))
    vitals.hangs = True
    async with streaming(vitals, folder, heartbeat_s=0.02) as (stream, _):
        for _ in range(3):
            assert await stream.states() == {"gpu-0": ("HEALTHY", "")}
    assert 2 * drahealth.HEARTBEAT_S < drahealth.TIMEOUT_S


async def test_changes_that_change_nothing_neither_send_nor_put_the_next_list_off(folder: Path) -> None:
    """The version may rise as often as it likes."""
    vitals, heartbeat_s, bumps = Vitals(("gpu-0", HEALTHY)), 0.3, 0
    async with streaming(vitals, folder, heartbeat_s=heartbeat_s) as (stream, _):
        await stream.next()
        begun = time.monotonic()
        coming = asyncio.create_task(stream.next())
        while not coming.done():
            vitals.revision.bump()
            bumps += 1
            await asyncio.wait({coming}, timeout=0.01)
        assert (await coming).devices
        assert time.monotonic() - begun >= heartbeat_s - 0.1
        assert bumps > 5


async def test_a_long_message_is_cut_between_two_characters(folder: Path) -> None:
    """Kubelet takes 1024 bytes."""
    vitals = Vitals()
    vitals.put("gpu-0", UNHEALTHY, "x" + "ü" * 600)
    async with streaming(vitals, folder) as (stream, _):
        ((_, message),) = (await stream.states()).values()
    assert message == "x" + "ü" * 511


@both_versions
async def test_the_end_of_the_agent_ends_the_stream_in_order(version: Any, folder: Path) -> None:
    """And the count of streams is what is open."""
    async with streaming(Vitals(("gpu-0", HEALTHY)), folder, version) as (stream, stand):
        await stream.next()
        assert stand.streams == 1
        stand.ending.set()
        assert await stream.call.read() is grpc.aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK
        await stand.all_closed()


async def test_a_list_that_cannot_be_had_ends_the_stream_with_an_error(folder: Path) -> None:
    """So kubelet forgets what it knew, rather than believe it; the next stream may be better."""
    vitals = Vitals(("gpu-0", HEALTHY))
    async with streaming(vitals, folder) as (stream, stand):
        await stream.next()
        with capture_logs() as lines:
            vitals.fault = KeyError("gpu-0")
            vitals.revision.bump()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.next()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "cannot send the health of devices: unexpected KeyError, see the agent's log"
        assert [one["event"] for one in lines] == ["health-not-sent"]
        await stand.all_closed()


async def test_a_kubelet_that_is_gone_leaves_no_stream_and_no_complaint(folder: Path) -> None:
    """Also where it hangs up while list after list is sent."""
    with capture_logs() as lines:
        async with streaming(Vitals(("gpu-0", HEALTHY)), folder, heartbeat_s=0.001) as (stream, stand):
            await stream.next()
            stream.call.cancel()
            await stand.all_closed()
    assert lines == []
