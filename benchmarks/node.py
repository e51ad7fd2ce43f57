"""A whole agent alongside both sides of a kubelet and an API server, and processes alongside it, for benchmarks of
claims."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.allocate import Sample
from benchmarks.api_process import api_process
from benchmarks.daemon import QUIET
from nodeagent.pb import dra_v1_pb2 as pb
from nodeagent.pb import pluginregistration_pb2 as registration_pb
from tests.doubles.api_server import FakeApiServer
from tests.doubles.dra_kubelet import FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet
from tests.pb import dra_v1_pb2_grpc as rpc
from tests.pb import pluginregistration_pb2_grpc as registration_rpc
from tests.support import channels
from tests.support.dra_node import DRIVER, NODE
from tests.support.running import Running, running

PROBE_S = 0.002
"""Between two questions for GetInfo."""
TMPFS = Path("/dev/shm")


# ---------------------------------------------------------------- a node


@dataclass
class Node:
    """An agent that is registered, and what a benchmark needs to call it."""

    api: Any
    """The FakeApiServer, or the ApiProcess that was given."""
    agent: Running
    endpoint: Path
    registry: Path
    """The socket of registration."""


@contextlib.asynccontextmanager
async def node(
    disk: Path, tmpfs: Path, resources: Sequence[Any], root: Path | str, *, apart: bool = False, **more: Any
) -> AsyncIterator[Node]:
    """A whole agent alongside both sides of a kubelet. disk, tmpfs: folders for what has to last and what has not.
    apart: have the API server in a process of its own, over TLS."""
    runtime = tmpfs / "run"
    runtime.mkdir()
    (disk / "run").symlink_to(runtime)
    server = api_process(disk, NODE) if apart else _api_here()
    async with server as api, FakeKubelet(disk / "kubelet"), FakeDraKubelet(disk / "kubelet") as side:
        access = {"kubeconfig": str(api.kubeconfig(disk)), "nodeName": NODE, "cdiDir": str(tmpfs / "cdi")}
        options = {"resources": resources, "log": QUIET, "dra": {**access, "spreadSeconds": 0}, **more}
        async with running(disk, root=root, **options) as agent:
            await side.wait_registered(DRIVER)
            await agent.ready()
            (registry,) = side.registry.glob("*.sock")
            yield Node(api, agent, side.instances(DRIVER)[0], registry)


@contextlib.asynccontextmanager
async def _api_here() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer() as api:
        api.add_node(NODE)
        yield api


@contextlib.contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    """(on the disk, on tmpfs); both on the disk where there is no tmpfs."""
    fast = TMPFS if TMPFS.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="na-") as disk,
        tempfile.TemporaryDirectory(prefix="na-", dir=fast) as tmpfs,
    ):
        yield Path(disk), Path(tmpfs)


# ---------------------------------------------------------------- processes alongside it


class _Empty(rpc.DRAPluginServicer):
    """One device for each claim, the same for all."""

    async def NodePrepareResources(self, request: Any, context: Any) -> Any:  # noqa: N802
        device = pb.Device(request_names=["r"], pool_name=f"{NODE}/cpu", device_name="numa0", cdi_device_ids=["a/b=c"])
        one = pb.NodePrepareResourceResponse(devices=[device])
        return pb.NodePrepareResourcesResponse(claims={claim.uid: one for claim in request.claims})


async def serve_empty(path: Path) -> None:
    """The empty handler, until stdin ends."""
    server = await channels.serve(path, lambda it: rpc.add_DRAPluginServicer_to_server(_Empty(), it))  # type: ignore[no-untyped-call]
    print("serving", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


async def probe(path: Path) -> None:
    """Ask GetInfo again and again until stdin ends; print the seconds that each took."""
    took = Sample()
    async with channels.channel(path) as channel:
        stub = registration_rpc.RegistrationStub(channel)  # type: ignore[no-untyped-call]
        await stub.GetInfo(registration_pb.InfoRequest())
        print("probing", flush=True)
        end = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        while not end.done():
            began = time.perf_counter()
            await stub.GetInfo(registration_pb.InfoRequest())
            took.append(time.perf_counter() - began)
            await asyncio.sleep(PROBE_S)
    print(json.dumps(took), flush=True)


@contextlib.asynccontextmanager
async def alongside(role: str, path: Path) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """A process of this file in a role; called, it is ended and has said what it had to say."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.node", role, str(path), stdin=pipe, stdout=pipe
    )
    assert child.stdin is not None and child.stdout is not None
    stdin, stdout = child.stdin, child.stdout
    await stdout.readline()

    async def ended() -> bytes:
        stdin.close()
        return await stdout.read()

    try:
        yield ended
    finally:
        stdin.close()
        await child.wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["empty", path]:
            asyncio.run(serve_empty(Path(path)))
        case ["probe", path]:
            asyncio.run(probe(Path(path)))
