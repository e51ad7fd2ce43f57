"""PCI functions that no other kind claims: bridges (kind `bridge`, never granted) and the rest (`pci`)."""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host.devices.base import Context, Found, node_edits, pci_device
from nodeagent.host.sysfs.sysfs import SysFs

_BRIDGE = "06"


class Pci:
    """The kind `pci`. It offers all functions and comes last, so functions found by an
    earlier kind stay with that kind."""

    name = "pci"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        if not context.functions:
            return Found(state=KindState(kind="pci", state=ABSENT, reason="there is no PCI function"))
        devices = (
            pci_device(context, function, "bridge" if function.is_class(_BRIDGE) else "pci")
            for function in context.functions
        )
        return Found(state=KindState(kind="pci", state=PRESENT), devices=tuple(devices))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the vfio nodes of a function bound to vfio-pci, and its address."""
        return node_edits(device, devices)
