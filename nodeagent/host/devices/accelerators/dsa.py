"""Work queues of Intel's DSA and IAA that are configured for user space: the kind `dsa`, one device a queue.

Queues are configured by the admin (accel-config, or sysfs); those of type "user" are served, except those that the
agent makes for claims (the kind `dsa-queue`), which it knows by their names. A queue is healthy while it and its
accelerator are enabled. The accelerator with all of its queues is a device of the kind `accel`, of which each queue is
a part. Source: Documentation/ABI/stable/sysfs-driver-dma-idxd; drivers/dma/idxd/sysfs.c for the words of `state`,
`type` and `mode`, cdev.c for the names of the nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, is_made, nodes, part_of
from nodeagent.host.health.source import Sight
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

BUS = "sys/bus/dsa/devices"
ENABLED, USER = "enabled", "user"
_QUEUE = re.compile(r"((dsa|iax)[0-9]+)/wq[0-9]+\.([0-9]+)")
"""Where a queue lies below its function: in the folder of its accelerator."""
_TYPES = {"dsa": "dsa", "iax": "iaa"}
_TEXTS = {"mode": "mode", "label": "name", "driver_name": "driver_name"}
_NUMBERS = ("size", "priority", "group_id", "threshold", "max_batch_size", "max_transfer_size")
"""Files of a queue; texts by attribute, numbers under their own names."""


class Dsa:
    """The kind `dsa`."""

    name = "dsa"

    def __init__(self) -> None:
        self._sysfs = SysFs()

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        self._sysfs, reader = sysfs, Tolerant(sysfs)
        devices = tuple(_queues(reader, context))
        state = KindState(kind="dsa", state=PRESENT)
        if not devices:
            state = KindState(kind="dsa", state=ABSENT, reason="no work queue is configured for user space")
        return Found(state=state, devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the queue's node, and one variable with the nodes of all queues."""
        every = ",".join(dict.fromkeys(path for one in devices for path in one.paths))
        return ContainerEdits(env=MappingProxyType({"NODEAGENT_DSA_QUEUES": every}), device_nodes=nodes(device.paths))

    def health(self, device: Device) -> Sight:
        """Return whether the queue and its accelerator are enabled."""
        for what, key in (("accelerator", "accelerator"), ("work queue", "name")):
            name = device.attributes[key]
            state = self._sysfs.text(f"{BUS}/{name}/state", None)
            if state is None:
                return Sight(UNKNOWN, f"the kernel shows no state of {what} {name}")
            if state != ENABLED:
                return Sight(UNHEALTHY, f"{what} {name} is {state}")
        return Sight(HEALTHY)


def _queues(reader: Tolerant, context: Context) -> Iterator[Device]:
    before = context.dsa.divided()
    found = [*_of_users(reader, context)]
    after = context.dsa.divided() if found else {}
    for queue, number in found:
        records = [one.get(queue.parent or "") for one in (before, after)]
        if not is_made(str(queue.attributes.get("label", "")), number, records):
            yield queue


def _of_users(reader: Tolerant, context: Context) -> Iterator[tuple[Device, int]]:
    """Yield each queue for user space with its number, whether an admin or an agent has made it."""
    for name, path, address, tail in pci.members(reader, BUS):
        place, owner = _QUEUE.fullmatch(tail), context.function_by_address.get(address or "")
        if place is not None and owner is not None and reader.text(f"{path}/type") == USER:
            yield _queue(reader, name, path, place, owner), int(place[3])


def _queue(reader: Tolerant, name: str, path: str, place: re.Match[str], owner: Function) -> Device:
    accelerator, family, number = place.groups()
    attributes: dict[str, str | int | bool] = {"name": name, "accelerator": accelerator, "device_type": _TYPES[family]}
    attributes |= {key: text for key, file in _TEXTS.items() if (text := reader.text(f"{path}/{file}")) is not None}
    attributes |= {key: value for key in _NUMBERS if (value := reader.number(f"{path}/{key}")) is not None}
    node = f"/dev/{family}/{name}"
    paths = (node,) if reader.sysfs.exists(node.lstrip("/")) else ()
    return part_of(owner, kind="dsa", id=f"{owner.address}/wq-{number}", paths=paths, attributes=attributes)
