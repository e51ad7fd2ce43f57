"""The public API for third-party device kinds: everything that docs/kinds.md needs, and nothing else.

A kind is a class with a name and two methods, `discover` and `edits`, registered as an entry point in the group
`nodeagent.kinds`. It may have hooks besides: `prepare` with `unprepare`, `health`, and `config`, a type. What is
exported here keeps its meaning between minor versions; other modules may change at any time.
"""

from __future__ import annotations

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device, DeviceNode, Draws, Link, Mount
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, DeviceState
from nodeagent.core.model.inventory import ABSENT, DEGRADED, PRESENT, KindState
from nodeagent.host.devices.base import Context, Found, Kind, short_id
from nodeagent.host.devices.hooks import Observing, Preparing
from nodeagent.host.health.source import Sight
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

__all__ = [
    "ABSENT",
    "DEGRADED",
    "HEALTHY",
    "PRESENT",
    "UNHEALTHY",
    "UNKNOWN",
    "ContainerEdits",
    "Context",
    "Device",
    "DeviceNode",
    "DeviceState",
    "Draws",
    "Found",
    "Kind",
    "KindState",
    "Link",
    "Mount",
    "Observing",
    "Preparing",
    "Sight",
    "SysFs",
    "Tolerant",
    "replace",
    "short_id",
]
