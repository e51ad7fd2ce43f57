"""Claims as kubelet has them prepared: the whole agent as a process, gRPC over its unix socket, each claim read from an
API server over TLS, the grant durable, the files for the container runtime written.

The ledger lies on the disk, CDI files and what the containers read on tmpfs, as on a node. Where claims are timed the
API server is a process of its own, in Python; kubelet is this process. An empty handler of the same messages is
called in turn, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from benchmarks.allocate import Sample, commits
from benchmarks.api_process import ApiProcess
from benchmarks.daemon import resident_mib, uevent
from benchmarks.node import alongside, folders, node
from nodeagent.host.nvml.client import Failure, Probe
from nodeagent.kube.kubelet.plugin_registration import DraPlugin, plugin_sockets
from nodeagent.pb import dra_v1_pb2 as pb
from nodeagent.telemetry import log
from tests.builders.machines import machine
from tests.doubles.api_server import FakeApiServer
from tests.pb import dra_v1_pb2_grpc as rpc
from tests.support import channels
from tests.support.claim_desk import Desk, Vitals
from tests.support.dra_node import CPUS, DRIVER, MEMORY, NODE, consumed
from tests.support.paths import NVML_DOUBLE

HELD = (0, 100, 500)
"""Claims that are held before."""
ONE, MANY = 150, 15
"""Calls with one claim, and with PACK claims."""
PACK = 32
WARM_UP = 5
NODES = 8
SCANS, SCAN_S = 60, 0.1
"""As many scans of the machine as an hour has by default, and how fast they follow here."""
CHANGES, REST_S = 4, 2.5
"""Changes of the machine, and the rest after each: a pool is written once a second over time."""
HANG_S = 2.0
"""How long NVML hangs."""
TMPFS = Path("/dev/shm")


# ---------------------------------------------------------------- Prepare


async def prepare(stub: Any, claims: Sequence[pb.Claim]) -> float:
    """Have claims prepared and return the seconds it took."""
    began = time.perf_counter()
    answer = await stub.NodePrepareResources(pb.NodePrepareResourcesRequest(claims=claims))
    took = time.perf_counter() - began
    if errors := [one.error for one in answer.claims.values() if one.error or not one.devices]:
        raise AssertionError(errors[0])
    return took


class Caller:
    """Has claims prepared and unprepared as kubelet does, and times it."""

    def __init__(self, api: ApiProcess, real: grpc.aio.Channel, empty: grpc.aio.Channel) -> None:
        self._api = api
        self._real, self._empty = (rpc.DRAPluginStub(one) for one in (real, empty))  # type: ignore[no-untyped-call]
        self._numbers = itertools.count()

    async def claims(self, count: int, cpus: int) -> list[pb.Claim]:
        """Claims of some CPUs each that are allocated; the nodes take turns."""
        numbers = list(itertools.islice(self._numbers, count))
        made = [(f"c{one}", consumed("cpu", f"numa{one % NODES}", cpus=str(cpus))) for one in numbers]
        uids = await self._api.add_claims(made)
        return [pb.Claim(namespace="default", name=made[0], uid=uid) for made, uid in zip(made, uids, strict=True)]

    async def prepare(self, claims: Sequence[pb.Claim]) -> float:
        return await prepare(self._real, claims)

    async def prepare_nothing(self, claims: Sequence[pb.Claim]) -> float:
        began = time.perf_counter()
        await self._empty.NodePrepareResources(pb.NodePrepareResourcesRequest(claims=claims))
        return time.perf_counter() - began

    async def unprepare(self, claims: Sequence[pb.Claim]) -> float:
        began = time.perf_counter()
        await self._real.NodeUnprepareResources(pb.NodeUnprepareResourcesRequest(claims=claims))
        took = time.perf_counter() - began
        await self._api.delete_claims([claim.name for claim in claims])
        return took

    async def hold(self, count: int) -> None:
        """Have so many claims of one CPU prepared, and leave them so."""
        claims = await self.claims(count, 1)
        for start in range(0, count, PACK):
            await self.prepare(claims[start : start + PACK])

    async def calls(self, count: int, claims: int) -> tuple[Sample, Sample, Sample]:
        """(Prepare, empty handler, Unprepare) of so many calls with so many claims of 2 CPUs each."""
        samples: tuple[Sample, Sample, Sample] = ([], [], [])
        for _ in range(count + WARM_UP):
            some = await self.claims(claims, 2)
            for work, sample in zip((self.prepare, self.prepare_nothing, self.unprepare), samples, strict=True):
                sample.append(await work(some))
        return samples[0][WARM_UP:], samples[1][WARM_UP:], samples[2][WARM_UP:]


async def prepares(disk: Path, tmpfs: Path) -> None:
    """Prepare with more and more claims held; then, with all of them, GetInfo and resident memory."""
    root, resources = machine(tmpfs / "root", "2s8n512c-smt"), [{**CPUS, "serve": "dra"}]
    async with (
        node(disk, tmpfs, resources, root, apart=True) as it,
        alongside("empty", disk / "empty.sock"),
        channels.channel(it.endpoint) as real,
        channels.channel(disk / "empty.sock") as empty,
    ):
        caller, held = Caller(it.api, real, empty), 0
        for count in HELD:
            await caller.hold(count - held)
            held = count
            await _lines(caller, held)
        row(f"resident memory, 1,024 CPUs, {held} claims held", "", f"{resident_mib(it.agent.pid):.1f} MiB")
        await _get_info(it.registry, caller)


async def _lines(caller: Caller, held: int) -> None:
    """Print the figures of both sizes of a call."""
    for count, claims, reach in ((ONE, 1, "p99 50 ms"), (MANY, PACK, "500 ms")):
        real, empty, undo = await caller.calls(count, claims)
        ratio = statistics.median(real) / statistics.median(empty)
        what = f"{claims} claim{'s' * (claims > 1)} in a call, {held} held"
        row(f"Prepare, {what}", reach, f"{spread(real)}; {ratio:.1f} × the empty handler ({spread(empty)})")
        row(f"Unprepare, {what}", "", spread(undo))


async def _get_info(registry: Path, caller: Caller) -> None:
    async with alongside("probe", registry) as ended:
        await caller.calls(MANY, PACK)
        took: Sample = json.loads(await ended())
    row(f"GetInfo while calls of {PACK} claims are prepared", "10 ms", spread(took))


async def nvml_hangs(disk: Path, tmpfs: Path) -> None:
    """GetInfo of the real parts in this process: NVML can hang alongside it, but no NVIDIA GPU can be shown to a whole
    agent here."""
    what, library = "GetInfo while NVML hangs (in process)", hanging_nvml(tmpfs)
    if library is None:
        row(what, "10 ms", "no C compiler for the library that hangs")
        return
    plugin = DraPlugin(DRIVER, plugin_sockets(disk, DRIVER), Desk(), Vitals())
    (disk / "plugins_registry").mkdir()
    asked = Probe(env={"LD_LIBRARY_PATH": str(library), "FAKE_NVML": "hang-init"})
    running = asyncio.create_task(plugin.run())
    seen = 0
    while plugin.registration.reason != "waiting for kubelet to ask":
        seen = await plugin.changed(seen)
    question = asyncio.create_task(asked.snapshot(HANG_S))
    async with alongside("probe", plugin_sockets(disk, DRIVER).registration) as ended:
        answer = await question
        took: Sample = json.loads(await ended())
    if not isinstance(answer, Failure):
        raise AssertionError("NVML did not hang")
    row(what, "10 ms", spread(took))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await asked.close()


def hanging_nvml(folder: Path) -> Path | None:
    """The folder of a library in the place of NVML."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, built = NVML_DOUBLE, folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-fvisibility=hidden", "-o", built, source], check=True)
    return folder


# ---------------------------------------------------------------- the rest


async def idle_writes(disk: Path, tmpfs: Path) -> None:
    """What the API server gets of an agent with nothing to report, while the machine is scanned all the time."""
    root = machine(tmpfs / "root", "2s8n128c-smt")
    async with node(disk, tmpfs, [CPUS, MEMORY], root, resyncSeconds=SCAN_S) as it:
        before = it.api.writes
        await asyncio.sleep(SCANS * SCAN_S)
        row(f"writes to the API server in an hour of scans ({SCANS})", "0", str(it.api.writes - before))


async def this_machine(disk: Path, tmpfs: Path) -> None:
    """An agent on this machine: its memory with claims held, and how soon a device is in a slice."""
    device = {"name": "bench", "kind": "char", "paths": [f"/dev/{disk.name}*"], "serve": "both"}
    resources = [CPUS, {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "serve": "both"}, MEMORY, device]
    async with node(disk, tmpfs, resources, "/", resyncSeconds=3600) as it, channels.channel(it.endpoint) as channel:
        results = [consumed("memory", "numa0", size="1Mi") for _ in range(PACK)]
        made = [it.api.add_claim(f"m{number}", results=[one]) for number, one in enumerate(results)]
        refs = [(one["metadata"]["name"], one["metadata"]["uid"]) for one in made]
        claims = [pb.Claim(namespace="default", name=name, uid=uid) for name, uid in refs]
        await prepare(rpc.DRAPluginStub(channel), claims)  # type: ignore[no-untyped-call]
        row("device event to slice written", "500 ms", await _appears(it.api, disk.name))
        row(f"resident memory with {PACK} claims prepared", "72 MiB", f"{resident_mib(it.agent.pid):.1f} MiB")


async def _appears(api: FakeApiServer, name: str) -> str:
    path, event, took = Path("/dev") / name, uevent(), Sample()
    if event is None:
        return "no event can be made here"

    def shown() -> bool:
        return any(one["spec"]["pool"]["name"] == f"{NODE}/char" for one in api.slices(node=NODE))

    for _ in range(CHANGES):
        path.symlink_to("/dev/null")
        try:
            began = time.perf_counter()
            event.write_text("change\n")
            await api.until(shown)
            took.append(time.perf_counter() - began)
        finally:
            path.unlink()
        event.write_text("change\n")
        await api.until(lambda: not shown())
        await asyncio.sleep(REST_S)
    return f"{statistics.median(took) * 1e3:.0f} ms (worst {max(took) * 1e3:.0f})"


def row(what: str, reach: str, found: str) -> None:
    print(f"| {what} | {reach or '—'} | {found} |", flush=True)


def spread(sample: Sample) -> str:
    """Median and, of few the worst, of many the 99th percentile."""
    late = ("p99", statistics.quantiles(sample, n=100)[98]) if len(sample) >= 100 else ("worst", max(sample))
    return f"p50 {statistics.median(sample) * 1e3:.1f} ms, {late[0]} {late[1] * 1e3:.1f}"


async def _main() -> None:
    for part in (prepares, nvml_hangs, idle_writes, this_machine):
        with folders() as (disk, tmpfs):
            await part(disk, tmpfs)
    with folders() as (disk, _):
        row("bare commit of SQLite on the same disk", "", spread(commits(disk)))


def main() -> None:
    log.configure("error", "json")
    print("| what | reach | measured |\n|---|---|---|")
    asyncio.run(_main())


if __name__ == "__main__":
    main()
