"""NVMe targets on the network that the configuration names: one device each, whether or not it is connected.

All nodes have the same devices, and publish them in pools that they share (core/fabrics/pool.py). The agent connects a
target for the claim that holds it (managers/fabrics), and its container gets the disks that come with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from nodeagent.core.fabrics.target import KIND, device_id
from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host.devices.base import Context, Found, TargetSelector
from nodeagent.host.sysfs.sysfs import SysFs


class Nvmeof:
    """The kind `nvmeof`."""

    name = KIND
    connects = True
    """A device is handed over once the agent has connected it; see `prepares` in host/devices/hooks.py."""

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        if not context.targets:
            return Found(state=KindState(kind=KIND, state=ABSENT, reason="no target is configured"))
        devices = tuple(_device(one) for one in context.targets)
        return Found(state=KindState(kind=KIND, state=PRESENT), devices=devices)

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return nothing: the disks of a target are known once it is connected."""
        return ContainerEdits()


def _device(one: TargetSelector) -> Device:
    port = one.port
    attributes: dict[str, str | int] = {
        "target": one.name,
        "selector": one.selector,
        "transport": port.transport,
        "traddr": port.traddr,
        "trsvcid": port.trsvcid,
        "nqn": port.nqn,
    }
    return Device(kind=KIND, id=device_id(one.name), attributes=MappingProxyType(attributes))
