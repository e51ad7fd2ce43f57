"""Devices that other device plugins and DRA drivers gave to pods: of this machine, but not granted by the agent. Pure.

Each holding is kept as a grant in a ledger of its own, which ends by the same rules as ours (release.py). Several may
hold the same device: how another plugin divides it is that plugin's affair. Of ours nothing that one of them holds can
be granted (exclusion.py).

Other plugins name devices in their own ways: by PCI address (SR-IOV, AMD), UUID (NVIDIA's GPUs and MIG instances), the
names of DRM cards (Intel), RDMA devices or interfaces, or the path of a device node; one that divides a device appends
the number of the share. A UUID that nothing shows yet, as before NVML has answered, may be that of any GPU whose UUID
is not known: each of them is then as good as held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger import ledger as ledger_of
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.reconcile import compare
from nodeagent.core.ledger.release import Memory, Patience
from nodeagent.core.ledger.witness import Witnesses
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder, Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.errors import InputError

Ours = Callable[[str, str], bool]
"""Return whether (resource, id) is served by the agent."""
Given = frozenset[tuple[str, str, str, str]]
"""(pod UID, container, resource, id), as kubelet's checkpoint has it."""
_NAMED_BY = ("uuid", "rdma", "netdevs", "drm_card", "drm_render", "platform", "auxiliary")
"""Attributes by which other plugins name a device; several values are separated by commas."""
_NVIDIA = "10de"
_UUID = re.compile(r"(gpu|mig)-(?:gpu-)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(/[0-9]+){0,2}(::[0-9]+|-[0-9]+)?")
"""UUIDs of NVIDIA's GPUs and of their instances in lower case, with the number of a share. Drivers before 470 name an
instance MIG-GPU-UUID/GI/CI."""
_MIG = "mig"
_UNLABELLED = re.compile(r"[:.]")
"""What the names of DRA devices, which are DNS labels, have a dash for."""
_SHARE = re.compile(r"(.+?)(::[0-9]+|-[0-9]+)")
"""An id with the number of a share: NVIDIA's time slicing appends "::N", Intel's plugin "-N"."""


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """What other plugins gave to pods, and what earlier lists have shown of it."""

    ledger: Ledger = msgspec.field(default_factory=Ledger)
    memory: Memory = msgspec.field(default_factory=Memory)
    given: Given = frozenset()
    """What the checkpoint had when it was last read. Kubelet keeps entries of ended pods until it admits another, so
    each entry counts once."""


def observed(
    before: Foreign,
    inventory: Inventory,
    holdings: Iterable[Holding],
    ours: Ours,
    witnesses: Witnesses,
    now: float,
    patience: Patience,
    new_id: Callable[[], str],
) -> Foreign:
    """Return what other plugins gave to pods after kubelet's list and the witnesses of one round.

    now: when kubelet was asked, in seconds of any steady clock.
    """
    before = _without_ours(before, ours)
    theirs = list(_theirs(holdings, ours))

    def adopt(holding: Holding) -> Grant:
        names = {"namespace": holding.namespace, "pod": holding.pod, "container": holding.container}
        grant = _grant_of(inventory, holding.resource, holding.ids, new_id())
        holder = replace(grant.holder, **names)
        return replace(grant, holder=holder, confirmed=True, boot_id=witnesses.boot_id)

    resources = {one.resource for one in theirs}
    found = compare(before.ledger, theirs, before.memory, now, patience, resources, adopt, frozenset(), witnesses)
    ledger = ledger_of.release(before.ledger, [one.id for one in found.released])
    ledger = _with(ledger, (*(one for one in found.confirmed if one.id in ledger.grants), *found.adopted))
    ledger = _with(ledger, _named_better(inventory, ledger))
    after = replace(before, ledger=ledger, memory=found.absences.memory)
    return after if witnesses.given is None else with_checkpoint(after, inventory, witnesses.given, ours, new_id)


def with_checkpoint(
    before: Foreign,
    inventory: Inventory,
    given: Mapping[tuple[str, str], frozenset[tuple[str, str]]],
    ours: Ours,
    new_id: Callable[[], str],
) -> Foreign:
    """Return what other plugins gave to pods with what kubelet's checkpoint shows for the first time."""
    now = frozenset((uid, name, *part) for (uid, name), parts in given.items() for part in parts if not ours(*part))
    found: dict[tuple[str, str, str], list[str]] = {}
    for uid, container, resource, id in sorted(now - before.given):
        if (resource, id) not in before.ledger.by_id:
            found.setdefault((uid, container, resource), []).append(id)
    grants = []
    for (uid, container, resource), ids in found.items():
        try:
            grant = _grant_of(inventory, resource, tuple(ids), new_id())
        except InputError:
            now -= {(uid, container, resource, id) for id in ids}  # a device may appear that has such a name
            continue
        grants.append(replace(grant, pods=(uid,)))
    return replace(before, ledger=_with(before.ledger, grants), given=now)


def devices_named(inventory: Inventory, ids: Iterable[str]) -> tuple[str, ...]:
    """Return the devices that ids of another plugin stand for, or may stand for, sorted; ids that name none are left
    out."""
    names = kept_by(inventory, "_names", lambda: _names_of(inventory))
    found = (_named(names, one.lower()) or _suspects(inventory, one.lower()) for one in ids)
    return tuple(sorted({device for devices in found for device in devices}))


def _without_ours(before: Foreign, ours: Ours) -> Foreign:
    """Return what others gave without grants of ids that have turned out to be ours, as after a lost ledger."""
    mine = [one.id for one in before.ledger.grants.values() if any(ours(one.holder.resource, id) for id in one.ids)]
    return replace(before, ledger=ledger_of.release(before.ledger, mine)) if mine else before


def _theirs(holdings: Iterable[Holding], ours: Ours) -> Iterator[Holding]:
    for one in holdings:
        ids = tuple(id for id in one.ids if not ours(one.resource, id))
        if ids:
            yield replace(one, ids=ids)


def _grant_of(inventory: Inventory, resource: str, ids: tuple[str, ...], id: str) -> Grant:
    """Return a grant of what some ids of another plugin stand for. Raise InputError if they name no device."""
    devices = devices_named(inventory, ids)
    if not devices:
        raise InputError(f"cannot find the devices of {resource} {', '.join(ids)}: no device has such a name")
    holder = Holder(api=DEVICE_PLUGIN, resource=resource)
    return Grant(id=id, holder=holder, ids=ids, devices=devices, things=things_of(inventory, devices))


def _named_better(inventory: Inventory, ledger: Ledger) -> Iterator[Grant]:
    """Yield the grants whose ids stand for other devices by now: their names were not known before."""
    for one in ledger.grants.values():
        devices = devices_named(inventory, one.ids)
        if devices and devices != one.devices:
            yield replace(one, devices=devices, things=things_of(inventory, devices))


def _with(ledger: Ledger, grants: Iterable[Grant]) -> Ledger:
    """Return the ledger with further grants, which may overlap: another plugin may divide a device."""
    new = {one.id: one for one in grants}
    return replace(ledger, grants=MappingProxyType({**ledger.grants, **new})) if new else ledger


def _named(names: Mapping[str, frozenset[str]], id: str) -> frozenset[str]:
    if id in names:
        return names[id]
    share = _SHARE.fullmatch(id)
    return names.get(share[1], frozenset()) if share is not None else frozenset()


def _suspects(inventory: Inventory, id: str) -> frozenset[str]:
    """Return the GPUs that an unknown UUID may belong to: those of which none is known, and for an instance any."""
    if (uuid := _UUID.fullmatch(id)) is None:
        return frozenset()
    nvidia = (one for one in inventory.devices if one.kind == "gpu" and one.vendor == _NVIDIA)
    gpus = (one for one in nvidia if one.parent is None and not one.members)
    return frozenset(
        one.id for one in gpus if "uuid" not in one.attributes or (uuid[1] == _MIG and _may_be_divided(inventory, one))
    )


def _may_be_divided(inventory: Inventory, gpu: Device) -> bool:
    """Return whether an unknown instance may be of a GPU: it may be in MIG mode, and no instance of it is known."""
    return bool(gpu.attributes.get("mig", True)) and gpu.id not in inventory.parts_of


def _names_of(inventory: Inventory) -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for device in (one for one in inventory.devices if not one.members):
        for name in _names(inventory, device):
            found.setdefault(name.lower(), set()).add(device.id)
    return {name: frozenset(devices) for name, devices in found.items()}


def _names(inventory: Inventory, device: Device) -> Iterator[str]:
    yield device.id
    whole = inventory.device_by_id.get(device.parent or "")
    # An instance or a partition has the address of its GPU, which names the GPU.
    if device.pci_address is not None and (whole is None or whole.pci_address != device.pci_address):
        yield from (device.pci_address, _UNLABELLED.sub("-", device.pci_address))
    for key in _NAMED_BY:
        yield from (name for name in str(device.attributes.get(key) or "").split(",") if name)
    for path in device.exclusive_parts:
        yield from (path, path.removeprefix("/dev/")) if path.startswith("/dev/") else ()
