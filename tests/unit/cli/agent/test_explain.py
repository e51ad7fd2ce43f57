"""`nodeagent explain` on states that are hard to bring about with a running agent."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.cli.agent.explain.cpu import explain_cpu, print_cpu
from nodeagent.cli.agent.explain.device import explain_device
from nodeagent.cli.agent.explain.pod import explain_claim, explain_pod, print_holder
from nodeagent.cli.agent.explain.request import explain_request
from nodeagent.cli.shared.node_state import state_of
from nodeagent.core.ledger.exclusion import things_of
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Result
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import UNHEALTHY, HealthState
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages, Request
from nodeagent.errors import InputError
from nodeagent.state import audit
from nodeagent.state.audit import Refusal
from nodeagent.state.store import FILE, Store
from tests.builders.inventories import GIB, even_distances, even_rows, inventory_of
from tests.support.pages import facts_of

DEVICES = (
    Device(kind="gpu", id="gpu0", numa_node=0, paths=("/dev/nvidia0", "/dev/nvidiactl")),
    Device(kind="gpu", id="gpu0/mig0", numa_node=0, paths=("/dev/mig0",), parent="gpu0"),
    Device(kind="gpu", id="gpu1", numa_node=1, paths=("/dev/nvidia1",)),
)


@pytest.fixture
def machine() -> Inventory:
    """Two nodes of four CPUs and two pages each; two GPUs, of which the first has an instance."""
    pages = {(0, GIB): 2, (1, GIB): 2}
    return inventory_of(even_rows(2, 1, 1, 4, 1), distances=even_distances(2, 1), pages=pages, devices=DEVICES)


def container(id: str, pod: str, uid: str = "", **held: object) -> Grant:
    holder = Holder(api=DEVICE_PLUGIN, resource="nodeagent.dev/x", namespace="ns", pod=pod, container="main")
    return Grant(id=id, holder=holder, pods=(uid,) if uid else (), confirmed=True, **held)  # type: ignore[arg-type]


def ledger(*grants: Grant, reserved: str = "") -> Ledger:
    return Ledger(grants={one.id: one for one in grants}, reserved=CpuSet.parse(reserved))


def refuse(folder: Path, *refusals: Refusal) -> None:
    with (
        contextlib.closing(Store(folder / "state")),
        contextlib.closing(sqlite3.connect(folder / "state" / FILE)) as db,
    ):
        audit.add_refusals(db, refusals, op="op", at=1_799_999_000.0)
        db.commit()


def test_a_request_gets_neither_what_is_ill_nor_what_the_node_uses(tmp_path: Path) -> None:
    said = ({}, {"in_use": True}, {}, {"mig": True})
    gpus = [Device(kind="gpu", id=f"gpu{i}", paths=(f"/dev/nvidia{i}",), attributes=one) for i, one in enumerate(said)]
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[*gpus, Device(kind="gpu", id="gpu4")])
    state = state_of(facts_of(machine, Ledger(), tmp_path))
    ill = {"gpu0": HealthState(state=UNHEALTHY, since=0.0, reason="Xid 79")}
    state = replace(state, health=ill)
    found = explain_request(state, Request(devices={"gpu": 1}))
    assert found["placement"]["devices"] == ["gpu2"]
    assert found["not_counted"] == [
        "gpu0 is unhealthy: Xid 79",
        "gpu1 is in use by the node",
        "gpu4 is unknown: there is no device node to hand over",
    ]
    refused = explain_request(state, Request(devices={"gpu": 2}))["refused"]
    assert refused == "cannot place 2 devices of kind gpu: 1 of 4 are free (1 in use by the node, 2 not offered)"


def test_a_pod_is_explained_by_what_its_containers_and_claims_hold(machine: Inventory, tmp_path: Path) -> None:
    """The claim is found through the pod's UID; each part of the cost has its value here, now and on the empty node."""
    claim = Grant(
        id="c-0",
        holder=Holder(api=CLAIM, resource="cpu.d", namespace="ns", claim="c", uid="c"),
        cpus=CpuSet([4]),
        result=Result(request="r", driver="d", pool="n/cpu", device="numa1", consumed={"cpus": 1}),
        pods=("uid-a",),
    )
    pages = (Pages(node=0, page_bytes=GIB, pages=1),)
    grants = ledger(container("g1", "a", "uid-a", cpus=CpuSet([0, 5]), hugepages=pages), claim)
    facts = facts_of(machine, grants, tmp_path)
    found = explain_pod(facts, state_of(facts), "ns/a")
    assert [one["name"] for one in found["holds"]] == ["claim ns/c", "ns/a/main"]
    spread = {one["part"]: one for one in found["holds"][1]["cost"]}
    assert (spread["numa_nodes"]["value"], spread["numa_nodes"]["now"], spread["numa_nodes"]["on_empty"]) == (2, 1, 1)
    assert not found["holds"][1]["best_now"]
    assert found["holds"][0]["grants"][0]["allocated"] == "n/cpu/numa1 (cpus=1)"
    assert explain_claim(facts, state_of(facts), "ns/c")["pods"] == ["uid-a"]


def test_a_name_that_two_pods_have_is_one_clear_line(machine: Inventory, tmp_path: Path) -> None:
    """An old pod of a StatefulSet and its successor: the UIDs are named, and one of them can be asked for."""
    grants = ledger(container("g1", "a", "old", cpus=CpuSet([0])), container("g2", "a", "new", cpus=CpuSet([1])))
    facts = facts_of(machine, grants, tmp_path)
    with pytest.raises(InputError, match=r"cannot explain pod ns/a: 2 pods have that name: new \(g2\), old \(g1\)"):
        explain_pod(facts, state_of(facts), "ns/a")
    (unit,) = explain_pod(facts, state_of(facts), "ns/a", "new")["holds"]
    assert unit["grants"][0]["id"] == "g2"


def test_a_pod_that_was_refused_is_explained_by_the_audit(machine: Inventory, tmp_path: Path) -> None:
    """When and why, and who would have to end today."""
    grants = ledger(container("g1", "big", cpus=CpuSet([0, 1, 2])), container("g2", "small", cpus=CpuSet([3])))
    refuse(tmp_path, Refusal(holder="claim ns/c of late, other", want="n/cpu/numa0 (cpus=2)", why="cannot prepare"))
    facts = facts_of(machine, grants, tmp_path)
    found = explain_pod(facts, state_of(facts), "ns/late")
    assert not found["holds"]
    (refusal,) = found["refusals"]
    assert (refusal["at"], refusal["why"]) == (1_799_999_000.0, "cannot prepare")
    assert [one["pods"] for one in refusal["now"]["in_the_way"]] == [["ns/big"]]
    with pytest.raises(InputError, match="cannot explain pod ns/never: it holds nothing here, and no refusal names it"):
        explain_pod(facts, state_of(facts), "ns/never")


def test_an_audit_that_cannot_be_read_proves_nothing(machine: Inventory, tmp_path: Path) -> None:
    facts = facts_of(machine, ledger(), tmp_path)
    with pytest.raises(InputError, match="whether it was refused is unknown: cannot read"):
        explain_pod(facts, state_of(facts), "ns/never")


def test_what_the_kernel_shows_is_read_from_the_control_groups(machine: Inventory, tmp_path: Path) -> None:
    """Effective CPUs, memory nodes, limits of pages and throttling, if the tree is at hand."""
    uid = "11111111-2222-3333-4444-555555555555"
    folder = tmp_path / "root/sys/fs/cgroup"
    inside = folder / f"kubepods/pod{uid}/{'a' * 64}"
    inside.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text("cpuset cpu hugetlb\n")
    (tmp_path / "root/sys/kernel/mm/hugepages/hugepages-1048576kB").mkdir(parents=True)
    files = {
        "cpuset.cpus": "0-1",
        "cpuset.cpus.effective": "0-1",
        "cpuset.mems": "0",
        "cpuset.mems.effective": "0",
        "cpuset.cpus.partition": "member",
        "cpu.max": "150000 100000",
        "cpu.stat": "nr_throttled 7\nthrottled_usec 1500000",
        "cgroup.events": "populated 1",
        "hugetlb.1GB.max": str(2 * GIB),
        "hugetlb.1GB.current": str(GIB),
        "hugetlb.1GB.events": "max 3",
    }
    for name, text in files.items():
        (inside / name).write_text(f"{text}\n")
    grants = ledger(container("g1", "a", uid, cpus=CpuSet([0, 1])))
    facts = facts_of(machine, grants, tmp_path)
    (seen,) = explain_pod(facts, state_of(facts), "ns/a")["kernel"]["cgroups"]
    assert (seen["cpus"], seen["mems"], seen["quota_cpus"], seen["throttled"]) == ("0-1", "0", 1.5, 7)
    assert seen["hugepages"]["1Gi"] == {"used_bytes": GIB, "limit_bytes": 2 * GIB, "failures": 3}


def test_a_cpu_names_its_holder_and_its_siblings(tmp_path: Path) -> None:
    machine = inventory_of(even_rows(1, 1, 1, 2, 2))
    facts = facts_of(machine, ledger(container("g1", "a", cpus=CpuSet([1])), reserved="2"), tmp_path)
    state = state_of(facts)
    assert explain_cpu(state, "1")["holder"] == "ns/a/main"
    assert explain_cpu(state, "cpu3")["siblings"] == {1: "ns/a/main"}
    assert explain_cpu(state, "2")["not_granted"] == ["it is reserved for the system"]
    for text in ("4", "-1", "seven", ""):
        with pytest.raises(InputError, match=r"cannot explain CPU .*: this machine can have CPUs 0-3"):
            explain_cpu(state, text)


def test_a_device_says_why_nobody_can_have_it(machine: Inventory, tmp_path: Path) -> None:
    """Its holder, its health by cause, and the holder of what cannot be given away together with it."""
    things = things_of(machine, ["gpu0/mig0"])
    sick = {
        "device": "gpu1",
        "state": "unhealthy",
        "reason": "Xid 79",
        "causes": [{"source": "xid", "state": "unhealthy", "reason": "Xid 79", "latched": True}],
    }
    grants = ledger(container("g1", "a", devices=("gpu0/mig0",), things=things))
    facts = facts_of(machine, grants, tmp_path, health=[sick])
    state = state_of(facts)
    whole = explain_device(facts, state, "/dev/nvidia0")
    assert whole["device"] == "gpu0" and not whole["holders"]
    assert "gpu0/mig0, which cannot be given away together with it, is held by ns/a/main" in whole["not_offered"]
    ill = explain_device(facts, state, "gpu1")
    assert ill["causes"] == {"xid": "unhealthy: Xid 79"} and "it is unhealthy: Xid 79" in ill["not_offered"]
    unserved = "neither a resource of the device plugin nor a pool of DRA serves it (gpu)"
    assert unserved in ill["not_offered"]
    published = {"slices": {"pools": [{"name": "node-a/gpu"}]}}
    by_dra = facts_of(machine, grants, tmp_path, dra=published)
    healthy = explain_device(by_dra, state_of(by_dra), "gpu1")
    assert (healthy["pool"], healthy["not_offered"]) == ("node-a/gpu", [])
    with pytest.raises(InputError, match=r"cannot explain device 'gpu2': .*did you mean gpu"):
        explain_device(facts, state, "gpu2")


def test_an_ill_device_is_not_counted_and_is_named(machine: Inventory, tmp_path: Path) -> None:
    sick = {"device": "gpu1", "state": "unknown", "reason": "no answer", "causes": []}
    held = container("g1", "a", devices=("gpu0",), things=things_of(machine, ["gpu0"]))
    facts = facts_of(machine, ledger(held), tmp_path, health=[sick])
    found = explain_request(state_of(facts), Request(devices={"gpu": 1}))
    assert not found["fits"] and found["not_counted"] == ["gpu1 is unknown: no answer"]
    assert [one["pods"] for one in found["in_the_way"]] == [["ns/a"]]


def test_pages_that_a_pod_uses_come_back_with_its_end(machine: Inventory, tmp_path: Path) -> None:
    """Pages that are faulted are not free, although they are the pod's own."""
    node = machine.numa_nodes[0]
    used = replace(node, hugepages=(replace(node.hugepages[0], free_pages=0),))
    inventory = replace(machine, numa_nodes=(used, machine.numa_nodes[1]))
    held = container("g1", "a", hugepages=(Pages(node=0, page_bytes=GIB, pages=2),))
    facts = facts_of(inventory, ledger(held), tmp_path)
    found = explain_request(state_of(facts), Request(hugepages={GIB: 4}))
    assert [one["pods"] for one in found["in_the_way"]] == [["ns/a"]]


PINNED = {
    "namespace": "ns",
    "pod": "a",
    "pod_uid": "uid-a",
    "container": "main",
    "grants": ["g1"],
    "granted_cpus": "0-1",
    "effective_cpus": "0-2",
    "granted_mems": "0",
    "effective_mems": "0",
    "hugepage_limits": {"1Gi": GIB},
    "drifts": 2,
    "quota_cpus": 1.5,
    "error": "cannot write cpuset.cpus",
}


def test_what_the_agent_has_found_in_the_kernel_is_printed(
    machine: Inventory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Effective CPUs, page limits, quota, drifts; of interrupts and threads of the host those on its CPUs."""
    intruders = {
        "irqs": [
            {"irq": 24, "name": "eth0-rx", "cpus": "1,7", "moved": False},
            {"irq": 25, "name": "eth0-tx", "cpus": "1", "moved": True},
            {"irq": 26, "name": "nvme0", "cpus": "6", "moved": False},
        ],
        "threads": [{"tid": 77, "comm": "kworker/0:1", "cpus": "0"}, {"tid": 78, "comm": "sshd", "cpus": "5"}],
    }
    pinning = {"mode": "nri", "pinned": [PINNED, {**PINNED, "pod": "b"}], "intruders": intruders}
    grants = ledger(container("g1", "a", "uid-a", cpus=CpuSet([0, 1])))
    facts = facts_of(machine, grants, tmp_path, pinning=pinning)
    state = state_of(facts)
    print_holder(explain_pod(facts, state, "ns/a"))
    out = capsys.readouterr().out
    assert out.count("cannot write cpuset.cpus") == 1 and f"1Gi={GIB}" in out
    assert "interrupt 24 (eth0-rx) may run on 1,7" in out and "eth0-tx" not in out and "nvme0" not in out
    assert "thread 77 (kworker/0:1) of the host may run on 0" in out and "sshd" not in out
    print_cpu(explain_cpu(state, "2"))
    assert "the kernel lets ns/a/main run on it" in capsys.readouterr().out
