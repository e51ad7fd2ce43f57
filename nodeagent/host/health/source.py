"""What a source of evidence is: something that looks at one device. A look may hang, and has a deadline."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType
from typing import Protocol

import msgspec

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNKNOWN, DeviceState
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

Readings = Mapping[str, int]
NO_READINGS: Readings = MappingProxyType({})


class Sight(msgspec.Struct, frozen=True):
    """What was seen of a device."""

    state: DeviceState
    reason: str = ""
    readings: Readings = msgspec.field(default_factory=lambda: NO_READINGS)
    """Numbers by name, for the metrics."""


class Silence(Enum):
    """Why nothing was seen."""

    NOTHING_TO_SEE = auto()
    """The device has nothing that the source could look at: what it said before no longer counts."""
    NO_ANSWER = auto()
    """It is there but does not answer now, as while the device sleeps: what was said before stays."""


class Source(Protocol):
    """One kind of cause of bad health."""

    @property
    def name(self) -> str:
        """Evidence.source, as in docs/health.md."""
        ...

    @property
    def period_s(self) -> float:
        """How many seconds to leave between two looks at a device at least."""
        ...

    def concerns(self, device: Device) -> bool:
        """Return whether there may be something to look at. Reads nothing."""
        ...

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        """Return what is seen of the device. May block; raises nothing but HostError."""
        ...


def looked(source: Source, sysfs: SysFs, device: Device) -> Sight | Silence:
    """Return what a source sees of a device; of files that cannot be read, that the health is unknown and why. Blocks
    and raises nothing."""
    reader = Tolerant(sysfs)
    try:
        seen = source.look(reader, device)
    except (Exception, SystemExit) as error:  # one source or device that fails affects no other
        return Sight(UNKNOWN, f"cannot look at {source.name} of {device.id}: {error}")
    if reader.warnings and (isinstance(seen, Silence) or seen.state == HEALTHY):
        return Sight(UNKNOWN, reader.warnings[0])
    return seen
