"""Asking the kinds about a synthetic tree, for their tests."""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import KindState
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.all_kinds import Devices
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.devices import DeviceTree


def look(tree: DeviceTree, *extra: all_kinds.Kind, **options: object) -> Devices:
    """What all built-in kinds find, and extra ones before them."""
    sysfs = SysFs(tree.root)
    context = all_kinds.read_context(sysfs, **options)  # type: ignore[arg-type]
    return all_kinds.discover(sysfs, (*extra, *all_kinds.builtin_kinds()), context)


def by_id(found: Devices) -> Mapping[str, Device]:
    return {device.id: device for device in found.devices}


def kinds_of(found: Devices) -> dict[str, str]:
    return {device.id: device.kind for device in found.devices}


def state(found: Devices, kind: str) -> KindState:
    return next(one for one in found.kinds if one.kind == kind)


def edits(device: Device, *others: Device) -> ContainerEdits:
    kind = next(kind for kind in all_kinds.builtin_kinds() if kind.name == device.kind)
    return all_kinds.edits(kind, [device, *others])


def paths(given: ContainerEdits) -> list[str]:
    return [node.host_path for node in given.device_nodes]
