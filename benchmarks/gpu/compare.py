"""The agent's inventory against what nvidia-smi prints: what differs, one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.gpu.smi import Matrix, SmiGpu, SmiPlacement, SmiProfile, pairs
from nodeagent.core.model.device import LINK_WEIGHTS, NVLINK_STEP, Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.placement.proximity import Proximity

WEIGHTS: Mapping[str, frozenset[int]] = {
    "PIX": frozenset({LINK_WEIGHTS["pcie-switch"]}),
    "PXB": frozenset({LINK_WEIGHTS["pcie-switch"], LINK_WEIGHTS["pcie-root"]}),
    "PHB": frozenset({LINK_WEIGHTS["pcie-root"], LINK_WEIGHTS["numa"]}),
    "NODE": frozenset({LINK_WEIGHTS["numa"]}),
    "SYS": frozenset({LINK_WEIGHTS["socket"], LINK_WEIGHTS["system"]}),
}
"""The agent's weights that fit each word of the matrix, by its legend: one bridge; bridges, but no host bridge; a host
bridge; host bridges of one NUMA node; NUMA nodes."""


def whole_gpus(inventory: Inventory) -> list[Device]:
    """Return NVIDIA's whole GPUs, in order of address, as nvidia-smi numbers them."""
    found = (one for one in inventory.devices if one.kind == "gpu" and one.vendor == "10de")
    return sorted((one for one in found if one.parent is None and not one.members), key=lambda one: one.id)


def inventory(found: Inventory, version: str, shown: Sequence[SmiGpu]) -> Iterator[str]:
    """Yield what differs between an inventory and `nvidia-smi -q -x`."""
    mine, theirs = {one.id: one for one in whole_gpus(found)}, {one.address: one for one in shown}
    yield from (f"{one}: nvidia-smi does not show it" for one in sorted(mine.keys() - theirs.keys()))
    yield from (f"{one}: the inventory does not have it" for one in sorted(theirs.keys() - mine.keys()))
    for address in sorted(mine.keys() & theirs.keys()):
        gpu, smi = mine[address], theirs[address]
        parts = [one for one in found.devices if one.parent == address and one.partition is None]
        memory = gpu.attributes.get("memory_bytes")
        facts = {
            "uuid": (gpu.attributes.get("uuid"), smi.uuid),
            "product": (gpu.attributes.get("product"), smi.name),
            "minor": (gpu.attributes.get("minor"), smi.minor),
            "driver_version": (gpu.attributes.get("driver_version"), version),
            "MiB of memory": (int(memory) >> 20 if memory is not None else None, smi.memory_mib),
            "MIG mode": (bool(gpu.attributes.get("mig")), bool(smi.mig)),
            "MIG instances": (len([one for one in parts if one.attributes.get("mig_profile")]), smi.mig_devices),
        }
        for name, (ours, its) in facts.items():
            if its is not None and ours != its:
                yield f"{address}: {name} {ours!r}, nvidia-smi has {its!r}"


def mig(found: Inventory, profiles: Sequence[SmiProfile], placements: Sequence[SmiPlacement]) -> Iterator[str]:
    """Yield what differs between the instances that an inventory has as possible, with the counters that they consume,
    and what nvidia-smi lists of the same GPUs."""
    every = whole_gpus(found)
    for number in sorted({one.gpu for one in profiles}):
        if number >= len(every):
            yield f"GPU {number}: the inventory has {len(every)} GPUs"
            continue
        gpu = every[number]
        parts = [one for one in found.devices if one.parent == gpu.id and one.partition is not None]
        its = [one for one in profiles if one.gpu == number]
        names = {str(one.attributes.get("mig_profile")) for one in parts}
        yield from (f"{gpu.id}: nvidia-smi lists no {one}" for one in sorted(names - {it.name for it in its}))
        for profile in its:
            mine = [one for one in parts if one.attributes.get("mig_profile") == profile.name]
            yield from _profile(gpu, profile, mine, [one for one in placements if one.gpu == number])


def _profile(
    gpu: Device, profile: SmiProfile, mine: Sequence[Device], placements: Sequence[SmiPlacement]
) -> Iterator[str]:
    what = f"{gpu.id}: {profile.name}"
    if not mine:
        yield f"{what}: it is not published"
        return
    its = {(start, one.size) for one in placements if one.id == profile.id for start in one.starts}
    ours = {(one.partition.start, one.partition.size) for one in mine if one.partition is not None}
    if ours != its:
        yield f"{what}: placements {sorted(ours)}, nvidia-smi has {sorted(its)}"
    if (units := mine[0].attributes.get("multiprocessors")) != profile.multiprocessors:
        yield f"{what}: {units} multiprocessors, nvidia-smi has {profile.multiprocessors}"
    if (most := _most(mine)) != profile.most:
        yield f"{what}: the counters admit {most} instances, nvidia-smi says {profile.most}"


def _most(mine: Sequence[Device]) -> int:
    """Return how many of some instances the published counters admit, taken in the order of their starts."""
    parts = sorted((one.partition for one in mine if one.partition is not None), key=lambda one: one.start)
    left, count = dict(parts[0].counters), 0
    for part in parts:
        if all(left.get(name, 0) >= amount for name, amount in part.draws.items()):
            left = {name: value - part.draws.get(name, 0) for name, value in left.items()}
            count += 1
    return count


def topology(found: Inventory, shown: Matrix) -> Iterator[str]:
    """Yield what differs between the weights of links, and the NUMA nodes, and the matrix of nvidia-smi."""
    every, near = whole_gpus(found), Proximity(found)
    for a, b, link in pairs(shown):
        if max(a, b) >= len(every):
            yield f"GPU{a}, GPU{b}: the inventory has {len(every)} GPUs"
            continue
        weight = near.weight(every[a], every[b])
        count = re.fullmatch(r"NV(\d+)", link)
        wanted = frozenset({LINK_WEIGHTS["nvlink"] + NVLINK_STEP * (int(count[1]) - 1)}) if count else WEIGHTS.get(link)
        if wanted is None:
            yield f"{every[a].id}, {every[b].id}: {link!r} is not in the legend that is known"
        elif weight not in wanted:
            yield f"{every[a].id}, {every[b].id}: weight {weight}, {link} would be {'/'.join(map(str, sorted(wanted)))}"
    for number, node in sorted(shown.nodes.items()):
        if number < len(every) and every[number].numa_node != node:
            yield f"{every[number].id}: NUMA node {every[number].numa_node}, nvidia-smi has {node}"
