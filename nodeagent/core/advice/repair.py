"""What an admin can do about a device that is ill, in words, and what is worth a warning of one that is not."""

from __future__ import annotations

from collections.abc import Iterator

from nodeagent.core.deviceplugin.devices import health_about, illness
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, Health, Remedy
from nodeagent.core.model.inventory import Inventory

_ENDS_ALL = (Remedy.REBOOT, Remedy.REPLACE)
"""After these nothing has to be cleared."""


def degradations(device: Device, health: Health) -> tuple[str, ...]:
    """Return what is worth a warning of a device, its parent and its members, although they are granted."""
    every = (reason for state in health_about(device, health).values() for _, reason in state.degradations)
    return tuple(dict.fromkeys(every))


def repair(device: Device, health: Health) -> str:
    """Return what an admin can do about the illness of a device, as a clause, or "" if nothing is known to help.

    A part of a GPU is repaired with the whole.
    """
    ill = {id: state for id, state in health_about(device, health).items() if state.state != HEALTHY}
    remedies = tuple(Remedy)
    remedy = max((state.remedy for state in ill.values()), key=remedies.index, default=Remedy.NONE)
    latched = [id for id, state in ill.items() if state.latched]
    clear = " and ".join(f"`nodeagent health clear {id}`" for id in latched)
    if remedy is Remedy.NONE:
        return f"if it is well: {clear}" if clear else ""
    done = _done(remedy, device.pci_address or device.id)
    return f"{done}, then {clear}" if clear and remedy not in _ENDS_ALL else done


def _done(remedy: Remedy, whole: str) -> str:
    if remedy is Remedy.DRAIN:
        return f"end all programs that use {whole}"
    if remedy is Remedy.RESET:
        return f"end all programs that use {whole}, then `nvidia-smi --gpu-reset -i {whole}`"
    return "drain the node and reboot it" if remedy is Remedy.REBOOT else f"drain the node and replace {whole}"


def health_notes(inventory: Inventory, health: Health) -> Iterator[str]:
    """Yield one sentence for each device that an admin can do something about, or that is degraded. What is true of a
    whole is not repeated for its parts."""
    for device in inventory.devices:
        state = health.get(device.id)
        if state is None:
            continue
        ill, advice = illness(device, health), repair(device, health)
        if state.state != HEALTHY and ill is not None and advice:
            yield f"{device.id} is {ill.state} ({ill.reason}): {advice}"
        for _, reason in state.degradations:
            yield f"{device.id} is degraded: {reason}"
