"""Which interrupts a device has, and where each interrupt may be delivered.

A PCI function's message-signalled interrupts are the names in its folder msi_irqs: those of its queues, which come and
go with them. A function without that folder has at most a line that it shares with other functions, and no interrupt
of its own.
Source: Documentation/ABI/testing/sysfs-bus-pci (msi_irqs).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.pinning.device_interrupts import AVOID, FOLLOW, DeviceInterrupts
from nodeagent.host.sysfs.sysfs import SysFs

_DEVICES = "sys/bus/pci/devices"


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Where an interrupt may be delivered."""

    keep_off: CpuSet = EMPTY
    """CPUs off which it is kept."""
    confine_to: CpuSet = EMPTY
    """CPUs to which it is confined; empty for none in particular."""
    tolerated: CpuSet = EMPTY
    """Exclusive CPUs on which it does not disturb: their holder has its device."""
    device: str = ""
    """PCI address of the function that has it, if that is known."""

    def allows(self, cpus: CpuSet) -> bool:
        """Return whether an interrupt may be delivered to all of some CPUs."""
        return cpus <= self.confine_to if self.confine_to else cpus.isdisjoint(self.keep_off)


def irqs_of(sysfs: SysFs, address: str) -> tuple[int, ...]:
    """Return the interrupts of a PCI function. Raise HostError if they cannot be listed."""
    return tuple(irq for irq, _ in sysfs.numbered(f"{_DEVICES}/{address}/msi_irqs", ""))


def has_irq(sysfs: SysFs, address: str, irq: int) -> bool:
    """Return whether a PCI function has an interrupt."""
    return sysfs.exists(f"{_DEVICES}/{address}/msi_irqs/{irq}")


def rules(sysfs: SysFs, wanted: Iterable[DeviceInterrupts], exclusive: CpuSet, *, moving: bool) -> dict[int, Rule]:
    """Return where the interrupts of some devices may be delivered, by number.

    exclusive: all exclusive CPUs. moving: whether other interrupts are moved off them. Raise HostError if interrupts
    cannot be listed.
    """
    found: dict[int, Rule] = {}
    for one in wanted:
        for address in one.addresses:
            rule = _rule(one, address, exclusive, moving=moving)
            found.update(dict.fromkeys(irqs_of(sysfs, address), rule))
    return found


def _rule(one: DeviceInterrupts, address: str, exclusive: CpuSet, *, moving: bool) -> Rule:
    if one.wanted == AVOID:
        return Rule(keep_off=exclusive, device=address)
    confine_to = one.cpus if one.wanted == FOLLOW else EMPTY
    keep_off = exclusive - one.cpus if moving else EMPTY
    return Rule(keep_off=keep_off, confine_to=confine_to, tolerated=one.cpus, device=address)
