"""Everything that the agent leaves on a host, in one list, and how each is undone.

What stays, because it ends with its container or nothing tells whether it was the agent's: hugepage limits of
containers, controllers enabled for kubepods, folders of kubelet's. Pools of hugepages that were grown are reported.
Every call blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.partitions.instances import Record
from nodeagent.core.sharing.mps import DAEMONS as MPS_DAEMONS
from nodeagent.daemon.leftover import Host, Leftover, Line, kept_going
from nodeagent.daemon.paths import STATUS_SOCKET
from nodeagent.errors import HostError, PeerError
from nodeagent.host.blockio.keeper import IoKeeper
from nodeagent.host.cdi import CdiFolder, ClaimFiles
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.read import hierarchy
from nodeagent.host.cgroup.widen import CPUS, MEMS, Widener
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.driver_programs import DriverSearch
from nodeagent.host.irq.interrupts import Mover
from nodeagent.host.irq.journal import load
from nodeagent.host.nvidia_smi import NvidiaSmi
from nodeagent.host.resctrl.journal import load as load_resctrl
from nodeagent.host.resctrl.read import folder as group_folder
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs
from nodeagent.host.systemd.slice_drop_ins import SliceDropins
from nodeagent.host.systemd.units import SOCKET, Systemd, is_slice
from nodeagent.host.tuning.journal import load as load_tuned
from nodeagent.host.tuning.tuner import Tuner
from nodeagent.host.vfio import Functions
from nodeagent.kube.apiserver.lazy import LazyApi, is_configured
from nodeagent.kube.kubelet import device_plugin_sockets, plugin_sockets
from nodeagent.kube.resourceslice.render import Owner, belongs
from nodeagent.managers import state_files
from nodeagent.managers.deviceplugin.manager import PLUGINS
from nodeagent.managers.dra.manager import CLAIMS, node_name
from nodeagent.managers.hugepages.journal import Grown, GrowthJournal
from nodeagent.managers.isolation.manager import MOVED
from nodeagent.managers.kinds.journal import KindsJournal
from nodeagent.managers.kinds.preparer import DevicePreparer
from nodeagent.managers.kubelet import look
from nodeagent.managers.kubelet_conflicts import confines_all
from nodeagent.managers.network.device_info import left_files
from nodeagent.managers.network.interface_journal import InterfaceJournal
from nodeagent.managers.network.interface_mover import InterfaceMover, has_driver
from nodeagent.managers.network.vf_journal import VfJournal
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal
from nodeagent.managers.network.vf_setter import VfSetter
from nodeagent.managers.partitions.amd_journal import AmdJournal
from nodeagent.managers.partitions.journal import PartitionJournal
from nodeagent.managers.passthrough.binder import Binder
from nodeagent.managers.passthrough.journal import PassthroughJournal
from nodeagent.managers.pinning.manager import UNITS
from nodeagent.managers.publish.journal import FILE, PublishJournal
from nodeagent.managers.publish.publications import LABELS, TOPOLOGY
from nodeagent.managers.resctrl.rounds import ResctrlRounds
from nodeagent.managers.sharing.journal import SharingJournal
from nodeagent.managers.sharing.mps_daemons import MpsDaemons
from nodeagent.managers.sharing.time_slices import TimeSlices
from nodeagent.managers.state_files import IO, RESCTRL, TUNING

STATE_FILES = (
    "ledger.*",
    "leader.lock",
    "interrupts.json",
    "hugepages.*",
    "health.*",
    "nvlinks.json",
    "gpu-faults.json",
    "published.json",
    "tuning.json",
    "resctrl.*",
    "io.json",
    "io.lock",
    "sharing.*",
    "partitions.*",
    "mig-modes.json",
    "amd-partitions.*",
    "passthrough.*",
    "vf-properties.*",
    "interfaces.*",
    "kinds.*",
    "device-info.json",
    "vfs.*",
    ".*.tmp",
)
"""Names in the state folder."""
_KUBELETS = "kubelet's own manager writes it, or is not known"


def leftovers(host: Host, *, purge: bool = False) -> Iterator[Leftover]:
    """Yield what is left on a host, in the order in which it has to be undone: undo each before the next is asked for.
    Raise HostError if some of it cannot be read. purge: the state folder too."""
    yield _drop_ins(host)
    yield _cgroups(host)
    yield _interrupts(host)
    yield _tuning(host)
    yield _resctrl(host)
    yield _io(host)
    yield _hugepages(host)
    yield shared_gpus(host)
    yield _instances(host)
    yield _prepared(host)
    yield amd_partitions(host)
    yield _vf_properties(host)
    yield _passthrough(host)
    yield _interfaces(host)
    yield _cdi_files(host)
    yield _claim_files(host)
    yield _device_info(host)
    yield _virtual_functions(host)
    yield _kubelet_sockets(host)
    yield _slices(host)
    yield published_objects(host)
    yield _runtime_folder(host)
    if purge:
        yield _state_folder(host)


# ---------------------------------------------------------------- confinement


def _drop_ins(host: Host) -> Leftover:
    folder = Path(host.where.sysfs.path(UNITS))
    every = [SliceDropins(folder, one) for one in layouts(host.config.pinning.cgroup_root)]
    found = dict.fromkeys(path for one in every for path in one.written())

    def undo() -> Iterator[str]:
        for one in every:
            with kept_going() as errors:
                one.keep(None, {})
            yield from errors

    lines = [Line(str(path)) for path in found]
    return Leftover(lines, undo, ["systemd forgets drop-ins at its next `systemctl daemon-reload`"] if lines else [])


def _cgroups(host: Host) -> Leftover:
    where, found = host.where, hierarchy(host.where.sysfs)
    if found.unsupported:
        return Leftover()
    kubelet = look(where.sysfs, where.kubelet_dir, host.config.kubelet_config)
    cpus, mems = not confines_all(kubelet), kubelet.memory is not None and not kubelet.memory.static
    widener = Widener(found.mount, host.config.pinning.cgroup_root, cpus=cpus, mems=mems)
    plan = widener.plan()
    slices = {one.path: CpuSet.parse(one.wanted) for one in plan if one.file == CPUS and is_slice(one.path)}

    def undo() -> Iterator[str]:
        yield from widener.undo()
        yield from _tell_systemd(host, slices)

    lines = [Line(f"{found.mount}/{one.path}/{one.file}", one.found, one.wanted) for one in plan]
    theirs = [file for file, ours in ((CPUS, cpus), (MEMS, mems)) if not ours]
    return Leftover(lines, undo, [f"{file} of containers stays as it is: {_KUBELETS}" for file in theirs])


def _tell_systemd(host: Host, slices: dict[str, CpuSet]) -> Iterator[str]:
    """Replace what systemd was told of slices, which it would write again at its next reload."""
    if not slices or not host.where.sysfs.exists(SOCKET):
        return
    with kept_going() as errors, contextlib.closing(Systemd(host.where.sysfs)) as systemd:
        for path, cpus in slices.items():
            systemd.allow(path.rpartition("/")[2], cpus)  # a refusal means that it does not know the slice
    yield from errors


def _interrupts(host: Host) -> Leftover:
    sysfs, memory = host.where.sysfs, host.where.state_dir / MOVED
    moved, unread = load(sysfs, memory)
    lines = [
        Line(sysfs.path(f"proc/irq/{irq}/smp_affinity_list"), str(one.seen), str(one.before))
        for irq, one in sorted(moved.items())
    ]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from Mover(sysfs, memory).move(EMPTY, EMPTY, ()).why.values()
        yield from errors

    return Leftover(lines, undo if not unread else lambda: [unread])


def _tuning(host: Host) -> Leftover:
    sysfs, memory = host.where.sysfs, host.where.state_dir / TUNING
    tuned, unread = load_tuned(sysfs, memory)
    lines = [Line(sysfs.path(path), one.seen or one.wanted, one.before) for path, one in tuned.items()]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from Tuner(sysfs, memory).tune({}).why.values()
        yield from errors

    return Leftover(lines, undo if not unread else lambda: [unread])


def _resctrl(host: Host) -> Leftover:
    """Return the groups of resctrl that were made, and the ways that the default group gave up."""
    sysfs, memory = host.where.sysfs, host.where.state_dir / RESCTRL
    journal, unread = load_resctrl(sysfs, memory)
    lines = [Line(sysfs.path(group_folder(name))) for name in sorted(journal.groups)]
    given = {domain: mask for some in journal.before.values() for domain, mask in some.items()}
    lines += [
        Line(f"ways of L3 {domain} of the default group", f"{mask & ~journal.aside.get(domain, 0):#x}", f"{mask:#x}")
        for domain, mask in sorted(given.items())
    ]

    def undo() -> Iterator[str]:
        report = ResctrlRounds(sysfs, memory).keep(None, (), {}, ended=True)
        yield from [report.error] if report.error else report.kept.errors.values()

    return Leftover(lines, undo if not unread else lambda: [unread])


def _io(host: Host) -> Leftover:
    """Return the limits of I/O that were set."""
    found = hierarchy(host.where.sysfs)
    if found.unsupported:
        return Leftover()
    where = layouts(host.config.pinning.cgroup_root)
    keeper = IoKeeper(host.where.sysfs, found.mount, where, host.where.state_dir / IO)
    held, unread = keeper.held()
    lines = [Line(f"{found.mount}/{one.path}/{one.file} of {one.number}", one.wanted, one.before) for one in held]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from keeper.keep({}).errors.values()
        yield from errors

    return Leftover(lines, undo if not unread else lambda: [unread])


def _hugepages(host: Host) -> Leftover:
    sysfs = host.where.sysfs
    grown = GrowthJournal(host.where.state_dir, sysfs.text(BOOT_ID, "")).read().values()
    return Leftover(notes=[_pool(sysfs, one) for one in grown])


def _pool(sysfs: SysFs, one: Grown) -> str:
    folder = f"sys/devices/system/node/node{one.node}/hugepages/hugepages-{one.page_bytes >> 10}kB"
    path = sysfs.path(f"{folder}/nr_hugepages")
    return f"{path} stays as it is: grown from {one.base_pages} to {one.grown_pages} pages for claims"


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


def _instances(host: Host) -> Leftover:
    """MIG instances that the agent made: pods may still use them, and destroying them is a command to the driver."""
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


def _passthrough(host: Host) -> Leftover:
    """Return the PCI functions that were bound to a VFIO driver for claims."""
    where = host.where
    journal = PassthroughJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    binder, records = Binder(journal, Functions(where.sysfs)), journal.read()
    lines = [Line(f"driver of {address}", one.driver, one.before) for address, one in sorted(records.items())]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from binder.give_back({one.claim for one in records.values()}).values()
        yield from errors

    return Leftover(lines, undo)


def _interfaces(host: Host) -> Leftover:
    """Return the network interfaces that were moved into pods."""
    where = host.where
    journal = InterfaceJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    mover, records = InterfaceMover(journal, has_driver(where.sysfs)), journal.read()
    lines = [Line(f"interface of {one.device}", one.pod_name, one.before.name) for one in records.values()]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from mover.give_back(records).values()
        yield from errors

    return Leftover(lines, undo)


def _vf_properties(host: Host) -> Leftover:
    """Return the virtual functions that were set to what claims want."""
    where = host.where
    journal = VfPropertyJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    setter, records = VfSetter(journal, functools.cache(lambda: scan(where.sysfs, load_kinds()))), journal.read()
    lines = [Line(f"properties of {one.vf}", one.claim, "as before") for one in records.values()]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            yield from setter.give_back(records).values()
        yield from errors

    return Leftover(lines, undo)


def _prepared(host: Host) -> Leftover:
    """Return the devices that third-party kinds prepared for claims."""
    where = host.where
    journal = KindsJournal(where.state_dir, where.sysfs.text(BOOT_ID, ""))
    records = journal.read()
    lines = [Line(f"device {id}", f"prepared by kind {one.kind}", "unprepared") for id, one in sorted(records.items())]

    def undo() -> Iterator[str]:
        with kept_going() as errors:
            if records:
                families = load_kinds()
                inventory = scan(where.sysfs, families)
                preparer = DevicePreparer(journal, families, lambda: inventory)
                yield from asyncio.run(preparer.undo(records.values())).values()
        yield from errors

    return Leftover(lines, undo)


# ---------------------------------------------------------------- the API server


def _slices(host: Host) -> Leftover:
    """Return the ResourceSlices of this driver and node, or the command that deletes them if they cannot be listed."""
    dra, node = host.config.dra, node_name(host.config)
    fields = f"spec.driver={dra.driver},spec.nodeName={node}"
    command = f"kubectl delete resourceslices --field-selector {fields}"
    if not is_configured(dra.kubeconfig):
        return Leftover(notes=[f"{command} deletes what was published, if it was"] if host.config.served_by_dra else [])
    try:
        found = asyncio.run(_published(dra.kubeconfig, Owner(driver=dra.driver, node_name=node)))
    except PeerError as error:
        return Leftover(notes=[f"{command} deletes what was published, if it was: {error}"])
    names = {str(one["metadata"]["name"]): str(one["metadata"]["uid"]) for one in found}
    return Leftover([Line(f"resourceslice {name}") for name in names], lambda: _delete(dra.kubeconfig, names))


def published_objects(host: Host) -> Leftover:
    """Return the commands that remove what was published of the machine."""
    try:
        found = PublishJournal(host.where.state_dir / FILE).read()
    except HostError as error:
        return Leftover(notes=[str(error)])
    node, domain = node_name(host.config), host.config.domain
    commands = {
        LABELS: f"kubectl label node {node} with each label that starts with {domain}/ and a - after it",
        TOPOLOGY: f"kubectl delete noderesourcetopology {node}",
    }
    return Leftover(notes=[f"{commands[key]} removes what {key} published" for key in sorted(found & commands.keys())])


async def _published(kubeconfig: str, owner: Owner) -> list[dict[str, Any]]:
    async with _api(kubeconfig) as api:
        return [one for one in map(dict, await api.slices_of(owner.node_name)) if belongs(one, owner)]


def _delete(kubeconfig: str, names: Mapping[str, str]) -> list[str]:
    """Delete slices, UIDs by name. Return why some stay."""
    try:
        asyncio.run(_deleted(kubeconfig, names))
    except PeerError as error:
        return [str(error)]
    return []


async def _deleted(kubeconfig: str, names: Mapping[str, str]) -> None:
    from nodeagent.kube.apiserver.client import SLICES

    async with _api(kubeconfig) as api:
        for name, uid in names.items():
            await api.delete(SLICES, name, uid=uid)


@contextlib.asynccontextmanager
async def _api(kubeconfig: str) -> AsyncIterator[LazyApi]:
    api = LazyApi(kubeconfig)
    try:
        yield api
    finally:
        await api.close()


# ---------------------------------------------------------------- files


def _cdi_files(host: Host) -> Leftover:
    dra = host.config.dra
    return _removed(CdiFolder(Path(dra.cdi_dir), dra.driver, host.where.sysfs).orphans(()))


def _claim_files(host: Host) -> Leftover:
    folder = host.where.runtime_dir / CLAIMS
    claims = ClaimFiles(folder)
    paths = [claims.path(uid).parent for uid in sorted(claims.uids())]
    return _removed(paths, files.remove_folder)


def _device_info(host: Host) -> Leftover:
    """Return the device information files of adapters."""
    memory = host.where.state_dir / state_files.DEVICE_INFO
    try:
        return _removed(left_files(memory))
    except HostError as error:
        return Leftover(notes=[str(error)])


def _virtual_functions(host: Host) -> Leftover:
    """Virtual functions that the agent made: pods or the admin may use them by now."""
    where = host.where
    made = VfJournal(where.state_dir / state_files.VFS, where.sysfs.text(BOOT_ID, "")).read()
    path = where.sysfs.path("sys/bus/pci/devices")
    notes = [
        f"the {count} virtual functions of {pf} stay; 0 in {path}/{pf}/sriov_numvfs removes them"
        for pf, count in made.items()
    ]
    return Leftover(notes=notes)


def _kubelet_sockets(host: Host) -> Leftover:
    """Return the sockets that no process serves: those of an agent that still runs are its own to remove."""
    folder, driver = host.where.kubelet_dir, host.config.dra.driver
    every = device_plugin_sockets.dead_sockets(folder / PLUGINS), plugin_sockets.dead_sockets(folder, driver)
    return _with_folder(folder / plugin_sockets.PLUGINS / driver, [path for some in every for path in some])


def _runtime_folder(host: Host) -> Leftover:
    folder = host.where.runtime_dir
    return _with_folder(
        folder, [path for path in (folder / STATUS_SOCKET, folder / CLAIMS, folder / MPS_DAEMONS) if path.exists()]
    )


def _state_folder(host: Host) -> Leftover:
    """Return the ledger and what else is the agent's in its folder; the folder only if nothing else is in it."""
    folder = host.where.state_dir
    return _with_folder(folder, sorted({path for name in STATE_FILES for path in folder.glob(name)}))


def _with_folder(folder: Path, paths: Sequence[Path]) -> Leftover:
    """Return some files and the folder of the agent's that is removed with them, if nothing else is in it."""
    every = [*paths, *([folder] if folder.is_dir() and not {*folder.iterdir()} - {*paths} else ())]
    return _removed(every, _remove_one)


def _remove_one(path: Path) -> object:
    return files.remove_folder(path) if path.is_dir() else files.remove(path)


def _removed(paths: Sequence[Path], remove: Callable[[Path], object] = files.remove) -> Leftover:
    def undo() -> Iterator[str]:
        for path in paths:
            with kept_going() as errors:
                remove(path)
            yield from errors

    return Leftover([Line(str(path)) for path in paths], undo)
