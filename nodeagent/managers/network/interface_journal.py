"""Which interfaces were moved into pods, and what they were on the host: a small file, written before anything is
changed.

After kill -9 at any step it says what to give back. What an earlier boot recorded is gone with it: no network namespace
outlives the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.netlink.interfaces import Link
from nodeagent.host.netlink.rdma import RdmaDevice
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import INTERFACES


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
    rdma: tuple[RdmaDevice, ...] = ()
    """The adapter's RDMA devices that go along: none in the shared mode of `rdma system`."""

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
    """Return an inventory in which the adapters whose interfaces are in pods have what these and their RDMA devices
    were on the host: an agent that starts cannot see it."""

    def told(device: Device) -> Device:
        record = records.get(device.id)
        if record is None:
            return device
        seen: dict[str, str | int] = {}
        if record.rdma and "rdma" not in device.attributes:
            seen["rdma"] = ",".join(one.name for one in record.rdma)
        if "netdevs" not in device.attributes:
            before = record.before
            seen |= {"netdevs": before.name, "mac": before.hardware_address, "mtu": before.mtu}
        return replace(device, attributes=MappingProxyType({**device.attributes, **seen}))

    return replace(inventory, devices=tuple(map(told, inventory.devices)))


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    moved: list[Moved] = []


class InterfaceJournal(Journal[_File, str, Moved]):
    """The records of this boot, by device."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / INTERFACES, _File),
            lambda file: {one.device: one for one in file.moved} if file.boot_id == boot_id else {},
            lambda records: _File(boot_id=boot_id, moved=list(records.values())),
            unreadable="interface-records-unreadable",
            left="interfaces stay in their pods until these end",
        )

    def add(self, record: Moved) -> None:
        """Record an interface that is about to be moved. Durable on return. Raise HostError if it cannot be written."""
        self.keep({record.device: record})
