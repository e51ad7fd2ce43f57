"""The gauges that are read from the state when a scrape comes: names, labels and where each value is found.

Counters and histograms, which count what happens, are in `telemetry/metrics.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from nodeagent.admin import numa_gauges as numa
from nodeagent.admin.watched import Watched, disputed, resources
from nodeagent.core.deviceplugin.causes import known_health
from nodeagent.core.model.grant import KUBELET
from nodeagent.core.model.health import HEALTHY, HealthState
from nodeagent.core.model.quantity import format_size
from nodeagent.resources.catalog import THROUGH_DRA

Sample = tuple[tuple[str, ...], float]
"""The values of the labels, in the order of the gauge's `labels`, and the value."""
Samples = Mapping[tuple[str, ...], float]


class Moment:
    """The state as one scrape sees it; what several gauges need is computed once."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.agent = watched.agent
        self.ledger = watched.agent.ledger
        self.inventory = watched.agent.inventory

    @functools.cached_property
    def resources(self) -> list[dict[str, Any]]:
        """Return how the resources of the device plugin stand."""
        return resources(self.watched)

    @functools.cached_property
    def dra(self) -> dict[str, Any]:
        """Return the state of DRA."""
        return self.watched.dra_document()

    @functools.cached_property
    def pinning(self) -> dict[str, Any]:
        """Return how containers are confined."""
        return self.watched.pinning_document()


class StateGauge(msgspec.Struct, frozen=True, kw_only=True):
    """One gauge. `read` yields its samples; of equal labels the last counts."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    read: Callable[[Moment], Iterable[Sample]]

    def samples(self, moment: Moment) -> Samples:
        """Return the samples at a moment, by the values of the labels."""
        return dict(self.read(moment))


def _one(name: str, help: str, value: Callable[[Moment], float]) -> StateGauge:
    """Return a gauge without labels."""
    return StateGauge(name=name, help=help, read=lambda moment: [((), value(moment))])


def _devices(moment: Moment) -> Iterator[Sample]:
    for one in moment.resources:
        yield (one["name"], "healthy"), one["healthy"]
        yield (one["name"], "held"), one["held_elsewhere"]
        yield (one["name"], "unhealthy"), one["devices"] - one["healthy"] - one["held_elsewhere"]


def _scattered_cpus(moment: Moment) -> float:
    from nodeagent.core.advice.fragmentation import CPU, fragmentation

    return dict(fragmentation(moment.inventory, moment.ledger))[CPU]


def _holders(moment: Moment) -> Iterator[Sample]:
    for grant in moment.ledger.grants.values():
        holder = grant.holder
        pod = holder.uid if holder.api == KUBELET else holder.pod
        yield (holder.resource, holder.namespace, pod, holder.container, holder.claim), 1


def _refused(moment: Moment) -> Iterator[Sample]:
    for name, reason in moment.watched.refused.items():
        api = "dra" if name.endswith(THROUGH_DRA) else "device-plugin"
        yield (name.removesuffix(THROUGH_DRA), api, reason), 1


def _ill(moment: Moment) -> Iterator[Sample]:
    health, inventory = moment.agent.health, moment.inventory
    # Dozens of instances can be made of one GPU: of what is wrong with the GPU it has the one sample.
    possible = {one.id for one in inventory.devices if one.partition is not None}
    for device, state in known_health(inventory, health, _configured(moment)).items():
        if state.state != HEALTHY and (device not in possible or _is_ill(health.get(device))):
            yield (device, state.state, state.reason), 1


def _is_ill(state: HealthState | None) -> bool:
    return state is not None and state.state != HEALTHY


def _degraded(moment: Moment) -> Iterator[Sample]:
    for device, state in moment.agent.health.items():
        for source, reason in state.degradations:
            yield (device, source, reason), 1


def _readings(moment: Moment) -> Iterator[Sample]:
    for (device, source), readings in moment.watched.health_readings().items():
        for reading, number in readings.items():
            yield (device, source, reading), number


def _slices(moment: Moment) -> Iterator[Sample]:
    for pool in moment.dra.get("slices", {}).get("pools", ()):
        yield (pool["name"], pool["state"]), pool["slices"]


def _hugepages(moment: Moment) -> Iterator[Sample]:
    for pool in (pool for node in moment.inventory.numa_nodes for pool in node.hugepages):
        states = {"total": pool.total_pages, "free": pool.free_pages, "reserved": pool.reserved_pages}
        states |= {"foreign": pool.foreign_pages} if pool.foreign_pages is not None else {}
        for state, pages in states.items():
            yield (str(pool.node), format_size(pool.page_bytes), state), pages


def _cache_groups(moment: Moment) -> Iterator[Sample]:
    if caches := moment.pinning.get("caches"):
        yield ("used",), caches["groups_used"]
        yield ("most",), caches["groups_most"]


def _counted(*events: tuple[str, tuple[str, ...]]) -> Callable[[Moment], Iterator[Sample]]:
    """Return what yields the samples of some events of resctrl, each with more values of labels."""

    def samples(moment: Moment) -> Iterator[Sample]:
        for group in moment.pinning.get("caches", {}).get("groups", ()):
            for event, more in events:
                for l3, amount in group[event].items():
                    yield (group["claim"], group["class"], l3, *more), amount

    return samples


def _numa(rows: Callable[..., Iterable[Sample]]) -> Callable[[Moment], Iterable[Sample]]:
    return lambda moment: rows(moment.inventory, moment.ledger)


def _numa_devices(moment: Moment) -> Iterable[Sample]:
    return numa.devices(moment.inventory, moment.ledger, moment.agent.health, _configured(moment))


def _configured(moment: Moment) -> list[object]:
    return [one.resource for one in moment.watched.configured()]


STATE_GAUGES = (
    StateGauge(name="nodeagent_devices", help="Ids shown to kubelet.", labels=("resource", "health"), read=_devices),
    StateGauge(
        name="nodeagent_held",
        help="Ids held by containers.",
        labels=("resource",),
        read=lambda moment: [((one["name"],), one["held"]) for one in moment.resources],
    ),
    StateGauge(
        name="nodeagent_holder",
        help="1 for each container or claim that holds something.",
        labels=("resource", "namespace", "pod", "container", "claim"),
        read=_holders,
    ),
    StateGauge(
        name="nodeagent_registered",
        help="1 where kubelet took and watches a resource.",
        labels=("resource",),
        read=lambda moment: [((one["name"],), one["registered"]) for one in moment.resources],
    ),
    StateGauge(
        name="nodeagent_numa_cpus",
        help="CPUs of each NUMA node: free, held, reserved for the system, outside the cpuset of all pods.",
        labels=("numa_node", "state"),
        read=_numa(numa.cpus),
    ),
    StateGauge(
        name="nodeagent_numa_whole_cores_free",
        help="Cores of each NUMA node of which every thread is free.",
        labels=("numa_node",),
        read=_numa(numa.whole_cores),
    ),
    StateGauge(
        name="nodeagent_numa_largest_free_l3_cpus",
        help="The most free CPUs of each NUMA node that share one L3 cache.",
        labels=("numa_node",),
        read=_numa(numa.largest_l3),
    ),
    _one(
        "nodeagent_cpu_fragmentation_ratio",
        "How scattered the free CPUs lie over the NUMA nodes: 0 where as many are free on one node as can be.",
        _scattered_cpus,
    ),
    StateGauge(
        name="nodeagent_numa_hugepages",
        help="Pages of each NUMA node and size: free to be granted, held by grants.",
        labels=("numa_node", "size", "state"),
        read=_numa(numa.hugepages),
    ),
    StateGauge(
        name="nodeagent_numa_memory_bytes",
        help="Memory of each NUMA node that is not in hugepages: free to be granted, held by grants.",
        labels=("numa_node", "state"),
        read=_numa(numa.memory),
    ),
    StateGauge(
        name="nodeagent_numa_devices",
        help="Devices of configured resources: held (whole or in shares), unhealthy, excluded by a held one, free.",
        labels=("numa_node", "kind", "state"),
        read=_numa_devices,
    ),
    StateGauge(
        name="nodeagent_cache_groups",
        help="Groups of resctrl: used, by any program, and the most that the hardware has.",
        labels=("state",),
        read=_cache_groups,
    ),
    StateGauge(
        name="nodeagent_cache_occupancy_bytes",
        help="What a claim's group or a shared class occupies of an L3 cache.",
        labels=("claim", "class", "l3"),
        read=_counted(("llc_occupancy", ())),
    ),
    StateGauge(
        name="nodeagent_memory_traffic_bytes",
        help="Bytes that a claim's group or a shared class has moved to and from memory since the group was made.",
        labels=("claim", "class", "l3", "scope"),
        read=_counted(("mbm_total_bytes", ("total",)), ("mbm_local_bytes", ("local",))),
    ),
    _one(
        "nodeagent_ledger_whole",
        "1 where the ledger has every decision; 0 while it is rebuilt, and nothing new is granted.",
        lambda moment: not moment.agent.loss,
    ),
    _one(
        "nodeagent_config_refused",
        "Whether the newest configuration is not in force.",
        lambda moment: bool(moment.watched.config_error),
    ),
    StateGauge(
        name="nodeagent_resource_refused",
        help="1 for each configured resource that is not served, and through which API.",
        labels=("resource", "api", "reason"),
        read=_refused,
    ),
    _one(
        "nodeagent_conflicts",
        "What kubelet lists and the ledger contradicts.",
        lambda moment: len(moment.agent.conflicts),
    ),
    _one(
        "nodeagent_grants_disputed",
        "Grants that kubelet has stopped listing although their pods live.",
        lambda moment: len(disputed(moment.agent)),
    ),
    StateGauge(
        name="nodeagent_device_ill",
        help="1 for each device that is not healthy.",
        labels=("device", "state", "reason"),
        read=_ill,
    ),
    StateGauge(
        name="nodeagent_device_degraded",
        help="1 for each cause for which a device works, but not as well as it could.",
        labels=("device", "source", "reason"),
        read=_degraded,
    ),
    StateGauge(
        name="nodeagent_device_reading",
        help="Numbers that were read to judge the health of devices.",
        labels=("device", "source", "reading"),
        read=_readings,
    ),
    _one(
        "nodeagent_dra_registered",
        "1 where kubelet took the DRA driver.",
        lambda moment: moment.dra.get("registered", False),
    ),
    _one("nodeagent_dra_claims", "Claims that hold something.", lambda moment: moment.dra.get("claims", 0)),
    StateGauge(
        name="nodeagent_resource_slices",
        help="ResourceSlices of each pool in the API server.",
        labels=("pool", "state"),
        read=_slices,
    ),
    _one(
        "nodeagent_resource_slice_writes",
        "Writes of ResourceSlices since the agent started.",
        lambda moment: moment.dra.get("slices", {}).get("writes", 0),
    ),
    StateGauge(
        name="nodeagent_hugepages",
        help="Pages of each pool: total, free, reserved, and, if known, foreign: in use by no holder of a grant.",
        labels=("node", "size", "state"),
        read=_hugepages,
    ),
    _one(
        "nodeagent_pinned_containers",
        "Containers confined to what they hold.",
        lambda moment: len(moment.pinning["pinned"]),
    ),
    _one(
        "nodeagent_unconfined_cgroups",
        "Cgroups that are not in their desired state.",
        lambda moment: len(moment.pinning["errors"]),
    ),
    _one(
        "nodeagent_throttled_containers",
        "Containers with less CPU time than exclusive CPUs.",
        lambda moment: sum(one["quota_cpus"] is not None for one in moment.pinning["pinned"]),
    ),
    _one(
        "nodeagent_runtime_connected",
        "1 where the container runtime asks through NRI.",
        lambda moment: moment.pinning["connected"],
    ),
    _one(
        "nodeagent_inventory_generation",
        "How often the machine was seen to change.",
        lambda moment: moment.inventory.generation,
    ),
    _one(
        "nodeagent_inventory_warnings",
        "Files of the machine that cannot be read.",
        lambda moment: len(moment.inventory.warnings),
    ),
    _one("nodeagent_ready", "1 where nothing of /readyz is wrong.", lambda moment: not moment.watched.not_ready()),
)
