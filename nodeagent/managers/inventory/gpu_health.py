"""Health evidence of NVIDIA GPUs: one source for each kind of cause, so that one never hides another.

`nvml`: whether NVML shows the GPU. `xid`: what the driver has reported (core/model/xid.py). `ecc`: uncorrected memory
errors, and rows that wait to be remapped or could not be. `nvlink`: links that were active and are no longer.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence, Said
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.xid import XidEffect, describe, effect_of
from nodeagent.host.nvml.values import Failure, NvGpu, Snapshot, Xid
from nodeagent.host.pci import NVIDIA

_OF_NVML = ("nvml", "xid", "ecc", "nvlink")


def nvidia_gpus(inventory: Inventory) -> list[Device]:
    """Return NVIDIA's GPUs and their MIG instances, without sets of GPUs."""
    gpus = (device for device in inventory.devices if device.kind == "gpu" and device.vendor == NVIDIA)
    return [device for device in gpus if not device.members]


def bound_elsewhere(inventory: Inventory) -> list[Said]:
    """Return what NVML has nothing to say of: GPUs under another driver, such as vfio-pci, which it does not show."""
    return [(gpu.id, source) for gpu in nvidia_gpus(inventory) if not _by_nvidia(gpu) for source in _OF_NVML]


def _by_nvidia(gpu: Device) -> bool:
    return gpu.driver in (None, "nvidia")


def nvml_evidence(nvml: Snapshot | Failure | None, inventory: Inventory) -> list[Evidence]:
    """Return the health evidence in NVML's answer, of GPUs that are under no other driver than NVIDIA's."""
    gpus = [gpu for gpu in nvidia_gpus(inventory) if _by_nvidia(gpu)]
    if isinstance(nvml, Snapshot):
        return list(_of_snapshot({gpu.pci_address: gpu for gpu in nvml.gpus}, gpus))
    if isinstance(nvml, Failure) and not nvml.absent:
        return [Evidence(device=gpu.id, source="nvml", state=UNKNOWN, reason=nvml.reason) for gpu in gpus]
    return []


def _of_snapshot(shown: dict[str, NvGpu], gpus: Iterable[Device]) -> Iterator[Evidence]:
    for gpu in gpus:
        if gpu.pci_address not in shown and gpu.driver == "nvidia":
            reason = "NVML does not show this GPU"
            yield Evidence(device=gpu.id, source="nvml", state=UNHEALTHY, reason=reason)
            continue
        # That the driver reports no new error is good evidence; what is latched stays.
        yield Evidence(device=gpu.id, source="xid", state=HEALTHY)
        if gpu.parent is None:
            yield Evidence(device=gpu.id, source="nvml", state=HEALTHY)
            yield _memory(gpu, shown.get(gpu.pci_address or ""))


def _memory(gpu: Device, shown: NvGpu | None) -> Evidence:
    """Return the evidence of a GPU's memory. The counts start again when the driver is loaded or the GPU is reset."""
    reasons = []
    if shown is not None and shown.rows_failed:
        reasons.append("a memory row could not be remapped: replace the GPU")
    if shown is not None and shown.rows_pending:
        reasons.append("memory rows are remapped at the next reset: reset the GPU")
    if shown is not None and shown.ecc_uncorrected:
        reasons.append(f"{shown.ecc_uncorrected} uncorrected memory errors since the driver was loaded")
    state = UNHEALTHY if reasons else HEALTHY
    return Evidence(device=gpu.id, source="ecc", state=state, reason="; ".join(reasons))


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
    nvml: Snapshot | Failure | None, inventory: Inventory, active_once: Mapping[str, frozenset[int]]
) -> tuple[list[Evidence], list[Said]]:
    """Return the evidence of the NVLinks, and of which GPUs there is nothing to see any longer.

    active_once: numbers of the links that have been active, by the PCI address of their GPU. Without NVML's answer,
    what was seen before stays. A GPU in MIG mode uses no links, and a GPU whose links never were active has no bridge.
    """
    if not isinstance(nvml, Snapshot):
        return [], []
    there = {gpu.id for gpu in nvidia_gpus(inventory)}
    shown = {gpu.pci_address: gpu for gpu in nvml.gpus if gpu.pci_address in there}
    linked = {one: gpu for one, gpu in shown.items() if active_once.get(one) and not gpu.mig_enabled}
    evidence = [_nvlinks(one, active_once[one] & frozenset(gpu.nvlinks_inactive)) for one, gpu in linked.items()]
    return evidence, [(one, "nvlink") for one in shown.keys() - linked.keys()]


def _nvlinks(gpu: str, lost: frozenset[int]) -> Evidence:
    numbers = ", ".join(map(str, sorted(lost)))
    one, several = f"NVLink {numbers} was active and is inactive", f"NVLinks {numbers} were active and are inactive"
    reason = "" if not lost else one if len(lost) == 1 else several
    return Evidence(device=gpu, source="nvlink", state=UNHEALTHY if lost else HEALTHY, reason=reason)


def xid_evidence(xid: Xid, inventory: Inventory, own: str | None = None) -> list[Evidence]:
    """Return the health evidence of one Xid: none if it is the application's, of one MIG instance if it is contained
    in that. own: the device of that instance if the agent made it."""
    effect = effect_of(xid.code)
    if effect is XidEffect.APPLICATION:
        return []
    device, reason = xid.pci_address, f"the driver reported {describe(xid.code)}"
    if effect is XidEffect.CONTAINED and xid.instance is not None:
        part = own or "{}/mig-{}-{}".format(xid.pci_address, *xid.instance)
        device = part if part in inventory.device_by_id else device
    state = UNKNOWN if effect is XidEffect.UNLISTED else UNHEALTHY
    latched = effect in (XidEffect.FATAL, XidEffect.UNLISTED)
    return [Evidence(device=device, source="xid", state=state, reason=reason, latched=latched)]
