"""Character devices that the configuration selects by glob: /dev/fuse, /dev/kvm, serial ports.

The id is the path as matched, so a stable link (/dev/serial/by-id/...) gives a stable id. In a captured tree, which
cannot hold device nodes, a plain file counts as one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device, DeviceNode
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host import pci
from nodeagent.host.devices.base import Context, Found, part_of, short_id
from nodeagent.host.devices.disks import node
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.uses.used_paths import PORT_OF, port_of


class Char:
    """The kind `char`."""

    name = "char"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        if not context.char:
            return Found(state=KindState(kind="char", state=ABSENT, reason="no character device is configured"))
        reader = Tolerant(sysfs)
        devices = tuple(_devices(reader, context))
        return Found(state=KindState(kind="char", state=PRESENT), devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the node under the path it was matched by, whatever that links to."""
        target = str(device.attributes.get("target", device.paths[0]))
        return ContainerEdits(device_nodes=(DeviceNode(host_path=target, container_path=device.paths[0]),))


def _devices(reader: Tolerant, context: Context) -> Iterator[Device]:
    seen: set[str] = set()
    for selector in context.char:
        for path in _matches(reader, selector.globs):
            target = f"/{reader.sysfs.real(path[1:])}"
            if target not in seen:
                seen.add(target)
                yield from _device(reader, context, selector.name, path, target)


def _matches(reader: Tolerant, globs: Sequence[str]) -> Iterator[str]:
    for pattern in globs:
        if not pattern.startswith("/dev/") or ".." in pattern.split("/"):
            reader.warnings.append(f"cannot look for character devices {pattern!r}: the path is not below /dev")
            continue
        root = Path(reader.sysfs.root)
        yield from (f"/{found.relative_to(root)}" for found in sorted(root.glob(pattern[1:])))


def _device(reader: Tolerant, context: Context, selector: str, path: str, target: str) -> Iterator[Device]:
    try:
        status = Path(reader.sysfs.path(target[1:])).stat()
    except OSError as error:
        reader.warn(path[1:], str(error.strerror))
        return
    if not (stat.S_ISCHR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        return
    attributes: dict[str, str | int | bool] = {"selector": selector}
    if target != path:
        attributes["target"] = target
    owner, same = None, list[str]()
    if stat.S_ISCHR(status.st_mode):
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        attributes.update(major=major, minor=minor)
        folder = reader.sysfs.real(f"sys/dev/char/{major}:{minor}")
        attributes.update({PORT_OF: port} if (port := port_of(folder)) else {})
        # A disk has more nodes than one: /dev/sg0 and /dev/bsg/0:0:0:0 are /dev/sda too.
        same = [node(name) for name in reader.names(f"{folder}/device/block")]
        address, _ = pci.split(folder)
        owner = context.function_by_address.get(address) if address is not None else None
    device = part_of(owner, kind="char", id=short_id(path), paths=(path,), attributes=MappingProxyType(attributes))
    yield replace(device, exclusive=(target, *same))
