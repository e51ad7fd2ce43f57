"""The whole agent as a process: how soon it is registered, how soon it tells of a device, and what it costs idle."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nodeagent.managers.inventory.scanner import LONGEST_REST_S
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import CPU, Running, running

RUNS = 7
IDLE_S = 60.0
DEVICES = 64
ACCELERATOR = "nodeagent.dev/accelerator"
QUIET = {"level": "error"}
LARGE = [{"name": "cpu", "kind": "cpu"}, {"name": "accelerator", "kind": "accel"}]
UEVENTS = ("/sys/class/misc/fuse/uevent", "/sys/class/tty/tty0/uevent", "/sys/class/misc/vga_arbiter/uevent")


def large_machine(folder: Path) -> Path:
    """256 CPUs on 8 NUMA nodes, and 64 accelerators."""
    tree = DeviceTree(machine(folder, "2s8n128c-smt"))
    for number in range(DEVICES):
        address, name = f"0000:{number + 1:02x}:00.0", f"accel{number}"
        tree.pci(address, pci_class="120000", numa_node=number % 8)
        tree.member("accel", name, tree.folders[address] / "accel" / name, {})
        tree.node(f"/dev/accel/{name}")
    return tree.root


async def registered(kubelet: FakeKubelet) -> None:
    """Kubelet shows all of the large machine."""
    await kubelet.wait_allocatable(CPU, 256)
    await kubelet.wait_allocatable(ACCELERATOR, DEVICES)


async def start_ms(folder: Path, root: Path) -> float:
    """From the start of the process, interpreter included, to everything shown by kubelet."""
    async with FakeKubelet(folder / "kubelet") as kubelet:
        began = time.perf_counter()
        async with running(folder, log=QUIET, root=root, resources=LARGE):
            await registered(kubelet)
            return (time.perf_counter() - began) * 1e3


async def again_ms(folder: Path, root: Path) -> list[float]:
    """From kubelet.sock being there to everything shown again."""
    took = []
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, log=QUIET, root=root, resources=LARGE):
        await registered(kubelet)
        for _ in range(RUNS):
            await kubelet.stop()
            await kubelet.start()
            began = time.perf_counter()
            await registered(kubelet)
            took.append((time.perf_counter() - began) * 1e3)
    return took


def uevent() -> Path | None:
    """A file that makes the kernel announce a device; None where it may not be written."""
    for name in UEVENTS:
        try:
            Path(name).write_text("change\n")
        except OSError:
            continue
        return Path(name)
    return None


async def appears_ms(folder: Path) -> tuple[list[float], list[float]]:
    """From the kernel's event for a new device to kubelet having the list with it, on this machine: (of an agent that
    has had nothing to do, right after the event before, when the agent still rests from reading the machine)."""
    name, rested, at_once, event = f"/dev/nodeagent-bench-{os.getpid()}", list[float](), list[float](), uevent()
    if event is None or not os.access("/dev", os.W_OK):
        return rested, at_once
    one = {"name": "bench", "kind": "char", "paths": [f"{name}*"]}
    resource = "nodeagent.dev/bench"
    options = {"resources": [one], "resyncSeconds": 3600}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, log=QUIET, **options) as agent:
        await kubelet.wait_registered(resource)
        await agent.ready()
        for took in (rested, at_once) * RUNS:
            if took is rested:
                await asyncio.sleep(LONGEST_REST_S)
            Path(name).symlink_to("/dev/null")  # noqa: ASYNC240
            try:
                began = time.perf_counter()
                event.write_text("change\n")
                await kubelet.wait_allocatable(resource, 1)
                took.append((time.perf_counter() - began) * 1e3)
            finally:
                Path(name).unlink()  # noqa: ASYNC240
            event.write_text("change\n")
            await kubelet.wait_allocatable(resource, 0)
    return rested, at_once


@asynccontextmanager
async def idle_agent(folder: Path, **config: Any) -> AsyncIterator[Running]:
    """An agent on this machine that kubelet shows and that gets no request."""
    async with FakeKubelet(folder / "kubelet"), running(folder, log=QUIET, **config) as agent:
        await agent.ready()
        yield agent


async def idle(folder: Path, seconds: float = IDLE_S) -> tuple[float, float]:
    """(MiB resident, percent of one core), default resources."""
    async with idle_agent(folder) as agent:
        before = cpu_s(agent.pid)
        await asyncio.sleep(seconds)
        return resident_mib(agent.pid), (cpu_s(agent.pid) - before) / seconds * 100


def cpu_s(pid: int) -> float:
    """Time on a CPU so far, all threads, to the nanosecond (/proc/PID/task/TID/schedstat)."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def _line(what: str, reach: str, found: str) -> None:
    print(f"| {what} | {reach} | {found} |", flush=True)


def _spread(took: list[float]) -> str:
    return f"{statistics.median(took):.0f} ms (worst {max(took):.0f})" if took else "no event can be made here"


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="na-") as name:
        folder, root = Path(name), await asyncio.to_thread(large_machine, Path(name) / "root")
        places = [folder / str(number) for number in range(RUNS + 3)]
        for place in places:
            place.mkdir()
        starts = [await start_ms(place, root) for place in places[:RUNS]]
        _line(f"start to registered, 256 CPUs and {DEVICES} devices", "600 ms", _spread(starts))
        _line("re-registered after kubelet.sock appears", "200 ms", _spread(await again_ms(places[-3], root)))
        rested, at_once = await appears_ms(places[-2])
        _line("device event to list sent", "100 ms", _spread(rested))
        _line("the same right after another event", "", _spread(at_once))
        mib, percent = await idle(places[-1])
        _line("resident memory, idle, default resources", "64 MiB", f"{mib:.1f} MiB")
        _line(f"CPU over {IDLE_S:.0f} s, idle", "0.1 % of a core", f"{percent:.3f} %")


def main() -> None:
    print("| what | reach | measured |\n|---|---|---|")
    asyncio.run(_main())


if __name__ == "__main__":
    main()
