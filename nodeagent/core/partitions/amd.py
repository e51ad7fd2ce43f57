"""Which compute and memory partition each of AMD's GPUs shall have, and what forbids changing that now. Pure.

Source: drivers/gpu/drm/amd/amdgpu/amdgpu_gfx.c, amdgpu_gmc.c and aqua_vanjaram.c. The compute partition changes at
once, while no process has the GPU open through KFD; which ones are possible depends on the memory partition. The memory
partition is only requested: it changes when the driver is unloaded and loaded again, together for all GPUs of an XGMI
hive, and a request cannot be taken back. A loaded driver chooses the compute partition by itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory

AMD = "1002"
"""PCI vendor."""
RELOAD = "it takes effect when the driver is loaded again (modprobe -r amdgpu && modprobe amdgpu)"


class Kind(StrEnum):
    """What of a GPU is partitioned."""

    COMPUTE = "compute"
    MEMORY = "memory"


class AmdRule(msgspec.Struct, frozen=True, kw_only=True):
    """What some GPUs shall have. Of several rules that match one, the first counts."""

    gpus: tuple[str, ...]
    """Shell patterns of PCI addresses or UUIDs."""
    compute: str = ""
    """"" leaves it as it is; the same of memory."""
    memory: str = ""


class AmdModes(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver shows of one GPU."""

    uuid: str = ""
    binding: str = ""
    """What identifies the binding of the driver: another one has another."""
    compute: str = ""
    """Empty if the GPU cannot be partitioned; the same of memory."""
    computes: tuple[str, ...] = ()
    """What is possible with the memory partition as it is."""
    memory: str = ""
    memories: tuple[str, ...] = ()
    """Empty if the driver cannot change it."""


class AmdRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent has done to one GPU since its driver was bound."""

    binding: str
    before: str = ""
    """The compute partition before the agent's first change."""
    ours: tuple[str, ...] = ()
    """Those that the agent set, or is about to set."""
    requested: str = ""
    """The memory partition that it requested last, or is about to."""
    told: bool = False
    """Whether the driver has taken that request."""


class AmdPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between what a GPU has and what it shall have."""

    gpu: str
    """PCI address."""
    kind: Kind
    found: str
    wanted: str
    why: str = ""
    """Why it stays as it is for now, or ""."""

    def __str__(self) -> str:
        return f"GPU {self.gpu}: {self.kind} partition {self.wanted} wanted, {self.found or 'none'} there"


Shown = Mapping[str, AmdModes | str]
"""What the driver shows of each GPU, by PCI address, or why that is unknown."""


def amd_gpus(inventory: Inventory) -> tuple[Device, ...]:
    """Return AMD's GPUs, whole, that have the driver which partitions them."""
    gpus = inventory.devices_by_kind.get("gpu", ())
    return tuple(one for one in gpus if one.vendor == AMD and one.parent is None and one.driver == "amdgpu")


def plans(
    gpus: Sequence[Device],
    shown: Shown,
    rules: Sequence[AmdRule],
    records: Mapping[str, AmdRecord],
    taken: frozenset[str],
) -> tuple[AmdPlan, ...]:
    """Return what differs, and what is to be done about it, in order of address.

    gpus: as of `amd_gpus`. records: by PCI address; those of earlier bindings count for nothing. taken: ids of devices
    of which nothing can be granted, as of `blocked`.
    """
    wanted = {one.id: rule_of(one.id, shown.get(one.id, ""), rules) for one in gpus}
    return tuple(
        plan
        for one in sorted(gpus, key=lambda gpu: gpu.id)
        for plan in _of_gpu(one, gpus, shown, wanted, records, taken)
    )


def rule_of(gpu: str, modes: AmdModes | str, rules: Iterable[AmdRule]) -> AmdRule | None:
    """Return the rule of a GPU, given by its PCI address, or None."""
    names = [gpu] if isinstance(modes, str) or not modes.uuid else [gpu, modes.uuid]
    matches = (one for one in rules for name in names for pattern in one.gpus if fnmatch.fnmatchcase(name, pattern))
    return next(matches, None)


def _of_gpu(
    gpu: Device,
    gpus: Sequence[Device],
    shown: Shown,
    wanted: Mapping[str, AmdRule | None],
    records: Mapping[str, AmdRecord],
    taken: frozenset[str],
) -> Iterator[AmdPlan]:
    rule, modes = wanted[gpu.id], shown.get(gpu.id, "")
    if isinstance(modes, str):
        if rule is not None and modes:
            kind = Kind.COMPUTE if rule.compute else Kind.MEMORY
            yield AmdPlan(gpu=gpu.id, kind=kind, found="unknown", wanted=rule.compute or rule.memory, why=modes)
        return
    record = _valid(records.get(gpu.id), modes)
    held = "it or a part of it is held" if gpu.id in taken else ""
    compute = rule.compute if rule is not None and rule.compute else _given_back(record, modes)
    if compute and compute != modes.compute:
        why = _not_possible(compute, modes.compute, modes.computes, f"with memory partition {modes.memory}") or held
        yield AmdPlan(gpu=gpu.id, kind=Kind.COMPUTE, found=modes.compute, wanted=compute, why=why)
    memory = rule.memory if rule is not None else ""
    if (plan := _of_memory(gpu.id, memory, modes, record)) is not None:
        others = "" if plan.why else _others_in_hive(gpu, gpus, shown, wanted)
        yield replace(plan, why=plan.why or others or held)


def _valid(record: AmdRecord | None, modes: AmdModes) -> AmdRecord | None:
    return record if record is not None and record.binding == modes.binding else None


def _given_back(record: AmdRecord | None, modes: AmdModes) -> str:
    """Return the compute partition to go back to where none is configured: that before the agent's, "" if there is
    nothing of the agent's."""
    return record.before if record is not None and modes.compute in record.ours else ""


def _not_possible(wanted: str, found: str, possible: Sequence[str], how: str) -> str:
    if not found:
        return "its driver does not partition it"
    if not possible:
        return "its driver cannot change it"
    return "" if wanted in possible else f"not possible {how}: {', '.join(possible)}"


def _of_memory(gpu: str, wanted: str, modes: AmdModes, record: AmdRecord | None) -> AmdPlan | None:
    requested = record.requested if record is not None and record.requested != modes.memory else ""
    if requested and wanted in ("", modes.memory):
        why = f"it was requested, which cannot be taken back; {RELOAD}"
        return AmdPlan(gpu=gpu, kind=Kind.MEMORY, found=modes.memory, wanted=requested, why=why)
    if wanted in ("", modes.memory):
        return None
    is_told = requested == wanted and record is not None and record.told
    why = f"requested; {RELOAD}" if is_told else _not_possible(wanted, modes.memory, modes.memories, "here")
    return AmdPlan(gpu=gpu, kind=Kind.MEMORY, found=modes.memory, wanted=wanted, why=why)


def _others_in_hive(gpu: Device, gpus: Sequence[Device], shown: Shown, wanted: Mapping[str, AmdRule | None]) -> str:
    """Return why the other GPUs of an XGMI hive forbid another memory partition: they would change with it."""
    hive, rule = gpu.attributes.get("xgmi_hive"), wanted[gpu.id]
    assert rule is not None
    for other in gpus:
        if hive is None or other.id == gpu.id or other.attributes.get("xgmi_hive") != hive:
            continue
        modes, its = shown.get(other.id, ""), wanted[other.id]
        memory = its.memory if its is not None and its.memory else "" if isinstance(modes, str) else modes.memory
        if memory != rule.memory:
            return f"{other.id}, which is in the same XGMI hive and changes with it, is to have {memory or 'another'}"
    return ""


def before_change(plan: AmdPlan, modes: AmdModes, record: AmdRecord | None) -> AmdRecord:
    """Return what is to be recorded before a plan is carried out."""
    known = _valid(record, modes) or AmdRecord(binding=modes.binding)
    if plan.kind is Kind.MEMORY:
        return replace(known, requested=plan.wanted, told=False)
    if modes.compute in known.ours:
        return replace(known, ours=tuple(dict.fromkeys((*known.ours, plan.wanted))))
    return replace(known, before=modes.compute, ours=(plan.wanted,))


def still_true(record: AmdRecord, modes: AmdModes) -> AmdRecord | None:
    """Return what of a record still holds at a moment at which nothing is being changed, or None if nothing does."""
    if record.binding != modes.binding:
        return None
    mine = modes.compute in record.ours and modes.compute != record.before
    before, ours = (record.before, (modes.compute,)) if mine else ("", ())
    requested = record.requested if record.requested != modes.memory else ""
    if not ours and not requested:
        return None
    return replace(record, before=before, ours=ours, requested=requested, told=record.told and bool(requested))
