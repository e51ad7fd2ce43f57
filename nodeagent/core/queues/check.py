"""What a work queue is set to for a claim, and what forbids it. Pure.

The limits are those that the node's configuration sets; a device that stands for such a queue has them as attributes.
"""

from __future__ import annotations

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.queues.layout import SHARED
from nodeagent.core.queues.settings import Queue, QueueSettings
from nodeagent.errors import InputError

USUAL_PRIORITY = 10
"""What the kernel gives to the queue that it configures itself (drivers/dma/idxd/defaults.c)."""
NO_QUEUE_SETTINGS = QueueSettings()


def check_queue(inventory: Inventory, id: str, wanted: QueueSettings) -> None:
    """Raise InputError if a queue cannot be set to what a claim wants."""
    device = inventory.device_by_id.get(id)
    if device is None or not device.made_for_claims:
        raise InputError(f"{id} was configured by an admin and is handed over as it is: only env and interrupts apply")
    queue_for(device, wanted)


def queue_for(device: Device, wanted: QueueSettings = NO_QUEUE_SETTINGS) -> Queue:
    """Return what a queue that is made for claims is set to. Raise InputError naming the key and the limit."""
    modes = str(device.attributes["modes"]).split(",")
    mode = modes[0] if wanted.mode is None else wanted.mode
    if mode not in modes:
        raise InputError(f"mode: queues.modes of this node allows {', '.join(modes)}, and not {mode}")
    most = int(device.attributes["max_priority"])
    priority = min(USUAL_PRIORITY, most) if wanted.priority is None else wanted.priority
    if priority > most:
        raise InputError(f"priority: queues.maxPriority of this node is {most}, less than {priority}")
    if wanted.block_on_fault and not device.attributes["block_on_fault"]:
        raise InputError("blockOnFault: queues.blockOnFault of this node does not allow it")
    return Queue(
        mode=mode,
        priority=priority,
        threshold=_threshold(device, mode, wanted.threshold),
        block_on_fault=bool(wanted.block_on_fault),
    )


def _threshold(device: Device, mode: str, wanted: int | None) -> int:
    size = int(device.attributes["size"])
    if mode != SHARED:
        if wanted is not None:
            raise InputError(f"threshold: only a shared queue has one, and {device.id} is to be {mode}")
        return 0
    if wanted is not None and wanted > size:
        raise InputError(f"threshold: {device.id} has {size} entries, fewer than {wanted}")
    return size if wanted is None else wanted
