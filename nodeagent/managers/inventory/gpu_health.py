"""Health evidence of NVIDIA GPUs: one source for each kind of cause, so that one never hides another.

`nvml`: whether NVML shows the GPU. `xid`: what the driver has reported (core/model/xid.py). `nvlink`: links that were
active and are no longer, and their errors. All others are in gpu_sources.py. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import DEGRADED, HEALTHY, UNHEALTHY, UNKNOWN, Evidence, Health, Remedy, Said
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.xid import LASTING, SAYS_NOTHING, XidEffect, describe, effect_of, remedy_of
from nodeagent.host.nvml.values import Failure, Mig, NvGpu, Snapshot, Xid
from nodeagent.host.pci import NVIDIA
from nodeagent.managers.inventory.gpu_sources import IGNORABLE, OF_WHOLE
from nodeagent.managers.inventory.nvlinks import NO_ERRORS

OF_NVML = ("nvml", "xid", "nvlink", *OF_WHOLE)
"""All sources of this module."""
_STATES = {XidEffect.UNLISTED: UNKNOWN, XidEffect.DEGRADED: DEGRADED}
"""Of a GPU after an Xid, if it is not unhealthy."""
PartOf = Callable[[str, Mig], str]
"""Return the id of the device of a MIG instance, given with the PCI address of its GPU."""


def nvidia_gpus(inventory: Inventory) -> list[Device]:
    """Return NVIDIA's GPUs and their MIG instances, without sets of GPUs."""
    gpus = (device for device in inventory.devices if device.kind == "gpu" and device.vendor == NVIDIA)
    return [device for device in gpus if not device.members]


def bound_elsewhere(inventory: Inventory) -> list[Said]:
    """Return what NVML has nothing to say of: GPUs under another driver, such as vfio-pci, which it does not show."""
    return [(gpu.id, source) for gpu in nvidia_gpus(inventory) if not _by_nvidia(gpu) for source in OF_NVML]


def _by_nvidia(gpu: Device) -> bool:
    return gpu.driver in (None, "nvidia")


def nvml_evidence(
    nvml: Snapshot | Failure | None, inventory: Inventory, ignored: Collection[str] = ()
) -> list[Evidence]:
    """Return the health evidence in NVML's answer, of GPUs that are under no other driver than NVIDIA's. ignored:
    sources that do not count."""
    gpus = [gpu for gpu in nvidia_gpus(inventory) if _by_nvidia(gpu)]
    if isinstance(nvml, Snapshot):
        return list(_of_snapshot({gpu.pci_address: gpu for gpu in nvml.gpus}, gpus, ignored))
    if isinstance(nvml, Failure) and not nvml.absent:
        return [Evidence(device=gpu.id, source="nvml", state=UNKNOWN, reason=nvml.reason) for gpu in gpus]
    return []


def _of_snapshot(shown: dict[str, NvGpu], gpus: Iterable[Device], ignored: Collection[str]) -> Iterator[Evidence]:
    for gpu in gpus:
        if gpu.pci_address not in shown and gpu.driver == "nvidia":
            reason = "NVML does not show this GPU"
            yield Evidence(device=gpu.id, source="nvml", state=UNHEALTHY, reason=reason)
            continue
        # That the driver reports no new error is good evidence; what is latched stays.
        yield Evidence(device=gpu.id, source="xid", state=HEALTHY)
        yield Evidence(device=gpu.id, source="nvml", state=HEALTHY)
        if gpu.parent is None:
            yield from _of_whole(gpu.id, shown.get(gpu.pci_address or ""), ignored)


def _of_whole(device: str, shown: NvGpu | None, ignored: Collection[str]) -> Iterator[Evidence]:
    if shown is None:
        return
    for source, look in OF_WHOLE.items():
        looks = not (source in ignored and source in IGNORABLE) and not (source == "fabric" and shown.mig_enabled)
        if looks and (found := look(shown)) is not None:
            state, reason, remedy = found
            yield Evidence(device=device, source=source, state=state, reason=reason, remedy=remedy)


def not_looked_at(nvml: Snapshot | Failure | None, inventory: Inventory, ignored: Collection[str]) -> list[Said]:
    """Return what does not count any longer: what is ignored, what another driver has, and the fabric of GPUs in MIG
    mode, which use no links."""
    gpus = nvidia_gpus(inventory)
    divided = {gpu.pci_address for gpu in nvml.gpus if gpu.mig_enabled} if isinstance(nvml, Snapshot) else set()
    return [
        *bound_elsewhere(inventory),
        *((gpu.id, source) for gpu in gpus for source in ignored if source in IGNORABLE),
        *((gpu.id, "fabric") for gpu in gpus if gpu.id in divided),
    ]


def instance_evidence(
    nvml: Snapshot | Failure | None, inventory: Inventory, health: Health, part_of: PartOf
) -> tuple[list[Evidence], list[Said]]:
    """Return the evidence of the memory of each MIG instance, and of which parts there is no instance any longer.

    The count is that of an instance and ends with it. Without NVML's answer, what was seen before stays.
    """
    if not isinstance(nvml, Snapshot):
        return [], []
    known = {gpu.id for gpu in nvidia_gpus(inventory)}
    shown = {gpu.pci_address for gpu in nvml.gpus}
    every = {part_of(gpu.pci_address, mig): mig.ecc_uncorrected for gpu in nvml.gpus for mig in gpu.migs}
    evidence = [_of_part(part, errors) for part, errors in every.items() if part in known and errors is not None]
    parts = (gpu for gpu in nvidia_gpus(inventory) if gpu.parent in shown and gpu.id not in every)
    return evidence, [(gpu.id, "ecc") for gpu in parts if gpu.id in health]


def _of_part(part: str, errors: int) -> Evidence:
    reason = f"{errors} uncorrected memory errors since the instance was made" if errors else ""
    return Evidence(device=part, source="ecc", state=UNHEALTHY if errors else HEALTHY, reason=reason)


def forgotten(inventory: Inventory, record: str) -> list[Evidence]:
    """Return the evidence of GPUs after the record of what the driver had reported of them was damaged: none is known
    to be well."""
    reason = f"the record of earlier errors ({record}) was damaged"
    return [
        Evidence(device=gpu.id, source="xid", state=UNKNOWN, reason=reason, latched=True)
        for gpu in nvidia_gpus(inventory)
        if gpu.parent is None and _by_nvidia(gpu)
    ]


def nvlink_evidence(
    nvml: Snapshot | Failure | None,
    inventory: Inventory,
    active_once: Mapping[str, frozenset[int]],
    errors: Mapping[str, str] = NO_ERRORS,
) -> tuple[list[Evidence], list[Said]]:
    """Return the evidence of the NVLinks, and of which GPUs there is nothing to see any longer.

    active_once: numbers of the links that have been active, by the PCI address of their GPU. errors: what the links
    have had to correct since the last look, in words, by the same. Without NVML's answer, what was seen before stays.
    A GPU in MIG mode uses no links, and a GPU whose links never were active has no bridge.
    """
    if not isinstance(nvml, Snapshot):
        return [], []
    there = {gpu.id for gpu in nvidia_gpus(inventory)}
    shown = {gpu.pci_address: gpu for gpu in nvml.gpus if gpu.pci_address in there}
    linked = {one: gpu for one, gpu in shown.items() if active_once.get(one) and not gpu.mig_enabled}
    evidence = [
        _nvlinks(one, active_once[one] & frozenset(gpu.nvlinks_inactive), errors.get(one, ""))
        for one, gpu in linked.items()
    ]
    return evidence, [(one, "nvlink") for one in shown.keys() - linked.keys()]


def _nvlinks(gpu: str, lost: frozenset[int], errors: str) -> Evidence:
    if not lost:
        state = DEGRADED if errors else HEALTHY
        return Evidence(device=gpu, source="nvlink", state=state, reason=errors)
    numbers = ", ".join(map(str, sorted(lost)))
    one, several = f"NVLink {numbers} was active and is inactive", f"NVLinks {numbers} were active and are inactive"
    reason = one if len(lost) == 1 else several
    return Evidence(device=gpu, source="nvlink", state=UNHEALTHY, reason=reason, remedy=Remedy.RESET)


def xid_evidence(xid: Xid, inventory: Inventory, own: str | None = None) -> list[Evidence]:
    """Return the health evidence of one Xid: none if it is the application's or a remark, of one MIG instance if it is
    contained in that. own: the device of that instance if the agent made it."""
    effect = effect_of(xid.code)
    if effect in SAYS_NOTHING:
        return []
    device, reason = xid.pci_address, f"the driver reported {describe(xid.code)}"
    if effect is XidEffect.CONTAINED and xid.instance is not None:
        part = own or "{}/mig-{}-{}".format(xid.pci_address, *xid.instance)
        device = part if part in inventory.device_by_id else device
    state = _STATES.get(effect, UNHEALTHY)
    latched, remedy = effect in LASTING, remedy_of(xid.code)
    return [Evidence(device=device, source="xid", state=state, reason=reason, latched=latched, remedy=remedy)]
