"""All sources of evidence that are read from the kernel, in the order in which a device is looked at."""

from __future__ import annotations

from nodeagent.host.health.aer import Aer
from nodeagent.host.health.carrier import Carrier
from nodeagent.host.health.nvme import NvmeState, Smart
from nodeagent.host.health.pcie import Pcie
from nodeagent.host.health.ras import Ras
from nodeagent.host.health.source import Source


def sources() -> tuple[Source, ...]:
    """Return one of each."""
    return Carrier(), Pcie(), Aer(), NvmeState(), Smart(), Ras()
