"""What kinds that know the health of their devices say of them: the source `kind`."""

from __future__ import annotations

from collections.abc import Iterable

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import DeviceState
from nodeagent.host.devices.base import Kind
from nodeagent.host.devices.hooks import observing
from nodeagent.host.health.source import Sight, Silence
from nodeagent.host.sysfs.lenient import Tolerant

OF_KINDS = "kind"


class KindHealth:
    """Asks the kind of a device."""

    name = OF_KINDS
    period_s = 0.0

    def __init__(self, families: Iterable[Kind]) -> None:
        self._kinds = observing(families)

    @property
    def needed(self) -> bool:
        """Return whether any kind knows the health of its devices."""
        return bool(self._kinds)

    def concerns(self, device: Device) -> bool:
        return device.kind in self._kinds

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        """Return what the kind says. Raise TypeError or ValueError if that is nothing that it may say."""
        said: object = self._kinds[device.kind].health(device)
        if said is None:
            return Silence.NOTHING_TO_SEE
        if not isinstance(said, Sight):
            raise TypeError(f"health of kind {device.kind} returned {type(said).__name__}, expected Sight")
        if not isinstance(said.reason, str):
            raise TypeError(f"health of kind {device.kind} gave {said.reason!r} as the reason, expected a text")
        numbers = {str(name): int(value) for name, value in said.readings.items()}
        return Sight(DeviceState(said.state), said.reason, numbers)
