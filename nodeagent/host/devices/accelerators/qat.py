"""Intel QuickAssist (QAT): the kind `qat`, its PCI functions with the services that they are configured for.

A function is known by its id, whatever it is bound to: virtual functions are usually bound to vfio-pci or qat_vfio_pci.
What a physical function says of its services and its state holds of its virtual functions too. Source:
Documentation/ABI/testing/sysfs-driver-qat (4xxx, 420xx and 6xxx; Linux 6.0); the ids are those of its drivers.
"""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host.devices.base import Context, Found, node_edits, pci_device
from nodeagent.host.health.source import Sight
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

INTEL = "8086"
GENERATIONS = {
    "0435": "dh895xcc",
    "0443": "dh895xcc",
    "19e2": "c3xxx",
    "19e3": "c3xxx",
    "37c8": "c62x",
    "37c9": "c62x",
    "4940": "4xxx",
    "4941": "4xxx",
    "4942": "401xx",
    "4943": "401xx",
    "4944": "402xx",
    "4945": "402xx",
    "4946": "420xx",
    "4947": "420xx",
    "4948": "6xxx",
    "4949": "6xxx",
}
"""By PCI device id; the second of each is the virtual function's."""
UP = "up"


class Qat:
    """The kind `qat`."""

    name = "qat"

    def __init__(self) -> None:
        self._sysfs = SysFs()

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        self._sysfs, reader = sysfs, Tolerant(sysfs)
        devices = tuple(_device(reader, context, one) for one in context.functions if _is_qat(one))
        state = KindState(kind="qat", state=PRESENT)
        if not devices:
            state = KindState(kind="qat", state=ABSENT, reason="there is no QAT function")
        return Found(state=state, devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the vfio nodes, and one variable with the addresses of all functions."""
        return node_edits(device, devices)

    def health(self, device: Device) -> Sight | None:
        """Return whether a physical function is up, or None if it does not say. Its virtual functions are as ill."""
        state = self._sysfs.text(f"{_folder(device.id)}/state", None)
        if not state:
            return None
        return Sight(HEALTHY) if state == UP else Sight(UNHEALTHY, f"the device is {state}")


def _is_qat(function: Function) -> bool:
    return function.vendor == INTEL and function.device in GENERATIONS


def _device(reader: Tolerant, context: Context, function: Function) -> Device:
    attributes: dict[str, str | int | bool] = {"generation": GENERATIONS[function.device or ""]}
    services = reader.text(f"{_folder(function.physical or function.address)}/cfg_services")
    if services is not None:
        attributes["services"] = _in_order(services)
    return pci_device(context, function, "qat", attributes=attributes)


def _folder(address: str) -> str:
    return f"sys/bus/pci/devices/{address}/qat"


def _in_order(services: str) -> str:
    """Return services in a fixed order: the kernel keeps the order in which they were written, which means nothing."""
    return ";".join(sorted(services.split(";")))
