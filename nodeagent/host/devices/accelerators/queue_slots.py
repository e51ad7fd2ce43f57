"""Work queues of Intel's DSA and IAA that need not exist: devices that stand for what the agent can make for claims.

A slot is there while its accelerator is the agent's to configure: whether one is used by others is read from the queues
themselves (core/queues/layout.py), so that the answer does not depend on who asks. While the accelerator is enabled its
slots are as they were laid out, whatever is configured by now: the kernel changes no sizes then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from nodeagent.core.model.device import MADE_FOR_CLAIMS, Device
from nodeagent.core.queues.layout import DISABLED, ENABLED, KIND, OWN, UNUSED, Limits, Slot, is_others, misfit
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, QueueSelector, part_of
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant

_BUS = "sys/bus/dsa/devices"
_ACCELERATOR = re.compile(r"(dsa|iax)([0-9]+)")
_TYPES = {"dsa": "dsa", "iax": "iaa"}
_LIMITS = {
    "queues": "max_work_queues",
    "groups": "max_groups",
    "engines": "max_engines",
    "entries": "max_work_queues_size",
}


def slots(reader: Tolerant, context: Context) -> Iterator[Device]:
    """Yield the queues that can be made, of all accelerators for which that is configured. Why there are none of one is
    a warning of the reader."""
    for name, path, address, tail in pci.members(reader, _BUS):
        found, owner = _ACCELERATOR.fullmatch(name), context.function_by_address.get(address or "")
        if found is None or owner is None or tail != name:
            continue
        selector = next((one for one in context.queues if one.matches(_TYPES[found[1]], owner.address)), None)
        if selector is None:
            continue
        queues = {one: _texts(reader, f"{path}/{one}") for one in reader.names(path) if one.startswith("wq")}
        theirs = [one for one, said in queues.items() if is_others(**said)]
        own = any(said["name"].startswith(OWN) for said in queues.values())
        if why := "" if own else _unusable(reader, path, selector, theirs):
            reader.warnings.append(f"cannot make queues of {name} ({owner.address}): {why}")
        else:
            yield from _of_accelerator(reader, name, path, owner, selector, theirs)


def _texts(reader: Tolerant, path: str) -> dict[str, str]:
    texts = {key: reader.text(f"{path}/{key}") or "" for key in ("state", "type", "name")}
    return {**texts, "state": texts["state"] or DISABLED, "type": texts["type"] or UNUSED}


def _unusable(reader: Tolerant, path: str, selector: QueueSelector, theirs: Sequence[str]) -> str:
    """Return why no queues can be made of an accelerator of which the agent has none enabled, or "". theirs: the queues
    of others."""
    if reader.text(f"{path}/configurable") != "1":
        return "configurable is not 1: its configuration is fixed"
    if reader.text(f"{path}/pasid_enabled") != "1":
        return (
            "pasid_enabled is not 1: programs can use queues only with an IOMMU in scalable mode (intel_iommu=on,sm_on)"
        )
    if theirs:
        return f"{theirs[0]} is configured by another program, to which the accelerator is left"
    limits = Limits(**{key: reader.number(f"{path}/{file}") or 0 for key, file in _LIMITS.items()})
    return misfit(selector.layout, limits)


def _of_accelerator(
    reader: Tolerant, accelerator: str, path: str, owner: Function, selector: QueueSelector, theirs: Collection[str]
) -> Iterator[Device]:
    """theirs: the queues of others, which are devices of their own."""
    number, type = accelerator[3:], _TYPES[accelerator[:3]]
    enabled = reader.text(f"{path}/state") == ENABLED
    for slot in selector.layout.slots:
        queue = f"wq{number}.{slot.number}"
        if queue in theirs:
            continue
        now = _standing(reader, f"{path}/{queue}", slot) if enabled else slot
        if now is None:
            continue
        attributes: dict[str, str | int | bool] = {
            "name": queue,
            "accelerator": accelerator,
            "device_type": type,
            "selector": selector.name,
            MADE_FOR_CLAIMS: True,
            "size": now.size,
            "group_id": now.group,
            "mode": selector.modes[0],
            "modes": ",".join(selector.modes),
            "max_priority": selector.max_priority,
            "block_on_fault": selector.block_on_fault,
        }
        yield part_of(owner, kind=KIND, id=f"{owner.address}/wq-{slot.number}", paths=(), attributes=attributes)


def _standing(reader: Tolerant, path: str, slot: Slot) -> Slot | None:
    """Return a queue as it is laid out now, or None if it is not."""
    size, group = reader.number(f"{path}/size") or 0, reader.number(f"{path}/group_id")
    if size < 1 or group is None or group < 0:
        return None
    return Slot(number=slot.number, size=size, group=group)
