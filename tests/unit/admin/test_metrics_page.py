"""The page of metrics: what a scraper reads is what the state was at one moment."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.admin import metrics_page
from nodeagent.admin import numa_gauges as numa
from nodeagent.admin.metrics_page import GaugeText, MetricsPage
from nodeagent.admin.state_gauges import STATE_GAUGES, Moment, StateGauge
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.ledger.free import memory_left
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device, Partition
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import UNHEALTHY, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from tests.builders.inventories import GIB, even_rows, inventory_of

LABELS = ("zone", "a", "name")
VALUES = st.one_of(st.integers(-(2**60), 2**60), st.floats(), st.booleans())
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


class Given:
    """A registry with one family, for prometheus-client's own renderer."""

    def __init__(self, family: GaugeMetricFamily) -> None:
        self.family = family

    def collect(self) -> list[GaugeMetricFamily]:
        return [self.family]


@given(st.dictionaries(st.tuples(TEXTS, TEXTS, TEXTS), VALUES), TEXTS)
@example({('a"b', "c\\d", "e\nf"): math.nan, ("", "", ""): math.inf, ("\\n", "", ""): -math.inf}, "h\\e\nlp")
def test_a_gauge_is_written_as_prometheus_client_writes_it(
    samples: dict[tuple[str, ...], float], help_text: str
) -> None:
    """Whatever names, reasons and numbers there are, a scraper reads the same from both."""
    theirs = GaugeMetricFamily("nodeagent_x", help_text, labels=LABELS)
    for values, value in samples.items():
        theirs.add_metric(values, value)
    gauge = StateGauge(name="nodeagent_x", help=help_text, labels=LABELS, read=lambda _: ())
    ours = GaugeText(gauge)
    ours.text(dict.fromkeys(samples, 0))
    assert read(ours.text(samples)) == read(generate_latest(Given(theirs)).decode())  # type: ignore[arg-type]


def read(text: str) -> list[tuple[str, str, list[tuple[dict[str, str], str]]]]:
    return [
        (one.name, one.documentation, [(sample.labels, repr(sample.value)) for sample in one.samples])
        for one in text_string_to_metric_families(text)
    ]


def test_every_gauge_has_a_name_of_its_own_and_says_what_it_is() -> None:
    names = [one.name for one in STATE_GAUGES]
    assert len(set(names)) == len(names)
    assert not [one.name for one in STATE_GAUGES if not one.help.endswith(".") or not one.name.startswith("nodeagent_")]


def machine_with(*devices: Device) -> Inventory:
    """Two NUMA nodes of four cores with two threads, one L3 cache for each two cores; pages and memory on node 0."""
    pages = {(0, 2 << 20): 10}
    return inventory_of(even_rows(1, 2, 2, 2, 2, adjacent=True), pages=pages, memory={0: GIB, 1: 0}, devices=devices)


def of(api: str, name: str, **held: Any) -> Grant:
    return Grant(id=name, holder=Holder(api=api, resource="nodeagent.dev/x", pod=name), ids=(name,), **held)


def ledger_with(*grants: Grant, reserved: str = "") -> Ledger:
    ledger = Ledger(reserved=CpuSet.parse(reserved))
    for one in grants:
        ledger = grant(ledger, one)
    return ledger


def test_every_cpu_counts_in_one_state_of_its_numa_node() -> None:
    ledger = ledger_with(of(DEVICE_PLUGIN, "g", cpus=CpuSet.parse("2-4")), reserved="0-1")
    assert dict(numa.cpus(machine_with(), ledger)) == {
        **{("0", "free"): 3, ("0", "held"): 3, ("0", "reserved"): 2, ("0", "outside"): 0},
        **{("1", "free"): 8, ("1", "held"): 0, ("1", "reserved"): 0, ("1", "outside"): 0},
    }


def test_fragmentation_shows_in_the_whole_cores_and_the_largest_cache_that_are_left() -> None:
    """Two CPUs of different cores cost both cores, and leave no cache of the node whole."""
    ledger = ledger_with(of(DEVICE_PLUGIN, "g", cpus=CpuSet.parse("0,4")))
    assert dict(numa.whole_cores(machine_with(), ledger)) == {("0",): 2, ("1",): 4}
    assert dict(numa.largest_l3(machine_with(), ledger)) == {("0",): 3, ("1",): 4}


def test_pages_and_memory_that_grants_hold_are_no_longer_free() -> None:
    pages = (Pages(node=0, page_bytes=2 << 20, pages=4),)
    ledger = ledger_with(of(CLAIM, "c", hugepages=pages, memory=((0, 100 << 20),)))
    machine = machine_with()
    assert dict(numa.hugepages(machine, ledger)) == {("0", "2Mi", "free"): 6, ("0", "2Mi", "held"): 4}
    left = memory_left(machine.numa_nodes[0])
    assert dict(numa.memory(machine, ledger)) == {("0", "free"): left - (100 << 20), ("0", "held"): 100 << 20}


def test_a_held_device_is_not_counted_as_unhealthy_and_one_of_no_node_has_its_own_row() -> None:
    devices = [Device(kind="gpu", id=f"g{n}", numa_node=n // 2, paths=(f"/dev/g{n}",)) for n in range(4)]
    nowhere = Device(kind="gpu", id="g4", paths=("/dev/g4",))
    ill = HealthState(state=UNHEALTHY, since=0.0, reason="it fell off the bus")
    ledger = ledger_with(of(DEVICE_PLUGIN, "g", devices=("g0",)))
    served = [DeviceResource(name="nodeagent.dev/gpu", kind="gpu")]
    found = dict(numa.devices(machine_with(*devices, nowhere), ledger, {"g0": ill, "g1": ill}, served))
    assert {key: value for key, value in found.items() if value} == {
        **{("0", "gpu", "held"): 1, ("0", "gpu", "unhealthy"): 1, ("1", "gpu", "free"): 2},
        ("none", "gpu", "free"): 1,
    }


def test_devices_that_no_resource_serves_are_not_counted() -> None:
    nic = Device(kind="nic", id="eth0", numa_node=0)
    assert dict(numa.devices(machine_with(nic), Ledger(), {}, [DeviceResource(name="x", kind="gpu")])) == {}


def samples(name: str, **watched: Any) -> dict[tuple[str, ...], float]:
    """The samples of a gauge of such a daemon."""
    (gauge,) = (one for one in STATE_GAUGES if one.name == name)
    return dict(gauge.samples(Moment(SimpleNamespace(**watched))))  # type: ignore[arg-type]


def agent_with(inventory: Inventory, health: Mapping[str, HealthState]) -> Any:
    return SimpleNamespace(inventory=inventory, health=health, ledger=Ledger())


def test_an_ill_gpu_has_one_sample_however_many_instances_could_be_made_of_it() -> None:
    """An instance that is ill by itself has its own, and so have parts that exist."""
    gpu = Device(kind="gpu", id="g0", paths=("/dev/nvidia0",))
    made = Device(kind="gpu", id="g0/mig-1-0", parent="g0", paths=("/dev/mig",))
    possible = [
        Device(
            kind="gpu",
            id=f"g0/mig-1g-{start}",
            parent="g0",
            partition=Partition(rank=start, profile=19, start=start, size=1, draws={}, counters={}),
        )
        for start in range(7)
    ]
    inventory = inventory_of(even_rows(1, 1, 1, 2, 1), devices=(gpu, made, *possible))
    served = [
        SimpleNamespace(resource=DeviceResource(name="r", kind="gpu", partitions=partitions))
        for partitions in (False, True)
    ]
    bus = HealthState(state=UNHEALTHY, since=0.0, reason="it fell off the bus")
    own = HealthState(state=UNHEALTHY, since=0.0, reason="an error of its own")
    found = samples(
        "nodeagent_device_ill",
        agent=agent_with(inventory, {"g0": bus, "g0/mig-1g-3": own}),
        configured=lambda: served,
    )
    assert found == {
        ("g0", UNHEALTHY, bus.reason): 1,
        ("g0/mig-1-0", UNHEALTHY, bus.reason): 1,
        ("g0/mig-1g-3", UNHEALTHY, own.reason): 1,
    }


def test_each_resource_that_is_not_served_has_a_sample_for_the_api_that_lacks_it() -> None:
    refused = {"x/cpu": "kubelet manages CPUs", "gpu through DRA": "another driver offers it"}
    agent = agent_with(Inventory(), {})
    assert samples("nodeagent_resource_refused", agent=agent, refused=refused) == {
        ("x/cpu", "device-plugin", "kubelet manages CPUs"): 1,
        ("gpu", "dra", "another driver offers it"): 1,
    }
    assert samples("nodeagent_resource_refused", agent=agent, refused={}) == {}


class Reads:
    """A gauge that counts how often the state is read for it."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, _: object) -> list[tuple[tuple[str, ...], float]]:
        self.count += 1
        return [(("\udcff",), self.count)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """The only gauge of the state."""
    one = Reads()
    gauge = StateGauge(name="nodeagent_reads", help="Reads.", labels=("device",), read=one.read)
    monkeypatch.setattr(metrics_page, "STATE_GAUGES", (gauge,))
    return one


def page() -> MetricsPage:
    watched: Any = SimpleNamespace(agent=SimpleNamespace(ledger=None, inventory=None))
    return MetricsPage(watched)


async def test_many_scrapers_at_once_cost_no_more_than_two_and_each_gets_a_whole_page(reads: Reads) -> None:
    """None gets an older state than that of when it asked."""
    one = page()
    texts = await asyncio.gather(*(one.text() for _ in range(100)))
    assert reads.count <= 2
    assert {*re.findall(rb"^nodeagent_reads\{[^}]*\} (\S+)$", b"".join(texts), re.M)} <= {b"1.0", b"2.0"}
    assert all(b"nodeagent_build_info" in text and b"nodeagent_reads" in text for text in texts)
    assert f"}} {reads.count + 1}.0\n".encode() in await one.text()


async def test_a_page_that_may_be_old_is_made_once(reads: Reads) -> None:
    one = page()
    assert {await one.text(max_age_s=3600) for _ in range(5)} == {await one.text(max_age_s=3600)}
    assert reads.count == 1


async def test_a_device_whose_name_is_no_text_spoils_no_page(reads: Reads) -> None:
    """Names of device nodes are bytes."""
    assert b'nodeagent_reads{device="?"} 1.0\n' in await page().text()
