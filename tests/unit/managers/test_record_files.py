"""Every file that records what the agent has changed is read and written as by earlier versions, and what is wrong with
it is reported. What happens over time: `test_journal.py`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from structlog.testing import capture_logs

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import ContainerEdits
from nodeagent.core.network.vf_checks import VfPlace
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.core.partitions.amd import AmdRecord
from nodeagent.core.partitions.instances import Record as Instance
from nodeagent.errors import HostError
from nodeagent.host.blockio.keeper import IoKeeper
from nodeagent.host.cgroup import line_journal
from nodeagent.host.cgroup.line_keeper import LineKeeper
from nodeagent.host.irq import journal as irq
from nodeagent.host.netlink.interfaces import Link
from nodeagent.host.resctrl import journal as resctrl
from nodeagent.host.sysfs.record_file import set_aside
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs
from nodeagent.host.tuning import journal as tuning
from nodeagent.host.uclamp.keeper import UclampKeeper
from nodeagent.managers.hugepages.journal import Grown, GrowthJournal
from nodeagent.managers.journal import Journal
from nodeagent.managers.kinds.journal import KindsJournal
from nodeagent.managers.kinds.journal import Record as Prepared
from nodeagent.managers.network.interface_journal import InterfaceJournal, Moved
from nodeagent.managers.network.vf_journal import VfJournal
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal, VfSet
from nodeagent.managers.partitions.amd_journal import AmdJournal
from nodeagent.managers.partitions.journal import PartitionJournal
from nodeagent.managers.partitions.modes import SwitchedGpus
from nodeagent.managers.passthrough.journal import Bound, PassthroughJournal
from nodeagent.managers.publish.journal import PublishJournal
from nodeagent.managers.sharing.journal import DaemonRecord, SharingJournal, SliceRecord, Stage

LIMIT_S = 60.0
Read = Callable[[Path, str], tuple[object, str]]
"""Returns what is recorded in a state folder on a boot, and what is reported of it."""


class User(NamedTuple):
    """One file, as every version of the agent has written it, and what writes and reads it now."""

    content: Any
    records: object
    write: Callable[[Path, str], object]
    """Records the same in a state folder on a boot."""
    read: Read
    left: str
    """What is reported to stay as it is where the file cannot be read."""
    strict: bool = False
    """Whether it refuses fields that it does not know."""
    lasting: bool = False
    """Whether it counts after a reboot."""
    mode: int = 0o600


def of_manager(
    make: Callable[[Path, str], Journal[Any, Any, Any]], event: str, content: Any, records: Any, left: str
) -> User:
    def read(folder: Path, boot_id: str) -> tuple[object, str]:
        with capture_logs() as logs:
            found = make(folder, boot_id).read()
        assert {(one["event"], one["log_level"]) for one in logs} <= {(event, "error")}
        return found, " ".join(f"{one['error']}; {one['left']}" for one in logs)

    return User(content, records, lambda folder, boot: make(folder, boot).keep(records), read, left)


def of_host(module: Any, name: str, content: Any, records: Any, left: str) -> User:
    """records: what is recorded; a mapping is given to the module by its values."""
    given = records.values() if isinstance(records, Mapping) else records

    def write(folder: Path, boot_id: str) -> None:
        module.save(booted(folder, boot_id), folder / name, given)

    return User(
        content,
        records,
        write,
        lambda folder, boot: module.load(booted(folder, boot), folder / name),
        left,
        strict=True,
    )


def of_lines(keeper: type[LineKeeper], name: str, content: Any, records: Any, left: str) -> User:
    """Lines of cgroups' files, which one keeper reads."""

    def read(folder: Path, boot_id: str) -> tuple[object, str]:
        return keeper(booted(folder, boot_id), "", (), folder / name).held()

    def write(folder: Path, boot_id: str) -> None:
        line_journal.save(booted(folder, boot_id), folder / name, records)

    return User(content, records, write, read, left, strict=True)


def booted(folder: Path, boot_id: str) -> SysFs:
    """Return a machine on this boot."""
    file = folder / "root" / BOOT_ID
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{boot_id}\n")
    return SysFs(folder / "root")


def of_names(make: Callable[[Path], Any], content: Any, name: str, note: Mapping[str, bool]) -> User:
    """Names in a file whose reader raises what is wrong with it."""

    def read(folder: Path, boot_id: str) -> tuple[object, str]:
        try:
            return make(folder).read(), ""
        except HostError as error:
            return frozenset(), str(error)

    def write(folder: Path, boot_id: str) -> None:
        make(folder).note(name, **note)

    return User(content, frozenset({name}), write, read, "", lasting=True, mode=0o644)


NVME, NIC, GPU, MIG = "0000:3b:00.0", "0000:3b:00.1", "0000:05:00.0", "0000:9b:00.0/mig-3g.40gb-4"
LINK = {"index": 4, "name": "eth1", "hardware_address": "", "mtu": 1500, "up": False, "alias": "", "kind": ""}
NO_MASTER = {"parent": "", "port": "", "master": 0, "lower": 0}
MOVED = {"device": NIC, "claim": "u1", "pod": "p1", "pod_name": "default/a", "sandbox": "s1", "name": "net1"}
EDITS = {"env": {"TOY": "a"}, "device_nodes": [], "mounts": [], "annotations": {}, "cdi_devices": [], "hooks": []}
PREPARED = {"device": "toy-a", "kind": "toy", "claim": "u1", "grant": "g1", "settings": "", "boot_id": "boot"}
DAEMON = {"name": "m1", "stage": "running", "uuids": ["GPU-0"], "pid": 7, "start_ticks": 9, "threads_percent": 50}
SLICE = {"device": GPU, "uuid": "GPU-0", "before": "Medium", "interval": "Short"}
INSTANCE = {"partition": MIG, "gpu": "GPU-0", "profile": 9, "start": 4, "size": 4, "boot_id": "boot"}
ENDS = {"gi": 2, "ci": 0, "uuid": "MIG-1"}
VF_PLACE = {"pf": NVME, "interface": "eth0", "index": 2}
VF_WANTED, VF_BEFORE = {"vlan": 7, "trust": True}, {"vlan": 0, "trust": False}
GROWN = {"node": 0, "page_bytes": 2097152, "base_pages": 8, "grown_pages": 20, "boot_id": "boot"}
AMD = {"binding": "17", "before": "SPX", "requested": "NPS4", "told": True}
TUNED = {"path": "sys/x", "before": "powersave", "wanted": "performance", "seen": "performance"}
LINE = {"path": "kubepods/a", "file": "io.max", "number": "8:0", "wanted": "rbps=1", "before": ""}
CLAMP = {"path": "kubepods", "file": "cpu.uclamp.min", "number": "", "wanted": "50.00", "before": "0.00", "earlier": []}
IRQ = {"irq": 27, "name": "eth0", "before": "0-3", "wanted": "2-3", "seen": "2-3"}
running = DaemonRecord(**{**DAEMON, "stage": Stage.RUNNING, "uuids": ("GPU-0",)}, memory_mib={0: 1024})
moved_irq = irq.Moved(
    irq=27, name="eth0", before=CpuSet.parse("0-3"), wanted=CpuSet.parse("2-3"), seen=CpuSet.parse("2-3")
)
prepared = {"edits": ContainerEdits(env={"TOY": "a"}), "attributes": {"size": 2}}
groups = {"groups": {"nodeagent-a": resctrl.GroupRecord(schemata={"L3": {0: 3}})}, "before": {"L3": {0: 4095}}}

USERS = {
    "passthrough.json": of_manager(
        PassthroughJournal,
        "passthrough-records-unreadable",
        {
            "boot_id": "boot",
            "bound": [bound := {"address": NVME, "claim": "u1", "driver": "v", "before": "nvme", "override": ""}],
        },
        {NVME: Bound(**bound)},
        "functions stay bound to the drivers that they have",
    ),
    "kinds.json": of_manager(
        KindsJournal,
        "kinds-records-unreadable",
        {
            "records": [
                {
                    **PREPARED,
                    "edits": EDITS,
                    "pci_address": None,
                    "paths": [],
                    "parent": None,
                    "attributes": {"size": 2},
                }
            ]
        },
        {"toy-a": Prepared(**PREPARED, **prepared)},
        "devices stay as their kinds have prepared them",
    )._replace(lasting=True),
    "interfaces.json": of_manager(
        InterfaceJournal,
        "interface-records-unreadable",
        {
            "boot_id": "boot",
            "moved": [
                {
                    **MOVED,
                    "namespaces": ["/run/netns/a"],
                    "before": LINK | NO_MASTER,
                    "addresses": ["192.0.2.7/24"],
                    "rdma": [],
                }
            ],
        },
        {NIC: Moved(**MOVED, namespaces=("/run/netns/a",), before=Link(**LINK), addresses=("192.0.2.7/24",))},
        "interfaces stay in their pods until these end",
    ),
    "vfs.json": of_manager(
        lambda folder, boot: VfJournal(folder / "vfs.json", boot),
        "virtual-functions-records-unreadable",
        {"boot_id": "boot", "made": {NVME: 4}},
        {NVME: 4},
        "virtual functions stay",
    ),
    "vf-properties.json": of_manager(
        VfPropertyJournal,
        "vf-properties-records-unreadable",
        {
            "boot_id": "boot",
            "set": [{"vf": NIC, "claim": "u1", "place": VF_PLACE, "wanted": VF_WANTED, "before": VF_BEFORE}],
        },
        {
            NIC: VfSet(
                vf=NIC,
                claim="u1",
                place=VfPlace(**VF_PLACE),
                wanted=VfProperties(**VF_WANTED),
                before=VfProperties(**VF_BEFORE),
            )
        },
        "virtual functions keep the properties that they have",
    ),
    "amd-partitions.json": of_manager(
        lambda folder, boot: AmdJournal(folder / "amd-partitions.json", boot),
        "amd-partition-records-unreadable",
        {"boot_id": "boot", "gpus": {GPU: {**AMD, "ours": ["CPX"]}}},
        {GPU: AmdRecord(**AMD, ours=("CPX",))},
        "partitions of GPUs stay",
    ),
    "partitions.json": of_manager(
        PartitionJournal,
        "partition-records-unreadable",
        [INSTANCE | ENDS],
        {MIG: Instance(**INSTANCE, **ENDS)},
        "MIG instances that were made for claims stay as they are",
    ),
    "hugepages.json": of_manager(
        GrowthJournal,
        "page-records-unreadable",
        [GROWN],
        {(0, 2097152): Grown(**GROWN)},
        "pools that were grown stay as they are",
    ),
    "sharing.json": of_manager(
        SharingJournal,
        "sharing-records-unreadable",
        {"boot_id": "boot", "daemons": [{**DAEMON, "memory_mib": {"0": 1024}}], "slices": [SLICE]},
        {one.key: one for one in (running, SliceRecord(**SLICE))},
        "time slices that were changed stay as they are",
    ),
    "tuning.json": of_host(
        tuning,
        "tuning.json",
        {"version": 1, "boot_id": "boot", "tuned": [TUNED]},
        {"sys/x": tuning.Tuned(**TUNED)},
        "CPUs that were tuned before stay as they are",
    ),
    "io.json": of_lines(
        IoKeeper,
        "io.json",
        {"version": 1, "boot_id": "boot", "lines": [{**LINE, "earlier": ["rbps=2"]}]},
        [line_journal.CgroupLine(**LINE, earlier=("rbps=2",))],
        "limits of I/O that were set before stay as they are",
    ),
    "uclamp.json": of_lines(
        UclampKeeper,
        "uclamp.json",
        {"version": 1, "boot_id": "boot", "lines": [CLAMP]},
        [line_journal.CgroupLine(**{**CLAMP, "earlier": ()})],
        "utilization clamps that were set before stay as they are",
    ),
    "irq.json": of_host(
        irq,
        "irq.json",
        {"version": 1, "boot_id": "boot", "moved": [IRQ]},
        {27: moved_irq},
        "interrupts that were moved before stay where they are",
    ),
    "resctrl.json": of_host(
        resctrl,
        "resctrl.json",
        {
            "version": 1,
            "boot_id": "boot",
            "groups": {"nodeagent-a": {"schemata": {"L3": {"0": 3}}, "exclusive": False}},
            "aside": {"0": 3},
            "earlier": [],
            "before": {"L3": {"0": 4095}},
        },
        resctrl.Journal(boot_id="boot", aside={0: 3}, **groups),
        "groups of resctrl that were made before stay as they are",
    ),
    "published.json": of_names(
        lambda folder: PublishJournal(folder / "published.json"),
        {"published": ["publish.nodeLabels"], "version": 1},
        "publish.nodeLabels",
        {"published": True},
    ),
    "mig-modes.json": of_names(SwitchedGpus, ["GPU-0"], "GPU-0", {"switched": True}),
}
every_file = pytest.mark.parametrize("name", USERS)


@every_file
def test_a_file_is_written_as_by_earlier_versions(tmp_path: Path, name: str) -> None:
    USERS[name].write(tmp_path, "boot")
    file = tmp_path / name
    assert (json.loads(file.read_text()), file.stat().st_mode & 0o777) == (USERS[name].content, USERS[name].mode)


@every_file
def test_a_file_of_earlier_versions_is_read_and_counts_on_its_boot(tmp_path: Path, name: str) -> None:
    one = USERS[name]
    (tmp_path / name).write_text(json.dumps(one.content))
    assert one.read(tmp_path, "boot") == (one.records, "")
    found, why = one.read(tmp_path, "another boot")
    assert (found == one.records, why) == (one.lasting, "")


@every_file
@pytest.mark.parametrize("content", [b"", b"{", b"[null]", b"\xff\xfe", b"7", b'[{"node": 0}]', b'"', None])
def test_a_damaged_file_counts_as_empty_and_this_is_reported(tmp_path: Path, name: str, content: bytes | None) -> None:
    """Also one that cannot be opened, as it is a folder."""
    one, file = USERS[name], tmp_path / name
    nothing, why = one.read(tmp_path, "boot")
    assert why == ""
    file.mkdir() if content is None else file.write_bytes(content)
    found, why = one.read(tmp_path, "boot")
    assert (found, found == one.records) == (nothing, False)
    assert why.startswith((f"cannot read {file}: ", f"cannot load {file}: ")) and why.endswith(one.left)


@every_file
@pytest.mark.parametrize("content", [b"", b"[null]", b"\xff\xfe"])
def test_a_damaged_file_is_kept(tmp_path: Path, name: str, content: bytes) -> None:
    """Set aside by what records next, or left where it is by what then does not record."""
    (tmp_path / name).write_bytes(content)
    with contextlib.suppress(HostError):
        USERS[name].write(tmp_path, "boot")
    places = [one for one in tmp_path.iterdir() if one.is_file() and one.read_bytes() == content]
    assert [one.name for one in places] in (set_aside(tmp_path), [name])
    if places[0].name != name:
        assert USERS[name].read(tmp_path, "boot") == (USERS[name].records, "")


@every_file
def test_of_two_agents_neither_sets_aside_what_the_other_has_just_recorded(tmp_path: Path, name: str) -> None:
    """Both find a damaged file. What one writes in its place is good."""
    (tmp_path / name).write_bytes(b"{")
    with at_once(lambda: USERS[name].write(tmp_path, "boot")), contextlib.suppress(HostError):
        USERS[name].write(tmp_path, "boot")
    if aside := set_aside(tmp_path):
        assert [(tmp_path / one).read_bytes() for one in aside] == [b"{"]
        assert USERS[name].read(tmp_path, "boot") == (USERS[name].records, "")
    else:
        assert (tmp_path / name).read_bytes() == b"{"


@contextlib.contextmanager
def at_once(write: Callable[[], object]) -> Iterator[None]:
    """Another agent writes while a file is being set aside; as soon as it has done so, or waits, that goes on."""
    other, arrived, rename, lock = threading.Thread(), threading.Event(), Path.rename, fcntl.flock

    def written() -> None:
        with contextlib.suppress(HostError):
            write()
        arrived.set()

    def renamed(path: Path, target: Path) -> Path:
        nonlocal other
        if other.ident is None:
            other = threading.Thread(target=written)
            other.start()
            assert arrived.wait(LIMIT_S)
        return rename(path, target)

    def locked(handle: int, how: int) -> None:
        try:
            lock(handle, how)
        except BlockingIOError:
            arrived.set()
            raise

    with mock.patch.object(Path, "rename", renamed), mock.patch.object(fcntl, "flock", locked):
        yield
        if other.ident is not None:
            other.join(LIMIT_S)


@pytest.mark.parametrize("name", [one for one in USERS if one != "mig-modes.json"])
def test_a_file_of_a_newer_version_is_read_unless_it_is_strict(tmp_path: Path, name: str) -> None:
    """mig-modes.json is a list of plain names."""
    one, content = USERS[name], json.loads(json.dumps(USERS[name].content))
    (content[0] if isinstance(content, list) else content)["new"] = {"of": ["a", 1.5, None]}
    (tmp_path / name).write_text(json.dumps(content))
    found, why = one.read(tmp_path, "boot")
    assert (found == one.records, "new" in why and why.endswith(one.left)) == (not one.strict, one.strict)


@pytest.mark.parametrize("name", [name for name, one in USERS.items() if one.strict])
def test_a_strict_file_of_another_version_is_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({**USERS[name].content, "version": 2}))
    assert USERS[name].read(tmp_path, "boot")[1].startswith(f"cannot load {tmp_path / name}: Invalid enum value 2")


@every_file
def test_what_cannot_be_recorded_is_an_error(tmp_path: Path, name: str) -> None:
    """So that its caller does not act."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "in the way").write_text("")
    with pytest.raises(HostError, match=f"cannot (read|write) {tmp_path / name}: Is a directory"):
        USERS[name].write(tmp_path, "boot")
