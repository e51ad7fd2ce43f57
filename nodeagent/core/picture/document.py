"""A picture in plain types, as `nodeagent map -o json` and GET /v1/map show it."""

from __future__ import annotations

from typing import Any

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.quantity import format_size
from nodeagent.core.picture.values import (
    PartState,
    Picture,
    PictureDevice,
    PictureGroup,
    PictureHolder,
    PictureNode,
    PicturePool,
)


def to_document(picture: Picture) -> dict[str, Any]:
    """Return a picture as plain types; `holder` and `holders` count from 0 in the list `holders`."""
    return {
        "generation": picture.generation,
        "cpus": {
            **{state: str(cpus) for state, cpus in cpus_by_state(picture).items()},
            "offline": str(picture.offline),
        },
        "packages": [
            {"packages": list(package.packages), "nodes": [_node(node) for node in package.nodes]}
            for package in picture.packages
        ],
        "holders": [_holder(one) for one in picture.holders],
    }


def cpus_by_state(picture: Picture) -> dict[str, CpuSet]:
    """Return the online CPUs in each state that CPUs can have."""
    states = [state for state in PartState if state != PartState.EXCLUDED]
    return {str(state): CpuSet(cpu.id for cpu in picture.cpus() if cpu.state == state) for state in states}


def _node(node: PictureNode) -> dict[str, Any]:
    return {
        "numa_node": node.node,
        "kind": node.kind,
        "memory_bytes": node.memory_bytes,
        "memory_held": [{"holder": holder, "bytes": size} for holder, size in node.memory_held],
        "hugepages": [_pool(pool) for pool in node.hugepages],
        "devices": [_device(device) for device in node.devices],
        "groups": [_group(group) for group in node.groups],
    }


def _pool(pool: PicturePool) -> dict[str, Any]:
    return {
        "size": format_size(pool.page_bytes),
        "total": pool.total_pages,
        "free": pool.free_pages,
        "held": [{"holder": holder, "pages": pages} for holder, pages in pool.held],
    }


def _device(device: PictureDevice) -> dict[str, Any]:
    return {
        "id": device.id,
        "kind": device.kind,
        "name": device.name,
        "state": str(device.state),
        "holders": list(device.holders),
        "health": str(device.health),
        "reason": device.reason,
    }


def _group(group: PictureGroup) -> dict[str, Any]:
    return {
        "package": group.package,
        "l3": group.l3,
        "cores": [
            {
                "core": core.core,
                "kind": core.kind,
                "cpus": [
                    {"cpu": cpu.id, "state": str(cpu.state), "holders": list(cpu.holders), "isolated": cpu.isolated}
                    for cpu in core.cpus
                ],
            }
            for core in group.cores
        ],
    }


def _holder(holder: PictureHolder) -> dict[str, Any]:
    return {
        "letter": holder.letter,
        "name": holder.name,
        "api": holder.api,
        "namespace": holder.namespace,
        "pod": holder.pod,
        "claim": holder.claim,
        "uids": list(holder.uids),
        "grants": list(holder.grants),
        "cpus": str(holder.cpus),
        "hugepages": [
            {"size": format_size(one.page_bytes), "numa_node": one.node, "pages": one.pages} for one in holder.hugepages
        ],
        "memory": [{"numa_node": node, "bytes": size} for node, size in holder.memory],
        "devices": list(holder.devices),
    }
