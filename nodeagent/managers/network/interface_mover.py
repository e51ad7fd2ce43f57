"""Moves interfaces, with their RDMA devices, into the network namespaces of pods and gives them back, each recorded
first. Blocks.

Every step looks at what is there, so that after a crash at any point the same call completes what it had begun, or
undoes it. When a pod's namespace ends, the kernel returns a device's interface to the host by itself, under another
name if its own is taken there, and without the settings that it had; a virtual interface it destroys
(net/core/dev.c, default_device_exit_net). Both are taken for what they are: the former gets back what was recorded, the
latter is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import structlog
from msgspec.structs import replace

from nodeagent.core.network.interface import Interface
from nodeagent.errors import HostError
from nodeagent.host.netlink.interfaces import Interfaces, Link
from nodeagent.host.netlink.namespaces import OWN, NetNamespace, first_of
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.network.interface_journal import InterfaceJournal, Moved
from nodeagent.managers.network.rdma_mover import RdmaMover

RETURN_S, RETURN_POLL_S = 2.0, 0.05
"""How long the kernel may take to return an interface after the end of its pod's namespace: it does so in the
background."""
VETH = "veth"
"""The kind of pairs, whose ends name each other as what they are built on."""
log = structlog.get_logger()
IsThere = Callable[[str], bool]
"""Returns whether a device of an id can have an interface: it is plugged in and has a driver."""


def has_driver(sysfs: SysFs) -> IsThere:
    """Return what tells whether a device has a driver, which makes its interface."""

    def is_there(id: str) -> bool:
        address, _, auxiliary = id.partition("/")
        folder = f"sys/bus/auxiliary/devices/{auxiliary}" if auxiliary else f"sys/bus/pci/devices/{address}"
        return sysfs.exists(f"{folder}/driver")

    return is_there


class Asked(NamedTuple):
    """An interface that a claim wants in a pod."""

    device: str
    claim: str
    host_name: str
    """What the interface of the device was last called on the host."""
    wanted: Interface
    rdma: tuple[str, ...] = ()
    """The RDMA devices that go along, by their names on the host."""
    nodes: tuple[str, ...] = ()
    """The device nodes that the pod's containers are given for them."""


class Sandbox(NamedTuple):
    """Where a pod's network is."""

    id: str
    pod: str
    """UID."""
    pod_name: str
    """With its namespace."""
    namespaces: tuple[str, ...]
    """Paths of its network namespace; the first that can be opened counts."""


class InterfaceMover:
    """One caller at a time."""

    def __init__(self, journal: InterfaceJournal, is_there: IsThere, rdma: RdmaMover, host: str = OWN) -> None:
        """rdma: takes RDMA devices along. host: path of the host's network namespace."""
        self._journal = journal
        self._is_there = is_there
        self._rdma = rdma
        self._host = host

    def records(self, *, certain: bool = False) -> Mapping[str, Moved]:
        """Return what is recorded, by device. certain: raise HostError if that cannot be told for the moment."""
        return self._journal.read(certain=certain)

    # ---------------------------------------------------------------- into a pod

    def hand_over(self, asked: Asked, sandbox: Sandbox) -> bool:
        """Have an interface in a pod as a claim wants it. Return whether it was not there before. Raise HostError; then
        it is on the host, or what is recorded tells where to look."""
        with NetNamespace(self._host) as host, first_of(sandbox.namespaces) as pod:
            if pod.is_same(host):
                raise HostError(f"cannot move interface {asked.host_name} into {sandbox.pod_name}: hostNetwork")
            record = self._known(asked, sandbox)
            with Interfaces(host) as outside, Interfaces(pod) as inside:
                if record is not None and (link := _find(record, inside)):
                    self._configure(record, link, inside, asked.wanted)
                    self._rdma.hand_over(record.rdma, host, pod, asked.nodes)
                    return False
                record = self._recorded(asked, sandbox, host, outside, inside)
                try:
                    link = self._moved(record, outside, inside, pod)
                    self._configure(record, link, inside, asked.wanted)
                    self._rdma.hand_over(record.rdma, host, pod, asked.nodes)
                except HostError as error:
                    raise self._undone(record, error) from None
        log.info("interface-handed-over", device=asked.device, interface=record.name, pod=sandbox.pod_name)
        return True

    def _known(self, asked: Asked, sandbox: Sandbox) -> Moved | None:
        """Return the record of an interface that is in the same sandbox, after giving back one that is in another of
        the pod. Raise HostError if another claim has it, or another pod of the claim."""
        record = self._journal.read().get(asked.device)
        if record is None or (record.claim, record.sandbox) == (asked.claim, sandbox.id):
            return record
        if record.claim != asked.claim:
            raise HostError(f"cannot move {asked.device}: its interface is not given back by claim {record.claim} yet")
        if record.pod != sandbox.pod and self._is_there_still(record):
            raise HostError(f"cannot move {asked.device}: {record.pod_name}, which uses the same claim, has it")
        try:
            self._give_back_one(record)
        except HostError:
            if not self._is_on_host(record):
                raise
            moved = _moved_on(record, asked, sandbox)
            self._journal.keep({moved.device: moved})
        return None

    def _recorded(
        self, asked: Asked, sandbox: Sandbox, host: NetNamespace, outside: Interfaces, inside: Interfaces
    ) -> Moved:
        """Record what is on the host. What was recorded before a crash stays: by now it may be changed."""
        known = self._journal.read().get(asked.device)
        if known is not None:
            return known
        link = outside.link(asked.host_name)
        if link is None:
            raise HostError(f"cannot move interface {asked.host_name}: the host has none of that name")
        if link.master:
            raise HostError(f"cannot move interface {link.name}: it belongs to a bond or bridge of the host")
        if upper := [one.name for one in outside.links() if one.lower == link.index and one.kind != VETH]:
            raise HostError(f"cannot move interface {link.name}: {', '.join(upper)} of the host would end with it")
        record = Moved(
            device=asked.device,
            claim=asked.claim,
            pod=sandbox.pod,
            pod_name=sandbox.pod_name,
            sandbox=sandbox.id,
            namespaces=sandbox.namespaces,
            name=asked.wanted.name or link.name,
            before=link,
            addresses=tuple(outside.addresses(link)),
            rdma=self._rdma.to_move(asked.rdma, host),
        )
        if record.name in inside.taken_names():
            raise HostError(f"cannot move interface {link.name} as {record.name}: the pod has one of that name")
        self._journal.add(record)
        return record

    def _moved(self, record: Moved, outside: Interfaces, inside: Interfaces, pod: NetNamespace) -> Link:
        """Move an interface and return what it is in the pod."""
        link = _find_on_host(record, outside)
        if link is None:
            raise HostError(f"cannot move interface {record.before.name}: it is not on the host")
        if link.alias != record.mark:
            outside.set_alias(link, record.mark)
        outside.move(link, pod, record.name)
        if (moved := _find(record, inside)) is None:
            raise HostError(f"cannot move interface {link.name} into {record.pod_name}: it did not arrive")
        return moved

    def _configure(self, record: Moved, link: Link, inside: Interfaces, wanted: Interface) -> None:
        """Give an interface what its claim wants, as far as it does not have it, and read back."""
        if link.name != record.name:
            inside.set_up(link, up=False)
            inside.rename(link, record.name)
        if wanted.hardware_address and link.hardware_address != wanted.hardware_address:
            inside.set_hardware_address(link, wanted.hardware_address)
        if wanted.mtu is not None and link.mtu != wanted.mtu:
            inside.set_mtu(link, wanted.mtu)
        if not link.up:
            inside.set_up(link, up=True)
        for address in wanted.addresses:
            inside.add_address(link, address)
        for route in wanted.routes:
            inside.add_route(link, route.destination, route.gateway)
        self._prove(record, inside, wanted)

    def _prove(self, record: Moved, inside: Interfaces, wanted: Interface) -> None:
        """Raise HostError if the pod does not have what the kernel was told."""
        found = _find(record, inside)
        as_wanted = (
            found is not None
            and (found.name, found.up) == (record.name, True)
            and wanted.mtu in (None, found.mtu)
            and wanted.hardware_address in ("", found.hardware_address)
            and {*wanted.addresses} <= {*inside.addresses(found)}
        )
        if not as_wanted:
            raise HostError(f"cannot set up interface {record.name} in {record.pod_name}: it is {found}")

    def _undone(self, record: Moved, error: HostError) -> HostError:
        """Give back what could not be handed over. Return what to raise."""
        try:
            self._give_back_one(record)
        except HostError as left:
            return HostError(f"{error}; {left}")
        return error

    # ---------------------------------------------------------------- back to the host

    def give_back(self, devices: Collection[str]) -> dict[str, str]:
        """Give back the interfaces of some devices. Return, by device, why one is not on the host."""
        errors: dict[str, str] = {}
        for device, record in self._journal.read(certain=True).items():
            if device in devices:
                try:
                    self._give_back_one(record)
                except HostError as error:
                    errors[device] = str(error)
        return errors

    def _give_back_one(self, record: Moved) -> None:
        with NetNamespace(self._host) as host, Interfaces(host) as outside:
            self._fetch(record, host, outside)
            until_s = time.monotonic() + RETURN_S
            while (link := _find_on_host(record, outside)) is None and self._is_awaited(record):
                if time.monotonic() > until_s:
                    raise HostError(
                        f"cannot give back interface {record.before.name} of {record.device}: it is neither on the "
                        f"host nor in {record.pod_name}"
                    )
                time.sleep(RETURN_POLL_S)
            self._rdma.await_return(record.rdma, host, lambda: self._is_there(record.device))
            name = _restore(record, link, outside) if link is not None else ""
        self._journal.forget(record.device)
        if link is None:
            log.warning("interface-gone", device=record.device, interface=record.before.name, pod=record.pod_name)
        else:
            log.info("interface-given-back", device=record.device, interface=name, pod=record.pod_name)

    def _fetch(self, record: Moved, host: NetNamespace, outside: Interfaces) -> None:
        """Move an interface and its RDMA devices back if they are in the pod."""
        try:
            pod = first_of(record.namespaces)
        except HostError:
            return  # it has ended, and the kernel returns the interface
        with pod, Interfaces(pod) as inside:
            self._rdma.fetch(record.rdma, host, pod)
            if pod.is_same(host) or (link := _find(record, inside)) is None:
                return
            inside.move(link, host, _free_name(record.before.name, link, outside.taken_names()))

    def _is_on_host(self, record: Moved) -> bool:
        """Return whether an interface is on the host, also if it is not as it was there: as long as a virtual function
        has an address of its physical one for the claim, its driver may refuse the one that it had."""
        with NetNamespace(self._host) as host, Interfaces(host) as outside:
            return _find_on_host(record, outside) is not None

    def _is_there_still(self, record: Moved) -> bool:
        """Return whether a pod has its interface."""
        try:
            pod = first_of(record.namespaces)
        except HostError:
            return False
        with pod, Interfaces(pod) as inside:
            return _find(record, inside) is not None

    def _is_awaited(self, record: Moved) -> bool:
        """Return whether the kernel will return an interface: a virtual one ends with its namespace, and that of a
        device which is unplugged or has no driver is gone."""
        return not record.before.kind and self._is_there(record.device)


def _moved_on(record: Moved, asked: Asked, sandbox: Sandbox) -> Moved:
    """Return what is recorded of an interface that goes on to another sandbox of its claim: what it was on the host
    stays."""
    return replace(
        record,
        pod=sandbox.pod,
        pod_name=sandbox.pod_name,
        sandbox=sandbox.id,
        namespaces=sandbox.namespaces,
        name=asked.wanted.name or record.before.name,
    )


def _find(record: Moved, where: Interfaces) -> Link | None:
    """Return the interface of a record, wherever it was renamed to."""
    return next((link for link in where.links() if record.is_it(link)), None)


def _find_on_host(record: Moved, outside: Interfaces) -> Link | None:
    """Return the interface of a record, also one that is not marked yet."""
    if (found := _find(record, outside)) is not None or record.before.parent:
        return found
    link = outside.link(record.before.name)
    if link is None:
        return None
    before = record.before
    return link if replace(link, index=before.index, lower=before.lower, up=before.up) == before else None


def _free_name(wanted: str, link: Link, taken: Collection[str]) -> str:
    """Return a name for an interface that comes to the host: its own, or one that nothing there has."""
    if wanted not in taken:
        return wanted
    return next(name for number in range(len(taken) + 1) if (name := f"dev{link.index + number}") not in taken)


def _restore(record: Moved, link: Link, outside: Interfaces) -> str:
    """Give an interface on the host back what it had, as far as it does not have it. Return its name."""
    before, name = record.before, link.name
    if name != before.name and before.name not in outside.taken_names(link):
        outside.set_up(link, up=False)
        outside.rename(link, before.name)
        name, link = before.name, replace(link, up=False)
    if name != before.name:
        log.warning("interface-name-taken", device=record.device, interface=name, before=before.name)
    if before.hardware_address and link.hardware_address != before.hardware_address:
        outside.set_hardware_address(link, before.hardware_address)
    if link.mtu != before.mtu:
        outside.set_mtu(link, before.mtu)
    if link.up != before.up:
        outside.set_up(link, up=before.up)
    there = {*outside.addresses(link)}
    for address in record.addresses:
        if address not in there:
            outside.add_address(link, address)
    if link.alias != before.alias:
        outside.set_alias(link, before.alias)
    return name
