"""What the containers of a claim are given, and what they can read about it. Combines what core knows about grants with
what the host kinds know about devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.model.device import ContainerEdits, Device, Mount
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.topology import NodeId
from nodeagent.core.opaque.settings import OpaqueConfig, from_json
from nodeagent.core.pinning.plan import variable
from nodeagent.core.pinning.threads import used_cpus
from nodeagent.core.sharing.amounts import CORES, MEMORY
from nodeagent.core.sharing.mps import enforcement
from nodeagent.errors import HostError
from nodeagent.host.devices.all_kinds import merged
from nodeagent.host.devices.hooks import prepares
from nodeagent.managers.dra import mps_edits
from nodeagent.managers.dra.device_metadata import by_request
from nodeagent.resources.catalog import Dra
from nodeagent.resources.offer import Offer, held_variables, nodes_of_cpus, numbers
from nodeagent.state import grant_json as storedgrant

CLAIMS_FOLDER = "/var/run/nodeagent/claims"
"""Where a container finds the metadata of its claims: CLAIMS_FOLDER/NAME/metadata.json."""
MPS_FOLDER = Path("/run/nodeagent/mps")
"""The folder of the MPS daemons, if the configuration leaves the runtime folder as it is."""


class NotPreparedError(HostError):
    """A device is not prepared for its claim at this moment: what was prepared before may be another's by now."""


def edits(
    dra: Dra,
    inventory: Inventory,
    grants: Sequence[Grant],
    metadata: Mount,
    of_request: Mapping[str, Mount] = MappingProxyType({}),
    mps_folder: Path = MPS_FOLDER,
) -> list[ContainerEdits]:
    """Return, for each grant of one claim, the edits of its CDI device; never empty, as the metadata mount is always
    there. The mount that `of_request` has for a request goes with its first device.

    A variable covers everything granted to the same request. A container that uses several requests finds each under
    the request's own name, and all of them in the metadata. Raise HostError or InputError if a device cannot be handed
    over.
    """
    found = dict[str, ContainerEdits]()
    for request, some in by_request(grants).items():
        env, left = _environment(inventory, request, some), dict(of_request)
        for one in some:
            mounts = (*filter(None, [left.pop(request, None)]), metadata, *mps_edits.mounts(one, mps_folder))
            own = {**mps_edits.variables(inventory, one, grants), **env}
            found[one.id] = _edits(dra, inventory, one, some, own, mounts)
    return [found[one.id] for one in grants]


def _edits(
    dra: Dra,
    inventory: Inventory,
    grant: Grant,
    same_request: Sequence[Grant],
    env: Mapping[str, str],
    mounts: Sequence[Mount],
) -> ContainerEdits:
    own, settings = _device_edits(dra, inventory, grant, same_request), from_json(grant.settings)
    return replace(
        own,
        env=MappingProxyType({**own.env, **settings.env, **env, variable(grant.id): grant.id}),
        mounts=(*own.mounts, *_settings_mounts(settings, grant), *mounts),
    )


def _device_edits(dra: Dra, inventory: Inventory, grant: Grant, same_request: Iterable[Grant]) -> ContainerEdits:
    device = device_of(dra, inventory, grant)
    if device is None:
        return ContainerEdits()
    offer = next((one for one in dra.offers if _serves(one, device)), None)
    if offer is None:
        raise HostError(f"cannot hand over {device.id}: no configured resource serves it (or no longer does)")
    siblings = [
        found for one in same_request if (found := device_of(dra, inventory, one)) and found.kind == device.kind
    ]
    settings = from_json(grant.settings)
    if settings.driver and device.driver != settings.driver:
        now = device.driver or "no driver"
        raise HostError(f"cannot hand over {device.id}: it is bound to {now}, and not to {settings.driver} yet")
    rdma = settings.rdma is not False
    own = offer.device_edits(inventory, device, siblings, settings.driver_capabilities, rdma=rdma)
    if not prepares(offer.family) or not grant.devices:
        return own
    if device.prepared is None or device.prepared.grant != grant.id:
        raise NotPreparedError(f"cannot hand over {device.id}: the kind {device.kind} has not prepared it yet")
    return merged([own, device.prepared.edits])


def device_of(dra: Dra, inventory: Inventory, grant: Grant) -> Device | None:
    """Return the device of a grant, held or only accessed, or None for CPUs, pages or memory. Raise HostError if it is
    missing."""
    one = next(iter((*grant.devices, *grant.shares)), "") or _looked_at(dra, inventory, grant)
    if one and one not in inventory.device_by_id:
        raise HostError(f"cannot hand over {one}: it is not there at this moment")
    return inventory.device_by_id[one] if one else None


def _looked_at(dra: Dra, inventory: Inventory, grant: Grant) -> str:
    """Return the device that a claim with admin access sees without holding it, or "" if there is none. Raise
    InputError if it is missing."""
    if grant.result is None or not grant.result.admin:
        return ""
    return dra.catalog.find(inventory, grant.result)[1].device


def cdi_names(dra: Dra, inventory: Inventory, grant: Grant) -> tuple[str, ...]:
    """Return names from third-party CDI specs through which the device is configured to be handed over."""
    return _device_edits(dra, inventory, grant, [grant]).cdi_devices


def _serves(offer: Offer, device: Device) -> bool:
    return isinstance(offer.resource, DeviceResource) and offer.resource.serves(device)


def _environment(inventory: Inventory, request: str, grants: Sequence[Grant]) -> dict[str, str]:
    """Return what one request was granted, under the usual names and with the request's name appended. Requests are
    named by DNS labels, so two never map to the same variable."""
    env = {**held_variables(inventory, grants), **_memory_env(grants)}
    word = request.upper().replace("-", "_")
    # The usual names win: a request may be called "numa-nodes".
    return {**{f"{name}_{word}": value for name, value in env.items()}, **env}


def _memory_env(grants: Iterable[Grant]) -> dict[str, str]:
    memory = [one for grant in grants for one in grant.memory]
    if not memory:
        return {}
    return {
        "NODEAGENT_MEMORY_BYTES": str(sum(size for _, size in memory)),
        "NODEAGENT_MEMORY_NUMA_NODES": numbers(node for node, _ in memory),
    }


def _settings_mounts(settings: OpaqueConfig, grant: Grant) -> Iterator[Mount]:
    if settings.mount_path and grant.hugepages:
        yield Mount(
            host_path="nodev",
            container_path=settings.mount_path,
            read_only=False,
            type="hugetlbfs",
            options=(f"pagesize={grant.hugepages[0].page_bytes >> 10}K", "mode=1777"),
        )


# ---------------------------------------------------------------- what a container can read


def metadata(dra: Dra, inventory: Inventory, grants: Sequence[Grant], pod_claim: str = "") -> dict[str, Any]:
    """Return what a claim holds, for the application that uses it (docs/dra.md). `pod_claim` is its name in the pod for
    which it was made from a template."""
    first = grants[0].holder
    made_for = {"podClaimName": pod_claim} if pod_claim else {}
    return {
        "apiVersion": "nodeagent.dev/v1alpha1",
        "kind": "ClaimMetadata",
        "claim": {"namespace": first.namespace, "name": first.claim, "uid": first.uid, **made_for},
        "devices": [_device_metadata(dra, inventory, grant) for grant in grants],
        "grants": [storedgrant.document(grant) for grant in grants],
    }


def _device_metadata(dra: Dra, inventory: Inventory, grant: Grant) -> dict[str, Any]:
    result, device = grant.result, device_of(dra, inventory, grant)
    pages = [{"size": format_size(one.page_bytes), "pages": one.pages, "numaNode": one.node} for one in grant.hugepages]
    found: dict[str, Any] = {
        "request": result.request if result else "",
        "pool": result.pool if result else "",
        "device": result.device if result else "",
        "shareID": (result.share_id if result else "") or None,
        "adminAccess": True if result and result.admin else None,
        "kind": device.kind if device else result.pool.rpartition("/")[2] if result else "",
        "cpus": str(used_cpus(inventory, grant) or grant.cpus) or None,
        "numaNodes": _nodes(inventory, grant, device) or None,
        "hugepages": pages or None,
        "memory": [{"bytes": size, "numaNode": node} for node, size in grant.memory] or None,
        "id": device.id if device else None,
        "pciAddress": device.pci_address if device else None,
        "paths": list(device.paths) or None if device else None,
        "limits": _limits(grant),
    }
    return {name: value for name, value in found.items() if value is not None}


def _limits(grant: Grant) -> dict[str, Any] | None:
    """Return what a grant has of a shared device, and what enforces it."""
    sizes = {name: size for _, name, size in grant.amounts}
    if not sizes:
        return None
    cores = {"coresPercent": sizes[CORES]} if CORES in sizes else {}
    return {"memoryBytes": sizes[MEMORY], **cores, "enforcedBy": enforcement([grant])}


def _nodes(inventory: Inventory, grant: Grant, device: Device | None) -> list[NodeId]:
    nodes = {*nodes_of_cpus(inventory, grant.cpus), *(one.node for one in grant.hugepages)}
    nodes |= {node for node, _ in grant.memory}
    if device is not None and device.numa_node is not None:
        nodes.add(device.numa_node)
    return sorted(nodes)
