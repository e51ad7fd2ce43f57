"""What was made of devices, or changed of them, for claims and from the configuration."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator, Mapping

from nodeagent.core.partitions.instances import Record
from nodeagent.daemon.leftovers.leftover import Host, Leftover, Line, step
from nodeagent.errors import HostError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.host.nvidia_smi import NvidiaSmi
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.host.vfio import Functions
from nodeagent.managers import state_files
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.keeper import QueueKeeper
from nodeagent.managers.fabrics.connector import connector
from nodeagent.managers.fabrics.journal import FabricsJournal
from nodeagent.managers.kinds.journal import KindsJournal
from nodeagent.managers.kinds.preparer import DevicePreparer
from nodeagent.managers.network.interface_journal import InterfaceJournal
from nodeagent.managers.network.interface_mover import InterfaceMover, has_driver
from nodeagent.managers.network.rdma_mover import RdmaMover
from nodeagent.managers.network.vf_journal import VfJournal
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal
from nodeagent.managers.network.vf_setter import VfSetter
from nodeagent.managers.partitions.amd_journal import AmdJournal
from nodeagent.managers.partitions.journal import PartitionJournal
from nodeagent.managers.passthrough.binder import Binder
from nodeagent.managers.passthrough.journal import PassthroughJournal
from nodeagent.managers.sharing.journal import SharingJournal
from nodeagent.managers.sharing.mps_daemons import MpsDaemons
from nodeagent.managers.sharing.time_slices import TimeSlices


def shared_gpus(host: Host) -> Leftover:
    """Return the MPS daemons, with their folders, and the time slices of GPUs that were changed."""
    where = host.where
    search = DriverSearch(top=where.sysfs.root, configured=host.config.nvidia.driver_root)
    journal, smi = SharingJournal(where.state_dir, where.sysfs.text(BOOT_ID, "")), NvidiaSmi(search)
    daemons, slices = MpsDaemons(journal, where.runtime_dir, search, smi), TimeSlices(journal, smi)
    names, changed = daemons.left(), slices.records()
    lines = [Line(str(daemons.folder / name)) for name in sorted(names)]
    lines += [Line(f"time slice of {id}", one.interval, one.before) for id, one in sorted(changed.items())]

    def undo() -> Iterator[str]:
        yield from daemons.stop(names).values()
        yield from slices.restore(set(changed)).values()

    return Leftover(lines, undo)


def instances(host: Host) -> Leftover:
    """Return notes on the MIG instances that the agent made: pods may still use them, and destroying them is a command
    to the driver."""
    made = PartitionJournal(host.where.state_dir, host.where.sysfs.text(BOOT_ID, "")).read().values()
    return Leftover(notes=[_instance(one) for one in made if one.gi is not None])


def _instance(one: Record) -> str:
    where = f"-i {one.gpu} -gi {one.gi}"
    return (
        f"the MIG instance {one.partition} stays as it is; without users, `nvidia-smi mig -dci {where}` and "
        f"`nvidia-smi mig -dgi {where}` destroy it"
    )


def amd_partitions(host: Host) -> Leftover:
    """Return notes on the partitions of AMD's GPUs that the agent changed: pods may use them by now."""
    where = host.where
    records = AmdJournal(where.state_dir / state_files.AMD_PARTITIONS, where.sysfs.text(BOOT_ID, "")).read()
    folder = where.sysfs.path("sys/bus/pci/devices")
    notes = [
        f"the compute partition of {gpu} stays; {one.before} in {folder}/{gpu}/current_compute_partition sets it back"
        for gpu, one in records.items()
        if one.ours
    ]
    return Leftover(notes=notes)


def passthrough(host: Host) -> Leftover:
    """Return the PCI functions that were bound to a VFIO driver for claims."""
    where = host.where
    journal = PassthroughJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    binder, records = Binder(journal, Functions(where.sysfs)), journal.read()
    lines = [Line(f"driver of {address}", one.driver, one.before) for address, one in sorted(records.items())]
    return Leftover(lines, step(lambda: binder.give_back({one.claim for one in records.values()})))


def interfaces(host: Host) -> Leftover:
    """Return the network interfaces that were moved into pods."""
    where = host.where
    journal = InterfaceJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    mover, records = InterfaceMover(journal, has_driver(where.sysfs), RdmaMover(where.sysfs)), journal.read()
    lines = [Line(f"interface of {one.device}", one.pod_name, one.before.name) for one in records.values()]
    return Leftover(lines, step(lambda: mover.give_back(records)))


def vf_properties(host: Host) -> Leftover:
    """Return the virtual functions that were set to what claims want."""
    where = host.where
    journal = VfPropertyJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    setter, records = VfSetter(journal, functools.cache(lambda: scan(where.sysfs, load_kinds()))), journal.read()
    lines = [Line(f"properties of {one.vf}", one.claim, "as before") for one in records.values()]
    return Leftover(lines, step(lambda: setter.give_back(records)))


def prepared(host: Host) -> Leftover:
    """Return the devices that third-party kinds prepared for claims."""
    where = host.where
    journal = KindsJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    records = journal.read()
    lines = [Line(f"device {id}", f"prepared by kind {one.kind}", "unprepared") for id, one in sorted(records.items())]

    def unprepare() -> Mapping[str, str]:
        if not records:
            return {}
        families = load_kinds()
        inventory = scan(where.sysfs, families)
        preparer = DevicePreparer(journal, families, lambda: inventory)
        return asyncio.run(preparer.undo(records.values()))

    return Leftover(lines, step(unprepare))


def targets(host: Host) -> Leftover:
    """Return the NVMe targets on the network that are connected for claims."""
    where = host.where
    records = FabricsJournal(where.state_dir, where.sysfs.text(BOOT_ID, "")).read()
    lines = [Line(f"target {one.port}", "connected", "disconnected") for one in records.values()]

    def disconnect() -> Mapping[str, str]:
        made = connector(where.sysfs, where.state_dir, where.sysfs.text(BOOT_ID, ""))
        return asyncio.run(made.disconnect({*records})) if records else {}

    return Leftover(lines, step(disconnect))


def dsa_queues(host: Host) -> Leftover:
    """Return the accelerators that are divided into work queues for claims."""
    where = host.where
    keeper = QueueKeeper(DsaJournal(where.state_dir, where.sysfs.text(BOOT_ID, "")), Accelerators(where.sysfs))
    try:
        records = keeper.records()
    except HostError as error:
        return Leftover(unread=str(error))
    lines = [Line(f"accelerator {address}", "divided into queues", "as before") for address in sorted(records)]

    def undo() -> Mapping[str, str]:
        left = keeper.take_down([(address, held.slot) for address, one in records.items() for held in one.held])
        return {**{f"{address} {slot}": why for (address, slot), why in left.items()}, **keeper.end()}

    return Leftover(lines, step(undo))


def virtual_functions(host: Host) -> Leftover:
    """Return notes on the virtual functions that the agent made: pods or the admin may use them by now."""
    where = host.where
    made = VfJournal(where.state_dir / state_files.VFS, where.sysfs.text(BOOT_ID, "")).read()
    path = where.sysfs.path("sys/bus/pci/devices")
    notes = [
        f"the {count} virtual functions of {pf} stay; 0 in {path}/{pf}/sriov_numvfs removes them"
        for pf, count in made.items()
    ]
    return Leftover(notes=notes)
