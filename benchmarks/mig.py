"""MIG instances made on demand: what polling NVML costs, and what preparing a claim adds to the driver's own calls.

The library is the double with its state read once, so that reading it does not count. The ledger and the journal lie on
the disk, as on a node.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import ALL_FEATURES as _ALL
from nodeagent.host.devices import all_kinds
from nodeagent.host.nvml.client import Probe
from nodeagent.host.nvml.values import Snapshot
from nodeagent.host.snapshot import Selectors, scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory.scanner import InventoryScanner
from nodeagent.state.agent import Agent
from nodeagent.state.store import Store
from nodeagent.state.values import AgentSettings
from nodeagent.telemetry import log
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.support.claim_node import claim_room
from tests.support.dra_node import SERIAL, result
from tests.support.mig_driver import MigDriver
from tests.support.mig_node import LocalNvml, mig_room

GPUS, POLLS, A_MINUTE = 8, 100, 2
"""A minute has two polls by default (health.nvmlSeconds)."""
NVLINKS = 18
"""Of an H100 SXM."""
CLAIMS = 40
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


LOOKS = 20


class Given:
    """NVML's answer, without NVML."""

    def __init__(self, answer: Snapshot) -> None:
        self._answer = answer

    async def snapshot(self) -> Snapshot:
        return self._answer

    async def close(self) -> None:
        """Nothing was opened."""


def row(what: str, reach: str, found: str) -> None:
    print(f"| {what} | {reach or '—'} | {found} |", flush=True)


async def looks(folder: Path, tree: DeviceTree, answer: Snapshot) -> None:
    """What the agent does with an answer of NVML, with the machine read again and without."""
    sysfs, families = SysFs(str(tree.root)), all_kinds.builtin_kinds()
    agent = Agent(Store(folder / "looks"), scan(sysfs, families), AgentSettings(boot_id="boot"), _nothing_held)
    scanner = InventoryScanner(agent, sysfs, families, folder / "looks", Config)
    scanner.probe = Given(answer)  # type: ignore[assignment]
    for what, rescan in (("read again", True), ("not read again", False)):
        await scanner._look_at_nvml(rescan=rescan)
        began = time.process_time()
        for _ in range(LOOKS):
            await scanner._look_at_nvml(rescan=rescan)
        spent_ms = (time.process_time() - began) / LOOKS * 1e3
        row(f"CPU of taking an answer of NVML, the machine {what}", "", f"{spent_ms:.1f} ms")
    await scanner.close()
    await agent.close()


async def _nothing_held() -> tuple[()]:
    return ()


async def polls(folder: Path) -> None:
    """The CPU time of the helper and of its client for a machine full of instances, and of the scan that follows."""
    driver = MigDriver.of(folder / "nvml", *["h100-80"] * GPUS)
    for gpu in range(GPUS):
        for start in range(7):
            driver.make(gpu, "1g.10gb", start, id=7 + start)
        driver.sign(gpu, "links", NVLINKS)
        driver.sign(gpu, "fabric_state", 3)
    tree = DeviceTree(machine(folder / "root", "2s8n128c-smt"))
    driver.machine(tree)
    probe = Probe(env={**driver.env, "FAKE_NVML_FROZEN": "1"})
    answer = await probe.snapshot(60)
    if not isinstance(answer, Snapshot) or sum(len(gpu.migs) for gpu in answer.gpus) != 7 * GPUS:
        raise AssertionError(answer)
    assert probe.pid is not None
    helper, own = _cpu_s(probe.pid), time.process_time()
    for _ in range(POLLS):
        await probe.snapshot(60)
    helper_ms, own_ms = (
        (now - before) / POLLS * 1e3 for now, before in ((_cpu_s(probe.pid), helper), (time.process_time(), own))
    )
    await probe.close()
    row(
        f"CPU of polling {GPUS} GPUs with {7 * GPUS} instances, a minute",
        "20 ms",
        f"{A_MINUTE * (helper_ms + own_ms):.1f} ms",
    )
    for what, selectors in (("without", Selectors()), ("with", Selectors(partitions=all_kinds.PartitionSelector()))):
        empty = answer if selectors.partitions is None else _without_instances(answer)
        began = time.process_time()
        for _ in range(10):
            scan(SysFs(str(tree.root)), all_kinds.builtin_kinds(), selectors, empty)
        row(
            f"CPU of one scan of that machine, {what} parts made on demand",
            "",
            f"{(time.process_time() - began) * 100:.1f} ms",
        )
    await looks(folder, tree, answer)


def _without_instances(answer: Snapshot) -> Snapshot:
    from msgspec.structs import replace

    return replace(answer, gpus=tuple(replace(gpu, migs=(), instances=()) for gpu in answer.gpus))


def _cpu_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) * TICK_S


class Timed(LocalNvml):
    """Counts the time that is spent in the driver."""

    spent_s = 0.0

    async def mig_state(self, gpu: str) -> Any:
        return await self._timed(super().mig_state(gpu))

    async def create(self, one: Any) -> Any:
        return await self._timed(super().create(one))

    async def destroy(self, one: Any) -> Any:
        return await self._timed(super().destroy(one))

    async def _timed(self, work: Any) -> Any:
        began = time.perf_counter()
        try:
            return await work
        finally:
            self.spent_s += time.perf_counter() - began


async def prepares(folder: Path) -> None:
    """Claims for one instance each, alongside claims for a device that is there, on the same disk."""
    (folder / "plain").mkdir()
    (folder / "mig").mkdir()
    plain, made = list[float](), list[float]()
    async with claim_room(folder / "plain", SERIAL, ports=CLAIMS) as room:
        for number in range(CLAIMS):
            names = [
                one.name
                for one in room.dra.catalog.kinds["char"]
                .pool(room.agent.inventory, room.agent.ledger, {}, _ALL)
                .devices
            ]
            claim = room.claim(f"c{number}", result("char", names[number]))
            began = time.perf_counter()
            await room.prepare(claim)
            plain.append(time.perf_counter() - began)
    async with mig_room(folder / "mig", "h100-80") as room:
        room.probe = Timed(room.driver)
        room.open()
        for number in range(CLAIMS):
            claim = room.mig_claim(f"c{number}", "mig-1g.10gb-6")
            before, began = room.probe.spent_s, time.perf_counter()
            (answer,) = await room.prepare(claim)
            made.append(time.perf_counter() - began - (room.probe.spent_s - before))
            assert not answer.error, answer.error
            await room.unprepare(claim)
    row("Prepare of a claim for a device (in process)", "", f"p50 {statistics.median(plain) * 1e3:.1f} ms")
    row(
        "Prepare of a claim for a MIG instance without the driver's calls",
        "",
        f"p50 {statistics.median(made) * 1e3:.1f} ms",
    )
    added_ms = (statistics.median(made) - statistics.median(plain)) * 1e3
    row("what a MIG instance adds beyond the driver's calls", "10 ms", f"{added_ms:.1f} ms")


async def _main() -> None:
    for part in (polls, prepares):
        with tempfile.TemporaryDirectory(prefix="na-mig-") as folder:
            await part(Path(folder))


def main() -> None:
    log.configure("error", "json")
    print("| what | reach | measured |\n|---|---|---|")
    asyncio.run(_main())


if __name__ == "__main__":
    main()
