"""The cpuset of all pods, narrowed from outside: what is outside is not offered, granted or shared, it is said who
holds some of it, and it comes back.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.dra.cpu_pool import CPUS, INDIVIDUAL, NUMA_NODE, CpuPool
from nodeagent.core.dra.pool import ALL_FEATURES
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.offline import held_outside, lost_cpus, narrowed
from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.inventory import Inventory, PodsCgroup
from nodeagent.core.model.inventory_json import from_document, to_document
from nodeagent.core.model.options import FULL_PCPUS
from nodeagent.core.model.request import Request
from nodeagent.core.pinning.plan import Situation
from nodeagent.core.placement.place import place
from nodeagent.errors import InputError, Refused
from nodeagent.host.cgroup.pods_cpus import pods_cgroup
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory import scanner
from tests.builders.cgroup_tree import CgroupTree
from tests.builders.devices import DeviceTree
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.machines import machine
from tests.doubles.kubelet import FakeKubelet
from tests.doubles.runtime import PluginRefusedError
from tests.support.pin_node import pin_node
from tests.support.running import CPU, running
from tests.unit.state.test_agent import CPU as CPU_OFFER

ALL = "0-15"
SYSTEMD, CGROUPFS = "kubepods.slice", "kubepods"


# What is read


@pytest.fixture
def tree(tmp_path: Path) -> CgroupTree:
    return CgroupTree(tmp_path, cpus=ALL, mems="0")


def found(tree: CgroupTree, root: str = "/") -> tuple[str, str] | None:
    pods = pods_cgroup(SysFs(tree.root), root)
    return (pods.path, str(pods.cpus)) if pods is not None else None


@pytest.mark.parametrize(("root", "top"), [("/", SYSTEMD), ("/", CGROUPFS), ("/a-b", "a_b.slice/a_b-kubepods.slice")])
def test_pods_have_what_is_in_effect_in_their_cgroup(tree: CgroupTree, root: str, top: str) -> None:
    """Also where nothing is written in it, and where one above it is narrowed."""
    assert found(tree, root) is None
    tree.make(top)
    assert found(tree, root) == (top, ALL)
    tree.set(top, "cpuset.cpus", "2-9")
    assert found(tree, root) == (top, "2-9")
    tree.set(top, "cpuset.cpus", "")
    if "/" in top:
        tree.set(top.partition("/")[0], "cpuset.cpus", "4-7")
        assert found(tree, root) == (top, "4-7")


def test_cpus_that_are_let_through_to_partitions_are_had_by_pods(tree: CgroupTree) -> None:
    """They are in effect below, and not in kubepods any longer."""
    tree.make(SYSTEMD, cpuset__cpus="2-9", cpuset__cpus__exclusive="4-5")
    (tree.mount / SYSTEMD / "cpuset.cpus.effective").write_text("2-3,6-9\n")
    assert found(tree) == (SYSTEMD, "2-9")


def test_of_two_cgroups_the_one_that_is_used_counts(tree: CgroupTree) -> None:
    """A node that changed its cgroup driver has both; both count while neither is used."""
    tree.make(CGROUPFS, cpuset__cpus="0-7")
    tree.make(SYSTEMD, cpuset__cpus="6-9")
    (tree.mount / CGROUPFS / "cgroup.events").write_text("populated 0\n")
    assert found(tree) == (SYSTEMD, "6-9")
    (tree.mount / SYSTEMD / "cgroup.events").write_text("populated 0\n")
    assert found(tree) == (f"{SYSTEMD}, {CGROUPFS}", "0-9")


def test_without_cgroup_v2_or_its_cpusets_nothing_bounds_pods(tree: CgroupTree, tmp_path: Path) -> None:
    for file in tree.make(SYSTEMD).glob("cpuset.*"):
        file.unlink()
    assert found(tree) is None
    (tmp_path / "old/sys/fs/cgroup/cpuset/kubepods").mkdir(parents=True)
    assert pods_cgroup(SysFs(tmp_path / "old")) is None


def test_what_cannot_be_read_stays_as_it_was_known(tree: CgroupTree) -> None:
    """It is among the inventory's warnings; no pod is given CPUs for that."""
    tree.make(SYSTEMD)
    (tree.mount / SYSTEMD / "cpuset.cpus.effective").write_text("many\n")
    known = PodsCgroup(path=SYSTEMD, cpus=CpuSet.parse("2-9"))
    inventory = scan(SysFs(tree.root), [], cgroup_root="/", known=known)
    assert inventory.pods_cgroup == known
    assert any("cpuset.cpus.effective: 'many' is not a list" in one for one in inventory.warnings)


# The rule


def bounded(cpus: str | CpuSet, threads: int = 2) -> Inventory:
    """16 CPUs on two NUMA nodes, siblings side by side."""
    some = CpuSet.parse(cpus) if isinstance(cpus, str) else cpus
    whole = inventory_of(even_rows(1, 2, 1, 8 // threads, threads, adjacent=True))
    return replace(whole, pods_cgroup=PodsCgroup(path=SYSTEMD, cpus=some))


def grant(id: str, cpus: CpuSet, api: str = DEVICE_PLUGIN) -> Grant:
    if api == CLAIM:
        result = Result(request="r", driver="d", pool="n/cpu", device="numa0")
        return Grant(id=id, holder=Holder(api=CLAIM, namespace="ns", claim=id, uid=id), cpus=cpus, result=result)
    return Grant(id=id, holder=Holder(api=api, resource="r"), ids=tuple(f"cpu{one}" for one in cpus), cpus=cpus)


def ledger(*grants: Grant, reserved: CpuSet = EMPTY) -> Ledger:
    return Ledger(grants=MappingProxyType({one.id: one for one in grants}), reserved=reserved)


sets = st.sets(st.integers(0, 15)).map(CpuSet)


@given(sets, sets, sets)
def test_nothing_outside_is_offered_granted_or_shared_and_all_that_is_inside_is(
    bound: CpuSet, reserved: CpuSet, held: CpuSet
) -> None:
    """By every way to CPUs; plain set arithmetic says what is to be had."""
    inventory, books = bounded(bound), ledger(grant("g", held - reserved), reserved=reserved)
    mine = held - reserved
    free = (bound & CpuSet.parse(ALL)) - reserved - mine
    resource = CpuResource(name="r")
    shown = resource.advertised(inventory, books, NO_HEALTH)
    assert {one.id for one in shown if one.healthy} == {f"cpu{one}" for one in free | (mine & bound)}
    assert all(one.reason for one in shown if not one.healthy)
    for group in (NUMA_NODE, INDIVIDUAL):
        devices = CpuPool(group=group).pool(inventory, books, NO_HEALTH, ALL_FEATURES).devices
        untainted = [one for one in devices if not one.taints]
        offered = sum(one.capacity[CPUS].value if one.capacity else 1 for one in untainted)
        assert offered == len(free)
    assert Situation(inventory=inventory, ledger=books).shared <= bound
    if free:
        assert place(inventory, books, Request(cpus=len(free))).cpus == free
    with pytest.raises(Refused):
        place(inventory, books, Request(cpus=len(free) + 1))


def test_a_core_with_a_thread_outside_is_not_whole() -> None:
    """The host may run there."""
    inventory, whole = bounded("1-6"), frozenset({FULL_PCPUS})
    assert place(inventory, ledger(), Request(cpus=4, options=whole)).cpus == CpuSet.parse("2-5")
    with pytest.raises(Refused):
        place(inventory, ledger(), Request(cpus=6, options=whole))
    (pool,) = CpuPool(options=whole).pool(inventory, ledger(), NO_HEALTH, ALL_FEATURES).devices
    assert pool.capacity[CPUS].value == 4


def test_an_id_outside_is_refused_with_the_reason() -> None:
    why = "cannot allocate CPUs 12 of r: outside the cpuset of kubepods.slice, which has 2-9"
    with pytest.raises(InputError, match=why):
        CpuResource(name="r").parts(bounded("2-9"), ["cpu3", "cpu12"])


def test_who_holds_cpus_outside_is_named_and_the_reason_has_the_cgroup() -> None:
    """Reserved CPUs outside are not reported."""
    some = [grant("c", CpuSet.parse("8-10"), CLAIM), grant("d", CpuSet.parse("2,12"))]
    books, where = ledger(*some, reserved=CpuSet([0, 1])), "outside the cpuset of kubepods.slice, which has 2-9"
    assert lost_cpus(bounded("2-9"), books) == {("n/cpu", "numa0"): f"{where}: CPU 10 of claim ns/c"}
    said = f"CPU 10 of claim ns/c, CPU 12 of a container not yet listed (r): {where}"
    assert held_outside(bounded("2-9"), books) == said
    assert narrowed(bounded("2-9"), books) == f"CPUs 10-15 are not offered: {where}"
    assert (held_outside(bounded("2-15"), books), narrowed(bounded("2-15"), books)) == ("", "")


def test_an_inventory_on_paper_keeps_what_pods_can_have() -> None:
    known = bounded("2-9")
    read = from_document(json.dumps(to_document(known)), source="x")
    assert read.pods_cgroup == known.pods_cgroup and read.cpus_usable == CpuSet.parse("2-9")


# On a node


async def test_cpus_that_kubepods_loses_are_lost_and_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No restart, and no drift: who holds them keeps the rest, all others move with what is left."""
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.admit("lost", "main", "cpu12")
        for pod in ("db", "lost", "web"):
            await node.run(pod, "main")
        node.tree.set("kubepods", "cpuset.cpus", "0-4,6-9")
        await node.until(lambda: node.shared == "1-3,6-9")
        await node.until(lambda: node.tree.effective(node.path("db", "main")) == "4")
        # The kernel would give it all that its pod has; none of that is anybody's.
        await node.until(lambda: node.tree.effective(node.path("lost", "main")) == "1-3,6-9")
        assert node.tree.effective(node.path("web", "main")) == "1-3,6-9"
        shown = {one["pod"]: (one["lost_cpus"], one["outside_cpus"]) for one in node.pins.document()["pinned"]}
        assert shown == {"db": ("5", "5"), "lost": ("12", "12")}
        (why,) = node.pins.not_ready()
        assert why.startswith("pinning: CPU ")
        assert why.endswith(": outside the cpuset of kubepods, which has 0-4,6-9")
        assert node.pins.notes() == [
            "pinning: CPUs 5,10-15 are not offered: outside the cpuset of kubepods, which has 0-4,6-9"
        ]
        ids = {one.id: one for one in node.agent.advertised(CPU_OFFER.resource)}
        assert (ids["cpu5"].healthy, ids["cpu12"].healthy, ids["cpu9"].healthy) == (False, False, True)
        node.tree.set("kubepods", "cpuset.cpus", "")
        await node.until(lambda: node.tree.effective(node.path("lost", "main")) == "12")
        await node.until(lambda: node.tree.effective(node.path("db", "main")) == "4-5")
        assert node.tree.effective(node.path("web", "main")) == "1-3,6-11,13-15"
        # The kernel gives all this back by itself, before the agent has seen it.
        await node.until(lambda: node.pins.not_ready() == node.pins.notes() == [])
        assert node.pins.document()["drifts_not_repaired"] == 0


async def test_a_cpu_that_has_just_come_online_is_not_outside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel changes cpusets a moment after it has told of the CPU; one that stays outside is."""
    looks = [bounded("0-11", 1), bounded(ALL, 1), bounded("0-11", 1), bounded("0-11", 1)]
    outside: list[str] = []
    async with pin_node(folder, monkeypatch, connected=False, mode="off") as node:
        monkeypatch.setattr(scanner, "scan", lambda *_, **__: looks.pop(0))
        watched = scanner.InventoryScanner(node.agent, SysFs(folder), [], folder / "state", Config)
        for _ in range(2):
            await watched.rescan()
            outside.append(str(node.agent.inventory.cpus_outside))
        await watched.close()
    assert outside == ["", "12-15"] and looks == []


async def test_a_container_whose_cpus_are_all_outside_is_not_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        node.tree.set("kubepods", "cpuset.cpus", "8-15")
        await node.until(lambda: node.shared == "8-15")
        with pytest.raises(PluginRefusedError, match="its CPUs 4-5 are outside the cpuset of kubepods, which has 8-15"):
            await node.create("db", "main")


async def test_where_nothing_is_left_for_others_that_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pin_node(folder, monkeypatch) as node:
        await node.admit("db", "main", "cpu4", "cpu5")
        await node.run("db", "main")
        node.tree.set("kubepods", "cpuset.cpus", "4-5")
        await node.until(lambda: node.shared == "")
        assert (
            "pinning: no CPU is left for pods without exclusive CPUs: they run on the exclusive CPUs of others"
            in node.pins.notes()
        )


async def test_kubelet_is_offered_what_pods_can_have_and_readyz_says_who_lost_what(
    folder: Path, tmp_path: Path
) -> None:
    """The whole agent, where control groups can only be read."""
    made = DeviceTree(machine(tmp_path / "root", "1s2n4c-smt"))
    tree = CgroupTree(Path(made.root), cpus="0-7", mems="0-1")
    (tree.mount / "cgroup.procs").unlink()
    tree.make(SYSTEMD)
    options = {"resources": [{"name": "cpu", "kind": "cpu"}], "resyncSeconds": 0.1}
    async with FakeKubelet(folder / "kubelet") as kubelet, running(folder, root=made.root, **options) as agent:
        await kubelet.wait_allocatable(CPU, 8)
        await kubelet.admit_pod("default", "db", {"main": {CPU: 8}})
        await agent.until("/v1/grants", lambda grants: [one["pod"] for one in grants] == ["db"])
        await agent.ready()
        tree.set(SYSTEMD, "cpuset.cpus", "0-4")
        status = await agent.until("/v1/status", lambda status: any("outside" in one for one in status["not_ready"]))
        where = "outside the cpuset of kubepods.slice, which has 0-4"
        assert f"pinning: CPUs 5-7 of default/db/main: {where}" in status["not_ready"]
        assert status["inventory"]["cpus_outside"] == "5-7"
        await kubelet.wait_allocatable(CPU, 5)
        devices = (await agent.ask("/v1/devices"))[1]
        assert [one["reason"] for one in devices] == [""] * 5 + [where] * 3
        tree.set(SYSTEMD, "cpuset.cpus", "0-7")
        await kubelet.wait_allocatable(CPU, 8)
        await agent.ready()
