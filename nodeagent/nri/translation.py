"""Converts pods, containers and changes between the runtime's messages and core values.

Unreadable fields of a container are left out of the value and logged with the container's id: one odd container must
not hide the others. Values to be written are checked strictly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import structlog

from nodeagent.core.model import container as core
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import InputError
from nodeagent.pb import nri_pb2 as pb

_STATES = {
    pb.CONTAINER_CREATED: core.CREATED,
    pb.CONTAINER_PAUSED: core.PAUSED,
    pb.CONTAINER_RUNNING: core.RUNNING,
    pb.CONTAINER_STOPPED: core.STOPPED,
}
_PAGE_UNITS = {"GB": 1 << 30, "MB": 1 << 20, "KB": 1 << 10}
_PAGE_SIZE = re.compile(r"([1-9][0-9]{0,9})(KB|MB|GB)")
_LARGEST_LIMIT = (1 << 64) - 1
log = structlog.get_logger()


def read_pod(pod: pb.PodSandbox) -> core.Pod:
    """Return a pod sandbox as a core value. A runtime that lists no namespaces tells nothing of the network's."""
    own = {one.type: one.path for one in pod.linux.namespaces}
    return core.Pod(
        id=pod.id,
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        annotations=MappingProxyType(dict(pod.annotations)),
        cgroup_parent=pod.linux.cgroup_parent,
        network=own.get("network", ""),
        on_host_network=bool(own) and "network" not in own,
        pid=pod.pid,
    )


def read_container(container: pb.Container, pod: core.Pod | None) -> core.Container:
    """Return a container as a core value. `pod` is its pod, or None if the runtime did not list it."""
    return core.Container(
        id=container.id,
        pod_id=container.pod_sandbox_id,
        pod_uid=pod.uid if pod is not None else "",
        namespace=pod.namespace if pod is not None else "",
        pod_name=pod.name if pod is not None else "",
        name=container.name,
        state=_STATES.get(container.state, core.UNKNOWN),
        env=_read_env(container.env),
        annotations=MappingProxyType(dict(container.annotations)),
        cgroup_path=container.linux.cgroups_path,
        resources=read_resources(container.linux.resources, container.id),
        pid=container.pid,
    )


def read_resources(resources: pb.LinuxResources, container_id: str) -> core.Resources:
    """Return the resources as a core value. `container_id` is for the log."""
    cpu = resources.cpu
    return core.Resources(
        cpus=_read_set(cpu.cpus, "cpus", container_id),
        mems=_read_set(cpu.mems, "mems", container_id),
        hugepage_limits=_read_limits(resources.hugepage_limits, container_id),
    )


def write_adjustment(adjustment: core.Adjustment) -> pb.ContainerAdjustment:
    """Return an adjustment as protobuf. Raise InputError if a set is empty or a limit is out of range."""
    resources = _write_resources(adjustment, "new container")
    if adjustment.rdt_class:
        resources = resources or pb.LinuxResources()
        resources.rdt_class.value = adjustment.rdt_class
    return pb.ContainerAdjustment(
        env=[pb.KeyValue(key=key, value=value) for key, value in adjustment.env.items()],
        linux=pb.LinuxContainerAdjustment(resources=resources) if resources is not None else None,
    )


def write_update(update: core.Update) -> pb.ContainerUpdate:
    """Return an update as protobuf. Raise InputError if a set is empty or a limit is out of range."""
    resources = _write_resources(update, f"container {update.container_id}")
    return pb.ContainerUpdate(
        container_id=update.container_id, linux=pb.LinuxContainerUpdate(resources=resources or pb.LinuxResources())
    )


def page_bytes(name: str) -> int:
    """Return the bytes of a page size named as in the hugetlb controller, "2MB". Raise InputError, quoting the text."""
    found = _PAGE_SIZE.fullmatch(name)
    if found is None:
        raise InputError(f'cannot read page size "{name[:40]}": expected a number with KB, MB or GB, such as 2MB')
    return int(found[1]) * _PAGE_UNITS[found[2]]


def page_name(size_bytes: int) -> str:
    """Return the kernel's name of a page size, such as "1GB". Raise InputError if it has none."""
    for unit, unit_bytes in _PAGE_UNITS.items():
        if size_bytes > 0 and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    raise InputError(f"cannot name page size {size_bytes}: not a positive multiple of 1024 bytes")


def _read_env(env: Iterable[str]) -> Mapping[str, str]:
    """Return variables by name; the last entry of a name counts. An entry without "=" has an empty value."""
    pairs = (entry.partition("=") for entry in env)
    return MappingProxyType({name: value for name, _, value in pairs})


def _read_set(text: str, what: str, container_id: str) -> CpuSet | None:
    try:
        return CpuSet.parse(text, source=what) if text else None
    except InputError as error:
        log.warning("container-value-not-read", container=container_id, error=str(error))
        return None


def _read_limits(limits: Iterable[pb.HugepageLimit], container_id: str) -> Mapping[int, int]:
    found = {}
    for limit in limits:
        try:
            found[page_bytes(limit.page_size)] = limit.limit
        except InputError as error:
            log.warning("container-value-not-read", container=container_id, error=str(error))
    return MappingProxyType(found)


def _write_resources(change: core.Adjustment | core.Update, where: str) -> pb.LinuxResources | None:
    """Return the resources to write, or None if nothing changes."""
    if change.cpus is None and change.mems is None and not change.hugepage_limits:
        return None
    return pb.LinuxResources(
        cpu=pb.LinuxCPU(cpus=_write_set(change.cpus, "CPUs", where), mems=_write_set(change.mems, "NUMA nodes", where)),
        hugepage_limits=[_write_limit(*limit, where) for limit in sorted(change.hugepage_limits.items())],
    )


def _write_set(ids: CpuSet | None, what: str, where: str) -> str:
    """Return a set as text. Raise InputError if it is empty: on the wire that would mean "leave it as it is"."""
    if ids is not None and not ids:
        raise InputError(f"cannot confine {where}: its set of {what} is empty")
    return str(ids) if ids is not None else ""


def _write_limit(size_bytes: int, limit_bytes: int, where: str) -> pb.HugepageLimit:
    if not 0 <= limit_bytes <= _LARGEST_LIMIT:
        raise InputError(f"cannot confine {where}: hugepage limit {limit_bytes} is not in 0 to {_LARGEST_LIMIT}")
    return pb.HugepageLimit(page_size=page_name(size_bytes), limit=limit_bytes)
