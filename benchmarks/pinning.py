"""What pinning costs with 250 containers on the node: answers to CreateContainer, rounds of reading back, repairs.

The runtime asks over a real socket; the control groups are plain files in memory that answer writes as the kernel does,
so what the kernel itself takes for a write is not in here (the guest of `make vm-test` has that).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest
import structlog

from nodeagent.daemon.daemon import SWITCH_S
from nodeagent.errors import HostError
from nodeagent.host.cgroup import write as cgroupset
from tests.support.pin_node import PinNode, pin_node

PODS, TIMES = 250, 100
SANDBOX_S = 0.1
"""What the runtime takes at least to make a sandbox, between kubelet's Allocate and its question."""
EFFECTIVE = "cpuset.cpus.effective"
TMPFS = Path("/dev/shm")


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    folder = TMPFS if TMPFS.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="na-", dir=folder) as place, pytest.MonkeyPatch.context() as patch:
        asyncio.run(_measure(Path(place), patch))


def _put(path: str, value: str) -> None:
    """A kernel that takes no time: what is written to a pod is in effect there and in its container at once."""
    if not path.endswith("/cpuset.cpus"):
        return
    folder = Path(path).parent
    try:
        for file in (path, folder / EFFECTIVE, *folder.glob(f"*/{EFFECTIVE}")):
            handle = os.open(file, os.O_WRONLY)
            os.write(handle, f"{value}\n".ljust(os.fstat(handle).st_size).encode())
            os.close(handle)
    except FileNotFoundError:
        raise HostError(f"cannot write {path}: it is gone") from None


async def _measure(folder: Path, patch: pytest.MonkeyPatch) -> None:
    gc.freeze()  # as the agent does at its start, like the next
    sys.setswitchinterval(SWITCH_S)
    async with pin_node(folder, patch) as node:
        for number in range(PODS):
            await node.run(f"p{number}", "main")
        with pytest.MonkeyPatch.context() as quick:
            quick.setattr(cgroupset, "put", _put)
            await _create(node)
        await _verify(node)
        await _repair(node)


async def _create(node: PinNode) -> None:
    """Others have moved when the runtime asks, as a sandbox takes its time; or they have to be moved for the answer."""
    for settled, what in ((True, "others moved before"), (False, "others moved for the answer")):
        took_ms = [await _one(node, f"x{int(settled)}{number}", settled=settled) for number in range(TIMES)]
        print(f"CreateContainer, {PODS} containers, {what}: {_spread(took_ms)}")


async def _one(node: PinNode, pod: str, *, settled: bool) -> float:
    node.pod(pod)
    await node.admit(pod, "main", "cpu4", "cpu5")
    if settled:
        await node.pins.reconciler.enforce()
    await asyncio.sleep(SANDBOX_S if settled else 0)
    began = time.perf_counter()
    answer = await node.ask(pod, "main")
    took_ms = (time.perf_counter() - began) * 1e3
    node.tree.make(node.path(pod, "main"))
    assert answer.adjust.linux.resources.cpu.cpus == "4-5"
    await node.remove(pod, "main")
    node.tree.remove(node.pod(pod))
    await node.agent.release(list(node.agent.ledger.grants), "op")
    await node.pins.reconciler.enforce()
    return took_ms


async def _verify(node: PinNode) -> None:
    took_ms, cpu_ms = [], []
    for _ in range(50):
        began, cpu = time.perf_counter(), time.process_time()
        found = await node.pins.reconciler.verify()
        took_ms.append((time.perf_counter() - began) * 1e3)
        cpu_ms.append((time.process_time() - cpu) * 1e3)
        assert not found
    print(f"a round of reading back {PODS} pods and {PODS} containers: {_spread(took_ms)}; CPU {_spread(cpu_ms)}")


async def _repair(node: PinNode) -> None:
    await node.admit("db", "main", "cpu4", "cpu5")
    await node.run("db", "main")
    await node.pins.reconciler.enforce()
    took_ms = []
    for _ in range(TIMES):
        began = time.perf_counter()
        node.tree.set(node.path("db", "main"), "cpuset.cpus", "6")
        while node.tree.effective(node.path("db", "main")) != "4-5":  # noqa: ASYNC110
            await asyncio.sleep(0)
        took_ms.append((time.perf_counter() - began) * 1e3)
    print(f"a wrong cpuset repaired after: {_spread(took_ms)}")


def _spread(took_ms: list[float]) -> str:
    ordered = sorted(took_ms)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"median {statistics.median(ordered):.2f} ms, p99 {p99:.2f} ms, worst {ordered[-1]:.2f} ms"
