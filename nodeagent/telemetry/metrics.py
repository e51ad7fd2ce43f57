"""Prometheus metrics. Counters live here; gauges are set from the state at each scrape."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from nodeagent.errors import InputError, Refused
from nodeagent.version import VERSION

REGISTRY = CollectorRegistry()
"""The process's only registry; nothing else registers here."""
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

ALLOCATIONS = Counter(
    "nodeagent_allocations", "Allocate calls by resource and outcome.", ["resource", "outcome"], registry=REGISTRY
)
ALLOCATE_SECONDS = Histogram(
    "nodeagent_allocate_seconds",
    "Time to decide an Allocate call and make it durable.",
    ["resource"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
    registry=REGISTRY,
)
RELEASES = Counter("nodeagent_releases", "Grants released because kubelet lists them no more.", registry=REGISTRY)
ADOPTIONS = Counter("nodeagent_adoptions", "Grants taken over from kubelet's list.", registry=REGISTRY)
SCANS = Histogram("nodeagent_scan_seconds", "Time to read the whole machine.", registry=REGISTRY)
DEVICES = Gauge("nodeagent_devices", "Ids shown to kubelet.", ["resource", "health"], registry=REGISTRY)
HELD = Gauge("nodeagent_held", "Ids held by containers.", ["resource"], registry=REGISTRY)
HOLDER = Gauge(
    "nodeagent_holder",
    "1 for each container or claim that holds something.",
    ["resource", "namespace", "pod", "container", "claim"],
    registry=REGISTRY,
)
DRIFT = Counter(
    "nodeagent_pin_drift",
    "Cgroup files that were found with another value than the desired one.",
    ["file"],
    registry=REGISTRY,
)
LEDGER_WHOLE = Gauge(
    "nodeagent_ledger_whole",
    "1 where the ledger has every decision; 0 while it is rebuilt, and nothing new is granted.",
    registry=REGISTRY,
)
LEDGER_REPLACED = Counter(
    "nodeagent_ledger_replaced",
    "Ledgers that were found damaged, removed or without decisions that were made, since the agent started.",
    registry=REGISTRY,
)
CONFIG_REFUSED = Gauge(
    "nodeagent_config_refused", "Whether the newest configuration is not in force.", registry=REGISTRY
)
CONFLICTS = Gauge("nodeagent_conflicts", "What kubelet lists and the ledger contradicts.", registry=REGISTRY)
DISPUTED = Gauge(
    "nodeagent_grants_disputed",
    "Grants that kubelet has stopped listing although their pods live.",
    registry=REGISTRY,
)
DRIFT_UNREPAIRED = Counter(
    "nodeagent_pin_drift_unrepaired",
    "Files among those that could not be put right when they were found.",
    ["file"],
    registry=REGISTRY,
)
PINNED = Gauge("nodeagent_pinned_containers", "Containers confined to what they hold.", registry=REGISTRY)
UNCONFINED = Gauge("nodeagent_unconfined_cgroups", "Cgroups that are not in their desired state.", registry=REGISTRY)
THROTTLED = Gauge(
    "nodeagent_throttled_containers", "Containers with less CPU time than exclusive CPUs.", registry=REGISTRY
)
RUNTIME_CONNECTED = Gauge(
    "nodeagent_runtime_connected", "1 where the container runtime asks through NRI.", registry=REGISTRY
)
NRI_DISCONNECTS = Counter(
    "nodeagent_nri_disconnects",
    "Connections to the container runtime that ended, by reason.",
    ["reason"],
    registry=REGISTRY,
)
NRI_LATE_ANSWERS = Counter(
    "nodeagent_nri_late_answers", "Answers that the container runtime did not wait for.", ["method"], registry=REGISTRY
)
NRI_ANSWER_SECONDS = Histogram(
    "nodeagent_nri_answer_seconds",
    "Time from the arrival of a question of the container runtime to its answer.",
    ["method"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
    registry=REGISTRY,
)
REGISTERED = Gauge(
    "nodeagent_registered", "1 where kubelet took and watches a resource.", ["resource"], registry=REGISTRY
)
PREPARES = Counter("nodeagent_prepares", "Claims asked to be prepared, by outcome.", ["outcome"], registry=REGISTRY)
PREPARE_SECONDS = Histogram(
    "nodeagent_prepare_seconds",
    "Time of a call that prepares claims, from reading them to the files.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 20),
    registry=REGISTRY,
)
DRA_REGISTERED = Gauge("nodeagent_dra_registered", "1 where kubelet took the DRA driver.", registry=REGISTRY)
DRA_CLAIMS = Gauge("nodeagent_dra_claims", "Claims that hold something.", registry=REGISTRY)
SLICES = Gauge(
    "nodeagent_resource_slices", "ResourceSlices of each pool in the API server.", ["pool", "state"], registry=REGISTRY
)
SLICE_WRITES = Gauge(
    "nodeagent_resource_slice_writes", "Writes of ResourceSlices since the agent started.", registry=REGISTRY
)
HUGEPAGES = Gauge(
    "nodeagent_hugepages",
    "Pages of each pool: total, free, reserved, and, if known, foreign: in use by no holder of a grant.",
    ["node", "size", "state"],
    registry=REGISTRY,
)
DEVICE_ILL = Gauge(
    "nodeagent_device_ill", "1 for each device that is not healthy.", ["device", "state", "reason"], registry=REGISTRY
)
DEVICE_READING = Gauge(
    "nodeagent_device_reading",
    "Numbers that were read to judge the health of devices.",
    ["device", "source", "reading"],
    registry=REGISTRY,
)
XIDS = Counter("nodeagent_xids", "Errors reported by NVIDIA's driver.", ["device", "code", "effect"], registry=REGISTRY)
GENERATION = Gauge("nodeagent_inventory_generation", "How often the machine was seen to change.", registry=REGISTRY)
WARNINGS = Gauge("nodeagent_inventory_warnings", "Files of the machine that cannot be read.", registry=REGISTRY)
INTRUDERS = Gauge(
    "nodeagent_intruders", "Threads of the host and interrupts on exclusive CPUs.", ["kind"], registry=REGISTRY
)
INTERRUPTS_MOVED = Counter(
    "nodeagent_interrupts_moved", "Interrupts moved away from exclusive CPUs.", registry=REGISTRY
)
READY = Gauge("nodeagent_ready", "1 where nothing of /readyz is wrong.", registry=REGISTRY)
INFO = Gauge("nodeagent_build_info", "1, with the version.", ["version"], registry=REGISTRY)
INFO.labels(VERSION).set(1)


@contextlib.contextmanager
def counted_allocation(resource: str) -> Iterator[None]:
    """Count and time one Allocate call by its outcome."""
    began, outcome = time.perf_counter(), "failed"
    try:
        yield
        outcome = "granted"
    except Refused:
        outcome = "refused"
        raise
    except InputError:
        outcome = "invalid"
        raise
    finally:
        ALLOCATIONS.labels(resource, outcome).inc()
        ALLOCATE_SECONDS.labels(resource).observe(time.perf_counter() - began)


def count_prepared(errors: int, good: int, took_s: float) -> None:
    """Count one call that prepared claims, with its failed and prepared claims and its duration."""
    PREPARES.labels("prepared").inc(good)
    PREPARES.labels("failed").inc(errors)
    PREPARE_SECONDS.observe(took_s)


def render() -> bytes:
    """Return all metrics in Prometheus's text format."""
    return generate_latest(REGISTRY)
