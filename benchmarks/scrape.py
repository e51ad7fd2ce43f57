"""What a scrape costs: CPU time of the process for 10,000 holders on a machine of 512 CPUs, read and written.

The same series are also set in a gauge of prometheus-client at each scrape and written by its own renderer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from benchmarks.placement import machine
from nodeagent.admin.metrics_page import GaugeText
from nodeagent.admin.state_gauges import STATE_GAUGES, Moment, Samples, StateGauge
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder

SERIES, ROUNDS, REACH_MS = 10_000, 41, 20
OF_THE_LEDGER = (
    "nodeagent_holder",
    "nodeagent_numa_cpus",
    "nodeagent_numa_whole_cores_free",
    "nodeagent_numa_hugepages",
)


def moment() -> Moment:
    """A node with that many holders, some of which hold CPUs."""
    grants = {str(number): _grant(number) for number in range(SERIES)}
    agent = SimpleNamespace(inventory=machine((2, 4, 4, 8, 2)), ledger=Ledger(grants=MappingProxyType(grants)))
    watched: Any = SimpleNamespace(agent=agent)
    return Moment(watched)


def _grant(number: int) -> Grant:
    holder = Holder(
        api=DEVICE_PLUGIN,
        resource="nodeagent.dev/fuse",
        namespace=f"team-{number % 20}",
        pod=f"application-7d4b9c6f5d-{number:05}",
        container="main",
    )
    cpus = CpuSet([number]) if number < 256 else CpuSet()
    return Grant(id=str(number), holder=holder, ids=(str(number),), cpus=cpus)


def cpu_ms(work: Callable[[], object]) -> float:
    """The median of the CPU time that this process needs for some work."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        rounds.append(time.process_time() - began)
    return statistics.median(rounds) * 1e3


def read(now: Moment, gauges: list[StateGauge]) -> list[Samples]:
    return [one.samples(now) for one in gauges]


def written(texts: list[GaugeText], found: list[Samples]) -> bytes:
    return "".join(one.text(samples) for one, samples in zip(texts, found, strict=True)).encode(errors="replace")


def by_prometheus_client(gauges: list[StateGauge], found: list[Samples]) -> bytes:
    registry = CollectorRegistry()
    for gauge, samples in zip(gauges, found, strict=True):
        one = Gauge(gauge.name, gauge.help, gauge.labels, registry=registry)
        for values, value in samples.items():
            one.labels(*values).set(value)
    return generate_latest(registry)


def main() -> None:
    now = moment()
    gauges = [one for one in STATE_GAUGES if one.name in OF_THE_LEDGER]
    found, texts = read(now, gauges), [GaugeText(one) for one in gauges]
    first = cpu_ms(lambda: written([GaugeText(one) for one in gauges], found))
    reading, writing = cpu_ms(lambda: read(now, gauges)), cpu_ms(lambda: written(texts, found))
    theirs = cpu_ms(lambda: by_prometheus_client(gauges, found))
    count = sum(map(len, found))
    print(f"{count} series, {len(written(texts, found)) >> 10} KiB; CPU time, median of {ROUNDS}\n")
    print("| reading the state | writing the page | together | reach | writing it first | by prometheus-client |")
    print("|---|---|---|---|---|---|")
    both = f"{reading:.1f} ms | {writing:.1f} ms | {reading + writing:.1f} ms | {REACH_MS} ms"
    print(f"| {both} | {first:.1f} ms | {theirs:.0f} ms |")


if __name__ == "__main__":
    main()
