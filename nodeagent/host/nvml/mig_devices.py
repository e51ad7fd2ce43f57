"""MIG: the instances of a GPU that others made, and those that the agent could make.

An instance of the agent's own is no device by itself: it is that of its place, which is there whether the instance is
or not. Instances of others are devices, and hold their memory slices: where one lies, nothing can be made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import Device, Partition
from nodeagent.core.partitions.geometry import Profile, counters, draws, partition_id, things
from nodeagent.core.partitions.order import offered
from nodeagent.host.devices.base import Attributes, PartitionSelector
from nodeagent.host.nvml.values import Mig, NvGpu
from nodeagent.host.sysfs.lenient import Tolerant

_CAPABILITIES = "proc/driver/nvidia-caps/mig-minors"


def mig_devices(reader: Tolerant, selector: PartitionSelector | None, gpu: Device, nvidia: NvGpu) -> Iterator[Device]:
    """Yield the MIG instances of a GPU that are not the agent's own, and, if it is to be divided on demand, everything
    that could be made of the rest. Where NVML cannot list the instances, nothing is known to be free."""
    own = {(profile, start) for uuid, profile, start in (selector.own if selector else ()) if uuid == nvidia.uuid}
    mine = {one.id for one in nvidia.instances or () if (one.profile, one.start) in own}
    migs = [mig for mig in nvidia.migs if mig.gpu_instance not in mine]
    table = capability_table(reader) if migs else {}
    yield from (_instance(table, gpu, nvidia, mig) for mig in migs)
    if selector is None or not nvidia.mig_enabled or nvidia.instances is None:
        return
    taken = _held_by_others(gpu, nvidia, mine)
    for rank, (profile, start) in enumerate(offered(nvidia.profiles)):
        if taken.isdisjoint(things(gpu.id, nvidia.profiles, profile, start)):
            yield _possible(gpu, nvidia, profile, start, rank)


def _held_by_others(gpu: Device, nvidia: NvGpu, mine: set[int]) -> frozenset[str]:
    """Return what the instances hand over that the agent did not make. mine: the ids of those that it made."""
    known = {one.id: one for one in nvidia.profiles}
    others = [one for one in nvidia.instances or () if one.id not in mine]
    return frozenset(
        thing for one in others for thing in things(gpu.id, nvidia.profiles, known[one.profile], one.start)
    )


def with_instance(device: Device, uuid: str, capabilities: tuple[str, ...]) -> Device:
    """Return the device of a possible instance as it is once the instance is made."""
    assert device.partition is not None
    return replace(
        device,
        # The nodes of the GPU alone do not open an instance.
        paths=(*device.paths, *capabilities) if capabilities else (),
        attributes=MappingProxyType({**device.attributes, "uuid": uuid}),
        partition=replace(device.partition, made=True),
    )


def capability_table(reader: Tolerant) -> Mapping[str, str]:
    """Return the driver's table of capabilities: the number of each node; its lines read "gpu0/gi1/ci0/access 13"."""
    lines = (line.split() for line in (reader.text(_CAPABILITIES) or "").splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2}


def capabilities(table: Mapping[str, str], minor: object, gi: int, ci: int) -> tuple[str, ...]:
    """Return the capability nodes of an instance. minor: N of its GPU's /dev/nvidiaN."""
    instance = f"gpu{minor}/gi{gi}"
    wanted = (f"{instance}/access", f"{instance}/ci{ci}/access")
    return tuple(f"/dev/nvidia-caps/nvidia-cap{table[name]}" for name in wanted if name in table)


def _instance(table: Mapping[str, str], gpu: Device, nvidia: NvGpu, mig: Mig) -> Device:
    nodes = capabilities(table, nvidia.minor, mig.gpu_instance, mig.compute_instance)
    attributes: Attributes = {
        "uuid": mig.uuid,
        "product": nvidia.name,
        "driver_version": str(gpu.attributes.get("driver_version", "")),
        "mig_profile": mig.profile,
        "memory_bytes": mig.memory_bytes,
    }
    return replace(
        gpu,
        id=f"{gpu.id}/mig-{mig.gpu_instance}-{mig.compute_instance}",
        parent=gpu.id,
        paths=(*gpu.paths, *nodes) if nodes else (),
        exclusive=nodes,
        attributes=MappingProxyType(attributes),
    )


def _possible(gpu: Device, nvidia: NvGpu, profile: Profile, start: int, rank: int) -> Device:
    attributes: Attributes = {
        "parent_uuid": nvidia.uuid,
        "product": nvidia.name,
        "driver_version": str(gpu.attributes.get("driver_version", "")),
        "mig_profile": profile.name,
        "memory_bytes": profile.memory_bytes,
        "multiprocessors": profile.multiprocessors,
    }
    return replace(
        gpu,
        id=partition_id(gpu.id, profile, start),
        parent=gpu.id,
        exclusive=things(gpu.id, nvidia.profiles, profile, start),
        attributes=MappingProxyType(attributes),
        partition=Partition(
            rank=rank,
            profile=profile.id,
            start=start,
            size=profile.size,
            draws=MappingProxyType(draws(nvidia.profiles, profile, start)),
            counters=MappingProxyType(counters(nvidia.profiles)),
        ),
    )
