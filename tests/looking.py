"""Asking the kinds about a synthetic tree, for their tests."""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.model import (
    ContainerEdits,
    Device,
    KindState,
)
from nodeagent.host import kinds
from nodeagent.host.kinds import Devices
from nodeagent.host.sysfs import SysFs
from tests.devices import DeviceTree


def look(tree: DeviceTree, *extra: kinds.Kind, **options: object) -> Devices:
    """What all built-in kinds find, and extra ones before them."""
    sysfs = SysFs(tree.root)
    context = kinds.read_context(sysfs, **options)  # type: ignore[arg-type]
    return kinds.discover(sysfs, (*extra, *kinds.builtin_kinds()), context)


def by_id(found: Devices) -> Mapping[str, Device]:
    return {device.id: device for device in found.devices}


def kinds_of(found: Devices) -> dict[str, str]:
    return {device.id: device.kind for device in found.devices}


def state(found: Devices, kind: str) -> KindState:
    return next(one for one in found.kinds if one.kind == kind)


def edits(device: Device, *others: Device) -> ContainerEdits:
    kind = next(kind for kind in kinds.builtin_kinds() if kind.name == device.kind)
    return kinds.edits(kind, [device, *others])


def paths(given: ContainerEdits) -> list[str]:
    return [node.host_path for node in given.device_nodes]
