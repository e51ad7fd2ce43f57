"""How the agent's own MIG instances stand: records, the ledger and what could not be destroyed, as one list. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum

import msgspec

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.partitions.instances import Record


class InstanceState(StrEnum):
    """How an instance of the agent's own stands."""

    INTENDED = "intended"
    """It is granted, and is being made, or is made again when its claim is prepared; or the driver has not said."""
    MADE = "made"
    """It exists and is granted."""
    HELD_BACK = "held-back"
    """No grant holds it, and it exists or may exist: nothing that overlaps it is granted."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One instance."""

    device: str
    gpu: str
    """PCI address of its GPU."""
    profile: str
    start: int
    size: int
    """Slices of memory; 0 where the device is not in the inventory and has no record."""
    uuid: str
    """Empty until it is known to exist."""
    state: InstanceState
    claim: str
    """NAMESPACE/NAME, or empty."""
    why: str
    """Why it still exists, of one that is held back."""


def standing(
    records: Mapping[str, Record], ending: Mapping[str, str], ledger: Ledger, inventory: Inventory
) -> Iterator[Standing]:
    """Yield the instances that the agent makes, has made or destroys, in order of device.

    records: by device. ending: why those that no grant holds still exist.
    """
    holders = {device: grant.holder for grant in ledger.grants.values() for device in grant.devices}
    known = inventory.device_by_id
    granted = {id for id in holders if (device := known.get(id)) is not None and device.partition is not None}
    for id in sorted(records.keys() | granted):
        record, device, holder = records.get(id), known.get(id), holders.get(id)
        part = device.partition if device is not None else None
        place = record.place if record is not None else part
        gpu, _, name = id.rpartition("/mig-")
        made = record is not None and bool(record.uuid)
        yield Standing(
            device=id,
            gpu=gpu,
            profile=name.rpartition("-")[0],
            start=place.start if place is not None else 0,
            size=place.size if place is not None else 0,
            uuid=record.uuid if record is not None else "",
            state=InstanceState.HELD_BACK if holder is None else InstanceState.MADE if made else InstanceState.INTENDED,
            claim=_claim(holder),
            why="" if holder is not None else ending.get(id, ""),
        )


def _claim(holder: Holder | None) -> str:
    return f"{holder.namespace}/{holder.claim}" if holder is not None and holder.claim else ""
