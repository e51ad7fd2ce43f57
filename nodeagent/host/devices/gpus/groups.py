"""Ready-made sets of linked GPUs: devices that hand over several GPUs at once.

A set excludes its members and all other sets that have one of them (Device.exclusive), whichever API they are granted
through. Its id has a digest of its members: other members are another device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.cpuset import union
from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.placement.linked import Weight, linked_sets
from nodeagent.core.placement.proximity import Proximity
from nodeagent.host.devices.gpus.links import DOMAINS

_COMMON = ("product", "driver_version", "fabric_cluster", "fabric_clique", *DOMAINS.values())
"""Attributes of a set that all members have with the same value."""
_LISTED = {"uuid": "uuids", "drm_card": "drm_card", "drm_render": "drm_render"}
"""Attributes of a set that have the values of all members, by the members' name."""
_VARIABLE = "PCIDEVICE_NODEAGENT_GPU"


def gpu_groups(inventory: Inventory, sizes: Collection[int]) -> Iterator[Device]:
    """Yield the sets of some sizes of GPUs that are whole, have no parts, can be handed over, and are linked each with
    each."""
    gpus = {one.id: one for one in inventory.devices if _can_be_member(inventory, one)} if sizes else {}
    links = [one for one in inventory.links if one.a in gpus and one.b in gpus]
    near, weights = Proximity(inventory), dict[tuple[str, str], Weight]()
    for one in links:
        pair = (one.a, one.b) if one.a < one.b else (one.b, one.a)
        weights[pair] = max(weights.get(pair, (0, 0)), (one.weight, near.place_weight(gpus[one.a], gpus[one.b])))
    for size, sets in linked_sets(weights).items():
        for ids in sets if size in sizes else ():
            yield _group([gpus[one] for one in ids], inventory)


def _can_be_member(inventory: Inventory, device: Device) -> bool:
    whole = device.kind == "gpu" and device.parent is None and device.id not in inventory.parts_of
    return whole and not device.attributes.get("mig") and not device.lacks_node and device.exclusive is None


def _group(gpus: Sequence[Device], inventory: Inventory) -> Device:
    first, ids = gpus[0], [one.id for one in gpus]
    digest = hashlib.sha256(" ".join(ids).encode()).hexdigest()[:8]
    things = {thing: None for one in gpus for thing in sorted(inventory.things_of[one.id])}
    return replace(
        first,
        id=f"gpus-{len(gpus)}-{first.id.replace(':', '-').replace('.', '-')}-{digest}",
        pci_address=None,
        iommu_group=None,
        paths=tuple(dict.fromkeys(path for one in gpus for path in one.paths)),
        exclusive=tuple(things),
        numa_node=first.numa_node if len({one.numa_node for one in gpus}) == 1 else None,
        local_cpus=union(one.local_cpus for one in gpus),
        pcie_root=first.pcie_root if len({one.pcie_root for one in gpus}) == 1 else None,
        bridges=first.bridges if len({one.bridges for one in gpus}) == 1 else (),
        attributes=MappingProxyType(_attributes(gpus, ids)),
    )


def _attributes(gpus: Sequence[Device], ids: Sequence[str]) -> dict[str, str | int | bool]:
    found: dict[str, str | int | bool] = {"group": len(gpus), "members": ",".join(ids)}
    for name in _COMMON:
        values = {one.attributes.get(name) for one in gpus}
        if len(values) == 1 and (value := values.pop()) is not None:
            found[name] = value
    for name, listed in _LISTED.items():
        values_of_all = [str(one.attributes[name]) for one in gpus if name in one.attributes]
        if len(values_of_all) == len(gpus):
            found[listed] = ",".join(values_of_all)
    memory = [one.attributes.get("memory_bytes") for one in gpus]
    sizes = [one for one in memory if isinstance(one, int)]
    return {**found, "memory_bytes": sum(sizes)} if len(sizes) == len(gpus) else found


def with_members(edits: ContainerEdits, devices: Sequence[Device]) -> ContainerEdits:
    """Return the edits of some GPUs with the addresses of sets' members in the variable that lists them."""
    if not any(one.members for one in devices):
        return edits
    addresses = sorted({address for one in devices for address in one.members or (one.pci_address or "",)} - {""})
    env: Mapping[str, str] = {**edits.env, _VARIABLE: ",".join(addresses)}
    return replace(edits, env=MappingProxyType(dict(env)))
