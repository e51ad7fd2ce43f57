"""Channels through which GPUs of several nodes share memory (NVIDIA's IMEX): one device for each channel.

Source: NVIDIA's IMEX guide, "Channels". A container that opens the node of a channel reaches the memory that others
export through the same channel on any node of the IMEX domain. Its daemons and its set of nodes are not the agent's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.model.inventory import ABSENT, PRESENT, KindState
from nodeagent.host.devices.base import Context, Found, nodes
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs

FOLDER = "dev/nvidia-caps-imex-channels"
_CHANNEL = "channel"
_NONE = f"NVIDIA's driver shows no channel below /{FOLDER}"


class Imex:
    """The kind `imex`."""

    name = "imex"

    def discover(self, sysfs: SysFs, context: Context) -> Found:
        reader = Tolerant(sysfs)
        devices = tuple(_devices(reader))
        state = KindState(kind="imex", state=PRESENT) if devices else KindState(kind="imex", state=ABSENT, reason=_NONE)
        return Found(state=state, devices=devices, warnings=tuple(reader.warnings))

    def edits(self, device: Device, devices: Sequence[Device]) -> ContainerEdits:
        """Return the channel's node."""
        return ContainerEdits(device_nodes=nodes(device.paths))


def _devices(reader: Tolerant) -> Iterator[Device]:
    numbered = reader.read(lambda path: list(reader.sysfs.numbered(path, _CHANNEL)), FOLDER) or []
    for number, path in numbered:
        attributes = MappingProxyType({"channel": number})
        yield Device(kind="imex", id=f"imex-{number}", paths=(f"/{path}",), attributes=attributes)
