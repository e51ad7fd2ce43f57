"""How GPUs may be shared: what of MPS and time slices a claim may ask for, and what excludes each other.

Pure. What the driver forbids (NVIDIA, Multi-Process Service; Multi-Instance GPU User Guide; nvidia-smi compute-policy)
is refused before anything is granted, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent.core.ledger.ledger import Ledger, in_order
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.opaque.settings import OpaqueConfig
from nodeagent.core.sharing.mps import devices_of, settings_of, uses_mps
from nodeagent.errors import InputError, Refused

NVIDIA = "10de"
Wish = tuple[str, bool, OpaqueConfig]
"""What a claim asks for of one device: its id, whether it gets only a share, the settings."""


def check_device(inventory: Inventory, id: str, settings: OpaqueConfig) -> None:
    """Raise InputError if a device cannot be shared as the settings say, whatever else uses it."""
    if not settings.mps and not settings.time_slice:
        return
    what = "MPS" if settings.mps else f"time slice {settings.time_slice}"
    device = inventory.device_by_id.get(id)
    if device is None or device.vendor != NVIDIA:
        raise InputError(f"{what}: only NVIDIA's GPUs have it, {id} is none")
    if _is_passed_through(device):
        raise InputError(f"{what}: {id} is passed through to a guest (driver {device.driver}), not used by CUDA here")
    if device.attributes.get("mig"):
        raise InputError(f"{what}: {id} is in MIG mode and computes only through its instances")
    if settings.time_slice and device.parent is not None:
        raise InputError(f"{what}: it is set for a whole GPU, {id} is a part of {device.parent}")


def check_claim(inventory: Inventory, wishes: Sequence[Wish]) -> None:
    """Raise InputError if one container could not use MPS on all devices of a claim: it has one pipe folder, and so one
    daemon."""
    with_mps = [one for one in wishes if one[2].mps]
    shares = [id for id, share, _ in with_mps if share]
    parts = [id for id, _, _ in with_mps if _is_part(inventory, id)]
    names = ", ".join(id for id, _, _ in with_mps)
    if len(with_mps) > 1 and shares:
        raise InputError(f"MPS on {names}: a claim can use it on one shared device, and on no other device besides")
    if len(with_mps) > 1 and parts:
        raise InputError(f"MPS on {names}: its daemon serves one MIG instance, and no other device besides")
    percents = {settings.mps_threads_percent for _, _, settings in with_mps}
    if len(percents) > 1:
        raise InputError(f"MPS on {names}: activeThreadPercentage is one for all GPUs of a claim")


def refuse_otherwise_shared(ledger: Ledger, id: str, settings: OpaqueConfig) -> None:
    """Raise Refused if other holders of a device share it in a way that excludes the settings. One GPU has one time
    slice; programs that share it through MPS run at the same time, and not in turns."""
    for grant in in_order(ledger.grants):
        if id not in grant.shares:
            continue
        theirs, mps = settings_of(grant), uses_mps(grant)
        if settings.mps and theirs.time_slice:
            why = f"{grant.holder} has set its time slice to {theirs.time_slice}"
            raise _refused(f"cannot share {id} through MPS: {why}")
        if settings.time_slice and mps:
            raise _refused(f"cannot set the time slice of {id}: {grant.holder} shares it through MPS")
        if settings.time_slice and theirs.time_slice not in ("", settings.time_slice):
            why = f"{grant.holder} has set it to {theirs.time_slice}"
            raise _refused(f"cannot set the time slice of {id} to {settings.time_slice}: {why}")


def time_slices(inventory: Inventory, ledger: Ledger) -> dict[str, str]:
    """Return the time slices that grants ask for, by device id; of a set of GPUs by its members."""
    found = ((grant, settings_of(grant).time_slice) for grant in in_order(ledger.grants))
    return {id: interval for grant, interval in found if interval for id in devices_of(inventory, [grant])}


def _is_part(inventory: Inventory, id: str) -> bool:
    device = inventory.device_by_id.get(id)
    return device is not None and device.parent is not None


def _is_passed_through(device: Device) -> bool:
    return any(path.startswith("/dev/vfio/") for path in device.paths)


def _refused(why: str) -> Refused:
    return Refused(why, want=1, free=0, unit="devices")
