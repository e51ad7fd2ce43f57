"""Allocate with one id over the unix socket, durable, alongside what it cannot be faster than: an empty handler of the
same messages in the same process, and a bare commit of SQLite on the same disk.

The server is a process of its own, the client is this one; the calls are made in turn, so that what else the machine
does falls on all alike. Every call asks for a CPU that is free; between rounds all are released.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec

from nodeagent.config.schema import Config
from nodeagent.core.ledger.ledger import GRANTED, Change
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import Cpu, NumaNode
from nodeagent.kube.kubelet.device_plugin import DevicePluginServer
from nodeagent.managers.deviceplugin.adapter import OfferAdapter
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.resources.offer import Offer, offers
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from nodeagent.telemetry import log
from tests.pb import deviceplugin_pb2_grpc as rpc
from tests.support import channels

CPUS, ROUNDS, PER_ROUND, WARM_UP = 512, 6, 400, 50
Sample = list[float]
"""Seconds, one for each call."""


def machine() -> Inventory:
    """512 CPUs on 8 NUMA nodes."""
    cpus = tuple(Cpu(id=n, package=n // 256, die=0, core=n // 2, numa_node=n // 64, l3=n // 16) for n in range(CPUS))
    nodes = tuple(NumaNode(id=n, cpus=CpuSet(range(n * 64, n * 64 + 64))) for n in range(8))
    return Inventory(cpus=cpus, cpus_online=CpuSet(range(CPUS)), numa_nodes=nodes)


def offer() -> Offer:
    return offers(msgspec.convert({"resources": [{"name": "cpu", "kind": "cpu"}]}, Config), ())[0]


# The server's side


class _Empty(rpc.DevicePluginServicer):
    """Says the same short word to everybody."""

    async def Allocate(self, request: pb.AllocateRequest, context: Any) -> pb.AllocateResponse:  # noqa: N802
        return pb.AllocateResponse(container_responses=[pb.ContainerAllocateResponse(envs={"A": "1"})])


async def _nobody() -> tuple[()]:
    return ()


async def serve(folder: Path) -> None:
    """Serve both sockets; a line on stdin releases everything, its end ends the server."""
    log.configure("info", "json")
    agent = Agent(Store(folder / "state"), machine(), AgentSettings(boot_id="b"), _nobody)
    server, empty = DevicePluginServer(OfferAdapter(agent, offer()), folder), grpc.aio.server()
    rpc.add_DevicePluginServicer_to_server(_Empty(), empty)
    empty.add_insecure_port(f"unix:{folder}/empty.sock")
    await server.start()
    await empty.start()
    print(server.path, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        await agent.release(list(agent.ledger.grants), "bench")
        print("released", flush=True)
    await server.stop()
    await empty.stop(0)
    await agent.close()


@contextlib.asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Path, Callable[[], Awaitable[None]]]]:
    """A server process: its socket, and how to have everything released."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-m", "benchmarks.allocate", str(folder)]
    with (folder / "log").open("wb") as err:
        child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=err)
    assert child.stdin is not None and child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    async def release() -> None:
        stdin.write(b"release\n")
        await stdout.readline()

    try:
        yield Path((await stdout.readline()).decode().strip()), release
    finally:
        stdin.close()
        await child.wait()


# The client's side


def asked(number: int) -> pb.AllocateRequest:
    return pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[f"cpu{number}"])])


async def over_sockets(folder: Path) -> tuple[Sample, Sample]:
    """(Allocate, empty handler), called in turn."""
    real: Sample = []
    nothing: Sample = []
    async with (
        served(folder) as (path, release),
        channels.channel(path) as channel,
        channels.channel(folder / "empty.sock") as other,
    ):
        stubs = rpc.DevicePluginStub(channel), rpc.DevicePluginStub(other)
        for _ in range(ROUNDS):
            for number in range(PER_ROUND):
                for stub, sample in zip(stubs, (real, nothing), strict=True):
                    began = time.perf_counter()
                    await stub.Allocate(asked(number))
                    sample.append(time.perf_counter() - began)
            await release()
    return real[WARM_UP:], nothing[WARM_UP:]


async def in_process(folder: Path) -> Sample:
    """The decision and its save without gRPC."""
    agent, one, sample = Agent(Store(folder), machine(), AgentSettings(boot_id="b"), _nobody), offer(), Sample()
    for _ in range(ROUNDS):
        for number in range(PER_ROUND):
            began = time.perf_counter()
            await agent.allocate(one.resource, [[f"cpu{number}"]], one.edits, "bench")
            sample.append(time.perf_counter() - began)
        await agent.release(list(agent.ledger.grants), "bench")
    await agent.close()
    return sample[WARM_UP:]


def timed(work: Callable[[int], object], count: int = ROUNDS * PER_ROUND) -> Sample:
    sample: Sample = []
    for number in range(count):
        began = time.perf_counter()
        work(number)
        sample.append(time.perf_counter() - began)
    return sample[WARM_UP:]


def saves(folder: Path) -> Sample:
    """Store.save alone: one grant, its audit line."""
    with contextlib.closing(Store(folder)) as store:

        def save(number: int) -> None:
            grant = Grant(
                id=f"g-{number % PER_ROUND}", holder=Holder(api="device-plugin"), cpus=CpuSet([number % CPUS])
            )
            store.save([Change(action=GRANTED, grant=grant)], op="bench", at=time.time())

        return timed(save)


def commits(folder: Path) -> Sample:
    """One row in one table, WAL, synchronous=FULL: what the disk takes."""
    with contextlib.closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as db:
        for line in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE bare (body TEXT)"):
            db.execute(line)
        return timed(lambda number: db.execute("INSERT INTO bare VALUES (?)", ("x" * 300,)))


def measure(where: Path | None = None) -> dict[str, Sample]:
    """All samples by what was timed; `where` is a folder on the disk that matters."""
    with tempfile.TemporaryDirectory(prefix="na-", dir=where) as name:
        folder = Path(name)
        real, nothing = asyncio.run(over_sockets(folder))
        with (folder / "log").open("w") as stream:
            log.configure("info", "json", stream)
            alone = asyncio.run(in_process(folder / "process"))
        return {
            "Allocate over the socket, durable": real,
            "empty handler over the socket": nothing,
            "the decision and its save, no gRPC": alone,
            "Store.save": saves(folder / "saves"),
            "bare SQLite commit": commits(folder),
        }


def main() -> None:
    samples = measure()
    print("| what | p50 µs | p99 µs |\n|---|---|---|")
    for what, sample in samples.items():
        print(
            f"| {what} | {statistics.median(sample) * 1e6:.0f} | {statistics.quantiles(sample, n=100)[98] * 1e6:.0f} |"
        )
    real, nothing, _, _, commit = (statistics.median(sample) for sample in samples.values())
    print(
        f"\nAllocate is {real / nothing:.1f} times the empty handler; {commit / real:.0%} of it is the disk (the bare "
        f"commit), without which it would be {(real - commit) / nothing:.1f} times."
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        asyncio.run(serve(Path(sys.argv[1])))
    else:
        main()
