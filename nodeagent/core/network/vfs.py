"""How many virtual functions each physical one shall have, and what forbids changing that now.

Pure. The kernel changes the number only from and to 0 (drivers/pci/pci-sysfs.c, sriov_numvfs_store): another number
means that all virtual functions go. So it is changed only while nothing of them is held or used by the host, and
virtual functions that the agent did not make are never removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from nodeagent.core.deviceplugin.devices import Match, fits
from nodeagent.core.ledger.exclusion import blocked
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory

MOST_NAMED = 3


class VfRule(msgspec.Struct, frozen=True, kw_only=True):
    """How many virtual functions the physical functions have that match."""

    match: Match
    count: int
    autoprobe: bool | None = None
    """Whether the kernel binds new ones to a driver; None: as it is."""


class VfPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one physical function."""

    pf: str
    """PCI address."""
    found: int
    """Number of virtual functions that are there."""
    wanted: int
    autoprobe: bool | None = None
    vfs: tuple[str, ...] = ()
    """Addresses of those that would go."""
    why: str = ""
    """Why it stays as it is although it differs, or ""."""

    @property
    def due(self) -> bool:
        """Return whether the number is to be changed now."""
        return self.found != self.wanted and not self.why


def plans(inventory: Inventory, ledger: Ledger, rules: Sequence[VfRule], made: Mapping[str, int]) -> tuple[VfPlan, ...]:
    """Return what becomes of each physical function that a rule matches.

    made: how many virtual functions the agent made last, by physical function.
    """
    taken = blocked(inventory, ledger)
    found = ((device, _rule_of(device, rules)) for device in inventory.devices_by_kind.get("nic", ()))
    return tuple(_plan(inventory, taken, device, rule, made) for device, rule in found if rule is not None)


def _rule_of(device: Device, rules: Iterable[VfRule]) -> VfRule | None:
    if device.attributes.get("sriov") != "pf" or device.pci_address != device.id:
        return None
    return next((one for one in rules if fits(device, one.match)), None)


def _plan(inventory: Inventory, taken: frozenset[str], device: Device, rule: VfRule, made: Mapping[str, int]) -> VfPlan:
    there = int(device.attributes.get("sriov_numvfs", 0))
    every = (inventory.device_by_id[id] for id in inventory.parts_of.get(device.id, ()))
    vfs = tuple(one for one in every if one.attributes.get("sriov") == "vf")
    plan = VfPlan(
        pf=device.id, found=there, wanted=rule.count, autoprobe=rule.autoprobe, vfs=tuple(one.id for one in vfs)
    )
    why = "; ".join(_obstacles(device, vfs, taken, plan, made)) if there != rule.count else ""
    return msgspec.structs.replace(plan, why=why)


def _obstacles(
    device: Device, vfs: Sequence[Device], taken: frozenset[str], plan: VfPlan, made: Mapping[str, int]
) -> Iterator[str]:
    most = int(device.attributes.get("sriov_totalvfs", 0))
    if plan.wanted > most:
        yield f"it can have at most {most}"
    if not plan.found and device.id in taken:
        yield "it is held itself"
    if plan.found and made.get(device.id) != plan.found:
        yield f"the {plan.found} that are there were not made by the agent: remove them, or ask for {plan.found}"
    elif plan.found:
        yield from _named([one.id for one in vfs if one.id in taken], "held")
        yield from _named([one.id for one in vfs if one.used_by_host], "in use here")


def _named(ids: Sequence[str], how: str) -> Iterator[str]:
    if ids:
        more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
        yield f"{', '.join(ids[:MOST_NAMED])}{more}: {how}"
