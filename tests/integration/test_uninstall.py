"""`nodeagent uninstall` after a whole agent: what the agent left on the machine is gone, and nothing else.

The agent runs in this process, so that the control groups of a made-up machine answer it as the kernel does. Kubelet,
the API server and systemd are doubles on real sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.cli import main
from nodeagent.config.load import load
from nodeagent.config.schema import Config
from nodeagent.core.uclamp.clamps import Clamp
from nodeagent.daemon import daemon
from nodeagent.daemon.leftovers.cluster import published_objects
from nodeagent.daemon.leftovers.folders import STATE_FILES
from nodeagent.daemon.leftovers.leftover import Host
from nodeagent.daemon.paths import checked, paths_of
from nodeagent.host.blockio.keeper import IoKeeper
from nodeagent.host.cgroup import write
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.sysfs.atomic_file import DRAFT_END
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.tuning import tuner
from nodeagent.managers.cgroup_limits import Asking, Wanted
from nodeagent.managers.hugepages import journal
from nodeagent.managers.inventory import latches, nvlinks
from nodeagent.managers.isolation.manager import MOVED
from nodeagent.managers.publish import journal as published
from nodeagent.managers.state_files import TUNING
from nodeagent.managers.uclamp.rounds import UclampRounds
from nodeagent.state import leader, store
from nodeagent.state.leader import LOCK
from nodeagent.state.lock import FileLock
from tests.builders.cgroup_tree import CgroupTree
from tests.builders.io_files import IoDisks, add_disk
from tests.builders.machines import machine
from tests.doubles.api_server import FakeApiServer
from tests.doubles.cpufreq import Dead, FakeCpufreq
from tests.doubles.dra_kubelet import ClaimId, FakeDraKubelet
from tests.doubles.kubelet import FakeKubelet
from tests.doubles.systemd import FakeSystemd
from tests.support.dra_node import CPU, CPUS, DRIVER, NODE, QUICK, consumed
from tests.support.paths import CHECKOUT
from tests.support.resctrl_node import ResctrlNode, grant
from tests.support.until import until
from tests.unit.host.test_intruders import irq

OTHERS = "kubepods.slice/kubepods-podother.slice"
CONTAINER = f"{OTHERS}/cri-containerd-c1.scope"
CPUSETS = ("cpuset.cpus", "cpuset.mems")
"""Compared by what is in effect: with a process in a cgroup, they cannot be made empty again."""
JOURNALS = "ledger.db-"
"""Made by SQLite, also to read."""
WRITTEN = {
    "50-nodeagent.conf",
    "cpuset.cpus.effective",
    "smp_affinity_list",
    "pm_qos_resume_latency_us",
    "metadata.json",
    "ledger.db",
}
"""Names of files that are not as before while a claim is held."""
DONE, FAILED, REFUSED = 0, 1, 3


_STATE_NAME = re.compile(r'^[A-Z]+ = "([a-z-]+\.(?:json|lock))"$', re.MULTILINE)


@dataclass
class Site:
    """A machine with a kubelet, an API server and systemd, before and after an agent."""

    folder: Path
    cgroups: CgroupTree
    api: FakeApiServer
    kubelet: FakeKubelet
    dra: FakeDraKubelet
    systemd: FakeSystemd
    before: dict[str, str]

    @property
    def root(self) -> Path:
        return self.cgroups.root

    @property
    def words(self) -> list[str]:
        config = str(self.folder / "config.yaml")
        return ["--config", config, "--root", str(self.root), "--kubelet-dir", str(self.folder / "kubelet")]

    async def uninstall(self, *options: str) -> int:
        return await asyncio.to_thread(main, ["uninstall", *options, *self.words])

    def tree(self) -> dict[str, str]:
        """Every file with its content."""
        found = {}
        for top in (self.root, self.folder / "cdi", self.folder / "run", self.folder / "state"):
            for path in sorted(top.rglob("*")):
                if path.is_file() and path.name not in CPUSETS and not path.name.startswith(JOURNALS):
                    found[str(path)] = path.read_text(errors="replace").strip()
        return found

    def changed(self) -> set[str]:
        """The names of the files that are not as before."""
        now, before = self.tree(), self.before
        return {Path(path).name for path in now.keys() | before.keys() if now.get(path) != before.get(path)}


@contextlib.asynccontextmanager
async def site(
    folder: Path, monkeypatch: pytest.MonkeyPatch, io: IoDisks | None = None, uclamp: bool = False, **more: Any
) -> AsyncIterator[Site]:
    """8 CPUs on 2 NUMA nodes, a pod with a container, and an interrupt on all CPUs. io: the disks of the kernel.
    uclamp: whether it has utilization clamps."""
    root = machine(folder / "root", "1s2n4c-smt")
    cgroups = CgroupTree(root, cpus="0-7", mems="0-1", io=io, uclamp=uclamp)
    monkeypatch.setattr(write, "put", cgroups.put)
    monkeypatch.setattr(tuner, "put", FakeCpufreq(root, [(cpu,) for cpu in range(8)]).put)
    cgroups.make(CONTAINER)
    irq(root, 27, smp_affinity_list="2")
    (root / "run/systemd/system").mkdir(parents=True)
    async with (
        FakeApiServer() as api,
        FakeKubelet(folder / "kubelet") as kubelet,
        FakeDraKubelet(folder / "kubelet") as dra,
        FakeSystemd(root / "run/systemd/private") as systemd,
    ):
        api.add_node(NODE)
        access = {"kubeconfig": str(api.kubeconfig(folder)), "nodeName": NODE, "cdiDir": str(folder / "cdi")}
        pinning = {"mode": "cgroup", "moveInterrupts": True, "intrudersSeconds": 0.1, "tuning": {"wakeupLatencyUs": 0}}
        folders = {"stateDir": str(folder / "state"), "runtimeDir": str(folder / "run"), "reservedCpus": ""}
        config = {**folders, **QUICK, "resources": [CPUS], "dra": {**access, "spreadSeconds": 0}, "pinning": pinning}
        (folder / "config.yaml").write_text(json.dumps({**config, **more}))
        made = Site(folder, cgroups, api, kubelet, dra, systemd, {})
        made.before = made.tree()
        yield made


@contextlib.asynccontextmanager
async def agent(site: Site) -> AsyncIterator[None]:
    """An agent that has registered with kubelet; afterwards it is stopped."""
    file = site.folder / "config.yaml"
    config, stop = load(file), asyncio.Event()
    where = paths_of(config, config_file=file, root=str(site.root), kubelet_dir=str(site.folder / "kubelet"))
    built = await asyncio.to_thread(daemon.build, config, where, checked(config, where))
    running = asyncio.create_task(built.run(stop))
    try:
        await site.dra.wait_registered(DRIVER)
        await site.kubelet.wait_allocatable(CPU, 8)
        yield
    finally:
        stop.set()
        await running


async def busy(site: Site) -> ClaimId:
    """A claim holds CPU 2 and another one, so the pod and the interrupt have to leave them."""
    made = site.api.add_claim("c", results=[consumed("cpu", "numa1", cpus="2")])
    claim = ClaimId("default", "c", made["metadata"]["uid"])
    answers = await site.dra.prepare(DRIVER, [claim])
    assert answers[claim.uid].error == ""
    await until(lambda: [site.cgroups.effective(CONTAINER)] if site.cgroups.effective(CONTAINER) != "0-7" else [])
    await until(lambda: [1] if (site.root / "proc/irq/27/smp_affinity_list").read_text().strip() != "2" else [])
    return claim


def dead(path: Path) -> Path:
    """A socket that a killed agent left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return path


async def test_limits_of_io_are_taken_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with site(folder, monkeypatch, io=IoDisks({"8:0": ""})) as machine:
        add_disk(machine.root, "sda", "8:0")
        keeper = IoKeeper(SysFs(machine.root), str(machine.cgroups.mount), layouts(), folder / "state/io.json")
        line = "rbps=5 wbps=max riops=max wiops=max"
        assert not keeper.keep({CONTAINER: {"io.max": {"8:0": line}}}).errors
        assert machine.cgroups.text(CONTAINER, "io.max") == f"8:0 {line}"
        assert await machine.uninstall("--dry-run") == 0
        assert machine.cgroups.text(CONTAINER, "io.max") == f"8:0 {line}"
        assert await machine.uninstall() == 0
        assert machine.cgroups.text(CONTAINER, "io.max") == ""


async def test_utilization_clamps_are_given_back_in_the_cgroups_above_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with site(folder, monkeypatch, uclamp=True) as machine:
        rounds = UclampRounds(SysFs(machine.root), layouts(), folder / "state/uclamp.json")
        clamp = Clamp(min_hundredths=5000, max_hundredths=9000)
        asking = Asking(whose="it", path=CONTAINER, pod_path="", asks=(clamp,))
        assert not rounds.keep(Wanted(asking=(asking,)), lambda path: False).errors
        assert machine.cgroups.clamped(CONTAINER) == (512, 922)
        assert await machine.uninstall("--dry-run") == 0
        assert f"{CONTAINER}/cpu.uclamp.max: 90.00 -> max" in capsys.readouterr().out
        assert machine.cgroups.clamped(CONTAINER) == (512, 922)
        assert await machine.uninstall() == 0
        assert {machine.cgroups.text(one, "cpu.uclamp.min") for one in (CONTAINER, "kubepods.slice")} == {"0.00"}
        assert machine.cgroups.text(CONTAINER, "cpu.uclamp.max") == "max"
        assert not (folder / "state/uclamp.json").exists()


@pytest.mark.parametrize("step", [*range(10), None])
def test_groups_of_resctrl_are_removed_and_the_default_one_has_its_ways_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int | None
) -> None:
    """Whatever an agent had done when it was killed; groups of other programs stay. A dry run changes nothing."""
    node, words = divided(folder, monkeypatch)
    before = node.kernel.state()
    assert {*before} == {"", "theirs"}
    node.kernel.dies_after = step
    with contextlib.suppress(Dead):
        node.round(exclusiveWays=4, classes=[{"name": "batch", "caches": {"L3": 2}}])
    node.kernel.dies_after = None
    left = node.kernel.state()
    assert step is not None or node.own() == {"nodeagent-c1", "nodeagent-class-batch"}
    assert main(["uninstall", "--dry-run", *words]) == DONE
    assert node.kernel.state() == left
    shown = capsys.readouterr().out
    assert all(f"sys/fs/resctrl/{one}: removed" in shown for one in node.own())
    assert main(["uninstall", *words]) == DONE
    assert node.kernel.state() == before
    assert not node.memory.exists()


def test_what_another_program_has_made_of_the_default_group_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, words = divided(folder, monkeypatch)
    node.round(exclusiveWays=4)
    now = {0: 0x7, 1: node.masks()[1]}
    node.kernel.put(str(node.kernel.mount / "schemata"), node.kernel.line("L3", now))
    assert main(["uninstall", *words]) == DONE
    assert (node.masks(), node.own()) == ({0: 0x7, 1: 0xFFF}, set())


def test_groups_of_resctrl_stay_where_it_is_not_known_which_were_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node, words = divided(folder, monkeypatch)
    node.round(exclusiveWays=4)
    node.memory.write_text("{")
    left = node.kernel.state()
    assert main(["uninstall", *words]) == FAILED
    assert "groups of resctrl that were made before stay as they are" in capsys.readouterr().err
    assert node.kernel.state() == left


def divided(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ResctrlNode, list[str]]:
    """A machine with a group of another program and a claim that wants ways, and the command line's words for it."""
    root = folder / "root"
    node = ResctrlNode(root, monkeypatch)
    node.kernel.other("theirs", L3={0: 0x3, 1: 0x3})
    node.hold(grant("c1", "0-1", cache_ways=2))
    config = {"stateDir": str(node.memory.parent), "runtimeDir": str(folder / "run"), "resources": []}
    (folder / "config.yaml").write_text(json.dumps(config))
    words = ["--config", str(folder / "config.yaml"), "--root", str(root), "--kubelet-dir", str(folder / "kubelet")]
    return node, words


async def test_nothing_that_an_agent_wrote_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cgroups, systemd's drop-ins and its own record of slices, interrupts, files of claims, sockets, slices in the API
    server, the ledger. Files of other drivers stay."""
    other = folder / "cdi" / "nvidia.com-gpu.json"
    other.parent.mkdir()
    other.write_text("{}")
    async with site(folder, monkeypatch) as machine:
        async with contextlib.AsyncExitStack() as ending:
            await ending.enter_async_context(agent(machine))
            await busy(machine)
            await machine.api.until(lambda: bool(machine.api.slices(node=NODE)))
            await until(lambda: machine.changed() >= WRITTEN)
            async with machine.api.away():
                await ending.aclose()
        kubelet = folder / "kubelet"
        sockets = [dead(kubelet / "device-plugins" / "nodeagent-nodeagent.dev_cpu-0123abcd.sock")]
        sockets += [dead(kubelet / "plugins" / DRIVER / "dra.sock"), dead(folder / "run" / "status.sock")]
        foreign = dead(kubelet / "device-plugins" / "nvidia-gpu.sock")
        assert await machine.uninstall("--force", "--purge") == DONE
        assert machine.tree() == machine.before
        assert machine.api.slices(node=NODE) == []
        assert not [one for one in (*sockets, folder / "run", folder / "state") if one.exists()]
        assert not [one for one in kubelet.rglob("*") if "nodeagent" in one.name]
        assert foreign.exists() and other.exists()
        assert machine.systemd.told[-1] == ("kubepods-podother.slice", set(range(8)))
        assert await machine.uninstall("--purge") == DONE


async def test_it_is_refused_while_an_agent_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the agent answers on its socket, or only has the lock."""
    async with site(folder, monkeypatch) as machine:
        async with agent(machine):
            await until((folder / "run" / "status.sock").exists)
            assert await machine.uninstall("--force") == FAILED
            assert "an agent serves" in capsys.readouterr().err
        before = machine.tree()
        with contextlib.closing(FileLock(folder / "state" / LOCK)) as lead:
            assert lead.try_take()
            assert await machine.uninstall("--force") == FAILED
            assert machine.tree() == before
        assert f"cannot uninstall: an agent uses {folder}/state; stop it first" in capsys.readouterr().err


async def test_it_is_refused_while_a_claim_holds_something_and_a_dry_run_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The claim is known from the ledger, and without that from its files."""
    async with site(folder, monkeypatch) as machine:
        async with agent(machine):
            claim = await busy(machine)
        before = machine.tree()
        capsys.readouterr()
        assert await machine.uninstall("--dry-run") == REFUSED
        shown = capsys.readouterr()
        assert f"{machine.cgroups.mount}/{OTHERS}/cpuset.cpus: " in shown.out and " -> 0-7\n" in shown.out
        assert f"{machine.root}/proc/irq/27/smp_affinity_list: " in shown.out
        assert f"{folder}/cdi/{DRIVER}-claim_{claim.uid}.json: removed\n" in shown.out
        assert "would be refused: what the agent granted is held by claim default/c" in shown.err
        assert await machine.uninstall() == REFUSED
        assert machine.tree() == before
        for one in (folder / "state").glob("ledger.db*"):
            one.unlink()
        assert await machine.uninstall() == REFUSED
        assert f"claim {claim.uid}" in capsys.readouterr().err


async def test_the_ledger_stays_without_purge_and_slices_are_named_where_no_server_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with site(folder, monkeypatch) as machine:
        async with agent(machine):
            await busy(machine)
        capsys.readouterr()
        async with machine.api.away():
            assert await machine.uninstall("--force") == DONE
        command = f"kubectl delete resourceslices --field-selector spec.driver={DRIVER},spec.nodeName={NODE}"
        assert f"note: {command} deletes what was published" in capsys.readouterr().out
        assert (folder / "state" / "ledger.db").exists()
        assert machine.cgroups.effective(CONTAINER) == "0-7"


async def test_what_the_kernel_refuses_is_reported_and_the_rest_is_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with site(folder, monkeypatch) as machine:
        async with agent(machine):
            await busy(machine)
        machine.cgroups.refuses[f"{OTHERS}/cpuset.cpus"] = errno.EPERM
        assert await machine.uninstall("--force") == FAILED
        assert f"cannot write {machine.cgroups.mount}/{OTHERS}/cpuset.cpus" in capsys.readouterr().err
        assert (machine.root / "proc/irq/27/smp_affinity_list").read_text().strip() == "2"
        assert not [*(folder / "cdi").iterdir()]


def test_the_commands_that_remove_what_was_published_are_named(folder: Path) -> None:
    """An API server that is reached with the agent's credentials may no longer allow it."""
    config = msgspec.convert({"dra": {"nodeName": NODE}, "stateDir": str(folder)}, Config)
    host = Host(config=config, where=paths_of(config, config_file=None, root=str(folder), kubelet_dir=None))
    assert not published_objects(host).notes
    published.PublishJournal(folder / published.FILE).note("publish.nodeResourceTopology", published=True)
    (note,) = published_objects(host).notes
    assert note.startswith(f"kubectl delete noderesourcetopology {NODE} removes what publish.nodeResourceTopology")


def test_every_file_that_an_agent_may_have_in_its_state_folder_is_purged() -> None:
    """Also those that the agent of these tests has no reason to write: every name that the sources give to a file of
    state or to a lock."""
    sources = [*(CHECKOUT / "nodeagent" / "managers").rglob("*.py"), *(CHECKOUT / "nodeagent" / "state").rglob("*.py")]
    named = {name for one in sources for name in _STATE_NAME.findall(one.read_text())}
    assert named >= {MOVED, TUNING, journal.NAME, latches.FILE, nvlinks.FILE, published.FILE}
    ledger = (store.FILE, f"{store.FILE}-wal", f"{store.FILE}.damaged-1")
    locks = (leader.LOCK, leader.NEWS, store.LOCK, Path(latches.FILE).with_suffix(".lock").name)
    drafts = [f".{name}.x{DRAFT_END}" for name in named]
    damaged = [f"{name}.damaged-1" for name in named if name.endswith(".json")]
    for name in (*named, *ledger, *locks, *drafts, *damaged):
        assert [one for one in STATE_FILES if fnmatch(name, one)], name
