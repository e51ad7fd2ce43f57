"""`carrier`: whether the interfaces of a network adapter that are up have a link.

Source: Documentation/ABI/testing/sysfs-class-net and Documentation/networking/operstates.rst (Linux 6.12). `carrier`
can be read only while the interface is up; `operstate` has the words of RFC 2863.

An adapter that an admin has set down, whose interface a pod has, or that is bound to vfio says nothing. A virtual
function that has no interface here is as ill as its physical function, like all parts of a device.
"""

from __future__ import annotations

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from nodeagent.host.health.source import Sight, Silence
from nodeagent.host.sysfs.lenient import Tolerant

_IFF_UP = 1
_NOT_READY = frozenset({"dormant", "testing", "notpresent"})
"""With a carrier, and yet no packet passes: the interface waits (802.1X), tests itself, or lacks a part."""


class Carrier:
    """The source `carrier`."""

    name = "carrier"
    period_s = 0.0

    def concerns(self, device: Device) -> bool:
        return device.kind == "nic"

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        names = [name for name in str(device.attributes.get("netdevs", "")).split(",") if name]
        seen = [one for one in (_interface(reader, name) for name in names) if one is not None]
        for state in (UNHEALTHY, UNKNOWN):
            if reasons := [one.reason for one in seen if one.state == state]:
                return Sight(state, "; ".join(reasons))
        return Sight(HEALTHY) if seen else Silence.NOTHING_TO_SEE


def _interface(reader: Tolerant, name: str) -> Sight | None:
    """Return what is seen of one interface, or None if it is down or not here."""
    path = f"sys/class/net/{name}"
    flags = reader.number(f"{path}/flags")
    carrier = reader.number_if_told(f"{path}/carrier") if flags is not None and flags & _IFF_UP else None
    if carrier is None:
        return None
    if not carrier:
        return Sight(UNHEALTHY, f"no carrier on {name}")
    state = reader.text(f"{path}/operstate") or ""
    return Sight(UNKNOWN, f"{name} is {state}") if state in _NOT_READY else Sight(HEALTHY)
