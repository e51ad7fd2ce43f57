"""All sources of evidence that are read from the kernel, in the order in which a device is looked at."""

from __future__ import annotations

from collections.abc import Iterable

from nodeagent.host.devices.base import Kind
from nodeagent.host.health.aer import Aer
from nodeagent.host.health.carrier import Carrier
from nodeagent.host.health.kinds import KindHealth
from nodeagent.host.health.nvme import NvmeState, Smart
from nodeagent.host.health.pcie import Pcie
from nodeagent.host.health.ras import Ras
from nodeagent.host.health.source import Source


def sources(families: Iterable[Kind] = ()) -> tuple[Source, ...]:
    """Return one of each, the last for those kinds that know the health of their devices, if there are any."""
    of_kinds = KindHealth(families)
    return Carrier(), Pcie(), Aer(), NvmeState(), Smart(), Ras(), *([of_kinds] if of_kinds.needed else [])
