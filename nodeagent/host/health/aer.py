"""`aer`: fatal PCIe errors that a device has reported since it was found (Advanced Error Reporting).

Source: Documentation/ABI/testing/sysfs-bus-pci-devices-aer, aer_dev_{fatal,nonfatal,correctable} (since Linux 4.19):
lines of a name and a count, the last of which is the sum. The counts begin again when the function is removed and found
again. Errors that are not fatal are repeated by the hardware or handled by the driver: they are only counted.
"""

from __future__ import annotations

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.host.health.pcie import folder, is_function
from nodeagent.host.health.source import Sight, Silence
from nodeagent.host.sysfs.lenient import Tolerant

_SUMS = {"fatal": "TOTAL_ERR_FATAL", "nonfatal": "TOTAL_ERR_NONFATAL", "correctable": "TOTAL_ERR_COR"}


class Aer:
    """The source `aer`."""

    name = "aer"
    period_s = 0.0

    def concerns(self, device: Device) -> bool:
        return is_function(device)

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        texts = {one: reader.text(f"{folder(device.id)}/aer_dev_{one}") for one in _SUMS}
        if texts["fatal"] is None:
            return Silence.NOTHING_TO_SEE
        counts = {one: counts_of(text) for one, text in texts.items() if text is not None}
        sums = {one: found[_SUMS[one]] for one, found in counts.items() if _SUMS[one] in found}
        if "fatal" not in sums:
            reader.warn(f"{folder(device.id)}/aer_dev_fatal", f"there is no {_SUMS['fatal']}")
            return Silence.NO_ANSWER
        if not sums["fatal"]:
            return Sight(HEALTHY, readings=sums)
        kinds = ", ".join(name for name, count in counts["fatal"].items() if count and name != _SUMS["fatal"])
        return Sight(UNHEALTHY, f"{sums['fatal']} fatal PCIe errors ({kinds or 'of unknown kind'})", sums)


def counts_of(text: str) -> dict[str, int]:
    """Return the counts in lines of "NAME COUNT"; other lines are left out."""
    words = (line.split() for line in text.splitlines())
    return {one[0]: int(one[1]) for one in words if len(one) == 2 and one[1].isascii() and one[1].isdigit()}
