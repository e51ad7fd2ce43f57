"""Which interfaces were moved into pods, and what they were on the host: a small file, written before anything is
changed.

After kill -9 at any step it says what to give back. What an earlier boot recorded is gone with it: no network namespace
outlives the kernel. An unreadable file counts as empty, and this is logged: interfaces then stay where they are until
the kernel returns them with the end of their pods.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import cause_of
from nodeagent.host.netlink.interfaces import Link
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.managers.state_files import INTERFACES
from nodeagent.telemetry.once import Once


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """One interface that is, or is about to be, in a pod."""

    device: str
    """Id of the adapter."""
    claim: str
    """UID."""
    pod: str
    """UID."""
    pod_name: str
    sandbox: str
    """The runtime's id of the pod's sandbox."""
    namespaces: tuple[str, ...]
    """Paths of the pod's network namespace."""
    name: str
    """In the pod."""
    before: Link
    """What it was on the host."""
    addresses: tuple[str, ...] = ()
    """Those that it had on the host for good."""

    @property
    def mark(self) -> str:
        """Return the alias by which it is found where the kernel does not tell an interface's device."""
        return f"nodeagent {self.claim} {self.device}"

    def is_it(self, link: Link) -> bool:
        """Return whether an interface is this one, whatever it is called by now. The pod may have been able to set an
        alias, and to make virtual interfaces, but not one of the same device and kind."""
        if link.kind != self.before.kind:
            return False
        if self.before.parent:
            return (link.parent, link.port) == (self.before.parent, self.before.port)
        return link.alias == self.mark


def as_on_host(inventory: Inventory, records: Mapping[str, Moved]) -> Inventory:
    """Return an inventory in which the adapters whose interfaces are in pods have what these were on the host: an agent
    that starts cannot see it."""

    def told(device: Device) -> Device:
        record = records.get(device.id)
        if record is None or "netdevs" in device.attributes:
            return device
        before = record.before
        seen = {"netdevs": before.name, "mac": before.hardware_address, "mtu": before.mtu}
        return replace(device, attributes=MappingProxyType({**device.attributes, **seen}))

    return replace(inventory, devices=tuple(map(told, inventory.devices)))


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    moved: list[Moved] = []


class InterfaceJournal:
    """The file. Every call reads or writes it, because another agent may do so too. Blocks."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self.path = state_dir / INTERFACES
        self._boot_id = boot_id
        self._unreadable = Once("interface-records-unreadable", level="error")

    def read(self) -> Mapping[str, Moved]:
        """Return what was recorded since boot, by device."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            left = "interfaces stay in their pods until these end"
            self._unreadable.report(f"cannot read {self.path}: {cause_of(error)}", left=left)
            return {}
        return {one.device: one for one in found.moved} if found.boot_id == self._boot_id else {}

    def add(self, record: Moved) -> None:
        """Record an interface that is about to be moved. Durable on return. Raise HostError if it cannot be written."""
        self._write({**self.read(), record.device: record})

    def forget(self, device: str) -> None:
        """Record that an interface is on the host again. Raise HostError if it cannot be written."""
        known = self.read()
        if device in known:
            self._write({id: one for id, one in known.items() if id != device})

    def _write(self, records: Mapping[str, Moved]) -> None:
        if not records:
            files.remove(self.path)
            return
        ordered = [records[device] for device in sorted(records)]
        files.replace(self.path, msgspec.json.encode(_File(boot_id=self._boot_id, moved=ordered)) + b"\n", mode=0o600)
