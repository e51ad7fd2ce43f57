"""What the kernel says of a pod's containers: as the agent has read it, and as the control groups show it now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nodeagent.cli.shared.node_state import NodeState
from nodeagent.cli.shared.tables import print_table
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.quantity import format_size
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup.layout import CONTAINER
from nodeagent.host.cgroup.read import CgroupPart, CgroupReader, CgroupState, find, hierarchy, page_sizes
from nodeagent.host.sysfs.sysfs import SysFs

Document = dict[str, Any]
PARTS = CgroupPart.CPUSET | CgroupPart.HUGETLB_LIMITS | CgroupPart.HUGETLB_USE | CgroupPart.CPU_TIME


def kernel_document(state: NodeState, root: str, pod: str, uids: Iterable[str], cpus: CpuSet) -> Document:
    """Return what the kernel says of a pod, NAMESPACE/NAME, and of the CPUs that it holds."""
    uids, pinning = frozenset(uids), state.status["pinning"]
    mine = [one for one in pinning.get("pinned", ()) if f"{one['namespace']}/{one['pod']}" == pod]
    if uids:
        mine = [one for one in mine if not one["pod_uid"] or one["pod_uid"] in uids]
    cgroups, trouble = _cgroups(root, uids)
    return {
        "mode": pinning["mode"],
        "pinned": mine,
        "cgroups": cgroups,
        "trouble": trouble,
        **intruders_on(pinning, cpus),
    }


def intruders_on(pinning: Mapping[str, Any], cpus: CpuSet) -> Document:
    """Return the interrupts and the host's threads that may run on some CPUs, as the agent found them last."""
    found = pinning.get("intruders", {})

    def here(kind: str) -> list[Any]:
        return [one for one in found.get(kind, ()) if not CpuSet.parse(one["cpus"]).isdisjoint(cpus)]

    return {"irqs": [one for one in here("irqs") if not one["moved"]], "threads": here("threads")}


def _cgroups(root: str, uids: frozenset[str]) -> tuple[list[Document], str]:
    """Return the control groups of a pod's containers, and why they cannot be read, or ""."""
    sysfs = SysFs(root)
    try:
        mount = hierarchy(sysfs).mount
        if not mount or not uids:
            return [], ""
        reader = CgroupReader(mount, page_sizes(sysfs))
        mine = [one for one in find(mount) if one.kind == CONTAINER and one.pod_uid in uids]
        states = ((one.container_id, reader.read(one.path, PARTS)) for one in mine)
        return [_cgroup(id, seen) for id, seen in states if seen is not None], ""
    except (HostError, InputError) as error:
        return [], str(error)


def _cgroup(container: str, seen: CgroupState) -> Document:
    pages = seen.hugetlb or {}
    return {
        "container_id": container,
        "path": seen.path,
        "cpus": str(seen.cpus_effective or ""),
        "mems": str(seen.mems_effective or ""),
        "hugepages": {
            format_size(size): {"used_bytes": one.current_bytes, "limit_bytes": one.max_bytes, "failures": one.failures}
            for size, one in pages.items()
        },
        "quota_cpus": seen.quota_us / seen.period_us if seen.quota_us and seen.period_us else None,
        "throttled": seen.throttled_count,
        "throttled_us": seen.throttled_us,
    }


# ---------------------------------------------------------------- as text


def print_kernel(document: Mapping[str, Any]) -> None:
    """Print what the kernel says."""
    print()
    if document["mode"] == "off":
        print("kernel: pinning is off, the agent has nothing confined")
    if document["trouble"]:
        print(f"kernel: {document['trouble']}")
    if document["pinned"]:
        rows = ((one["container"], *_pin_cells(one)) for one in document["pinned"])
        print_table(("CONTAINER", "GRANTED", "EFFECTIVE", "NUMA", "PAGE LIMITS", "CPU QUOTA", "DRIFTS", "ERROR"), rows)
    for one in document["cgroups"]:
        print(f"{one['path']}: {', '.join(_facts(one))}")
    print_intruders(document)


def print_intruders(document: Mapping[str, Any]) -> None:
    """Print the interrupts and threads that may run on the CPUs."""
    for one in document["irqs"]:
        print(f"interrupt {one['irq']} ({one['name']}) may run on {one['cpus']}")
    for one in document["threads"]:
        print(f"thread {one['tid']} ({one['comm']}) of the host may run on {one['cpus']}")


def _pin_cells(one: Mapping[str, Any]) -> tuple[object, ...]:
    limits = " ".join(f"{size}={limit}" for size, limit in one["hugepage_limits"].items())
    mems = one["effective_mems"]
    return one["granted_cpus"], one["effective_cpus"], mems, limits, one["quota_cpus"], one["drifts"], one["error"]


def _facts(one: Mapping[str, Any]) -> Iterator[str]:
    yield f"CPUs {one['cpus'] or 'unknown'}"
    yield f"memory of NUMA nodes {one['mems'] or 'unknown'}"
    for size, pages in one["hugepages"].items():
        limit = "no limit" if pages["limit_bytes"] is None else f"at most {format_size(pages['limit_bytes'])}"
        yield f"pages of {size}: {format_size(pages['used_bytes'] or 0)} used, {limit}"
        if pages["failures"]:
            yield f"the limit was hit {pages['failures']} times"
    if one["quota_cpus"] is not None:
        yield f"limited to {one['quota_cpus']:g} CPUs"
    if one["throttled"]:
        yield f"throttled {one['throttled']} times, {(one['throttled_us'] or 0) / 1e6:.1f} s"
