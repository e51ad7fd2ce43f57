"""Prometheus metrics of what happens: counters, histograms, and gauges that code sets. Gauges that are read from the
state at each scrape are in `admin/state_gauges.py`."""

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
"""The process's only registry."""
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
PREFER_SECONDS = Histogram(
    "nodeagent_prefer_seconds",
    "Time to answer GetPreferredAllocation.",
    ["resource"],
    buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
    registry=REGISTRY,
)
LEDGER_WRITE_SECONDS = Histogram(
    "nodeagent_ledger_write_seconds",
    "Time to make the decisions of one transaction durable in the ledger's file.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
    registry=REGISTRY,
)
REGISTRATION_SECONDS = Histogram(
    "nodeagent_registration_seconds",
    "Time from the socket of a new kubelet to the registration of a resource with it.",
    ["resource"],
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
    registry=REGISTRY,
)
EVENT_TO_LIST_SECONDS = Histogram(
    "nodeagent_event_to_list_seconds",
    "Time from an event of the kernel to the list or the ResourceSlices that show what it changed.",
    ["api"],
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
    registry=REGISTRY,
)
RELEASES = Counter("nodeagent_releases", "Grants released because kubelet lists them no more.", registry=REGISTRY)
ADOPTIONS = Counter("nodeagent_adoptions", "Grants taken over from kubelet's list.", registry=REGISTRY)
SCANS = Histogram("nodeagent_scan_seconds", "Time to read the whole machine.", registry=REGISTRY)
DRIFT = Counter(
    "nodeagent_pin_drift",
    "Cgroup files that were found with another value than the desired one.",
    ["file"],
    registry=REGISTRY,
)
LEDGER_REPLACED = Counter(
    "nodeagent_ledger_replaced",
    "Ledgers that were found damaged, removed or without decisions that were made, since the agent started.",
    registry=REGISTRY,
)
DRIFT_UNREPAIRED = Counter(
    "nodeagent_pin_drift_unrepaired",
    "Files among those that could not be repaired when they were found.",
    ["file"],
    registry=REGISTRY,
)
DRIFT_REPAIR_SECONDS = Histogram(
    "nodeagent_pin_drift_repair_seconds",
    "Time from when a changed cgroup was noticed to when a read-back confirmed its repair.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5, 30, 60),
    registry=REGISTRY,
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
PREPARES = Counter("nodeagent_prepares", "Claims asked to be prepared, by outcome.", ["outcome"], registry=REGISTRY)
PREPARE_SECONDS = Histogram(
    "nodeagent_prepare_seconds",
    "Time of a call that prepares claims, from reading them to the files.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 20),
    registry=REGISTRY,
)
UNPREPARE_SECONDS = Histogram(
    "nodeagent_unprepare_seconds",
    "Time of a call that unprepares claims, with the wait for the last processes of their pods.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 2, 5, 20),
    registry=REGISTRY,
)
XIDS = Counter("nodeagent_xids", "Errors reported by NVIDIA's driver.", ["device", "code", "effect"], registry=REGISTRY)
INTRUDERS = Gauge(
    "nodeagent_intruders", "Threads of the host and interrupts on exclusive CPUs.", ["kind"], registry=REGISTRY
)
INTERRUPTS_MOVED = Counter(
    "nodeagent_interrupts_moved", "Interrupts moved away from exclusive CPUs.", registry=REGISTRY
)
CPU_SETTINGS = Gauge(
    "nodeagent_cpu_settings",
    "Kernel files of exclusive CPUs by whether they have what pinning.tuning asks for.",
    ["state"],
    registry=REGISTRY,
)
CPU_SETTINGS_REPAIRED = Counter(
    "nodeagent_cpu_settings_repaired",
    "Kernel files of exclusive CPUs that another program had changed.",
    registry=REGISTRY,
)
CACHE_GROUPS_REPAIRED = Counter(
    "nodeagent_cache_groups_repaired",
    "Groups of resctrl that another program had changed or removed.",
    registry=REGISTRY,
)
CACHE_TASKS_MOVED = Counter(
    "nodeagent_cache_tasks_moved",
    "Tasks of running containers that were not in the resctrl group of their container.",
    registry=REGISTRY,
)
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
    """Return these metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
