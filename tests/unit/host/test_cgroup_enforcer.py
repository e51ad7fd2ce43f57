"""Control groups brought to the desired state without two sharing CPUs, and read back; bundles of containers."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.cgroup import oci_bundle as bundles
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.enforcer import Enforcer, Target
from nodeagent.host.cgroup.layout import layouts
from nodeagent.host.cgroup.read import ISOLATED, CgroupReader
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.cgroup_tree import CgroupTree

MIB2 = 2 << 20
BUNDLES = [f"{folder}/{below}" for folder, below in bundles.FOLDERS.items()]
A, B = "kubepods/poda", "kubepods/podb"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CgroupTree:
    made = CgroupTree(tmp_path, cpus="0-7", mems="0-1")
    monkeypatch.setattr(cgroupset, "put", made.put)
    for path in (A, B):
        made.make(path)
    return made


def enforcer(tree: CgroupTree) -> Enforcer:
    return Enforcer(CgroupReader(str(tree.mount), [MIB2]), layouts())


def cpus(text: str, **more: object) -> Target:
    return Target(cpus=CpuSet.parse(text), **more)  # type: ignore[arg-type]


def test_cpus_are_taken_from_one_before_they_are_given_to_another(tree: CgroupTree) -> None:
    made = enforcer(tree)
    assert made.apply({A: cpus("0-3"), B: cpus("4-7")}) == {}
    tree.writes.clear()
    assert made.apply({A: cpus("2-5"), B: cpus("0-1,6-7")}) == {}
    sets = {A: CpuSet.parse("0-3"), B: CpuSet.parse("4-7")}
    for file, value in tree.writes:
        path = file.removesuffix("/cpuset.cpus")
        sets[path] = CpuSet.parse(value)
        assert sets[A].isdisjoint(sets[B]), f"they met after {path} was given {value}"
    assert (tree.effective(A), tree.effective(B)) == ("2-5", "0-1,6-7")


def test_what_is_as_it_is_to_be_is_not_written(tree: CgroupTree) -> None:
    made = enforcer(tree)
    made.apply({A: cpus("0-3")})
    tree.writes.clear()
    assert made.verify({A: cpus("0-3")}) == () and enforcer(tree).apply({A: cpus("0-3")}) == {}
    assert tree.writes == []


def test_one_that_refuses_keeps_no_other_from_being_confined(tree: CgroupTree) -> None:
    tree.refuses[f"{A}/cpuset.cpus"] = errno.EBUSY
    errors = enforcer(tree).apply({A: cpus("0-3"), B: cpus("4-7")})
    assert errors.keys() == {A} and tree.effective(B) == "4-7"
    assert errors[A] == f"cannot write {tree.mount}/{A}/cpuset.cpus: Device or resource busy, value '0-3'"


def test_what_the_kernel_takes_and_does_not_do_is_an_error(tree: CgroupTree) -> None:
    """The parent has none of these CPUs, so the parent's apply."""
    tree.set("kubepods", "cpuset.cpus", "0-3")
    errors = enforcer(tree).apply({A: cpus("4-7")})
    assert "cpuset.cpus.effective is '0-3', not '4-7'" in errors[A]


def test_what_is_written_and_reads_back_wrong_is_not_repaired(tree: CgroupTree) -> None:
    """What was found is said all the same."""
    made, path = enforcer(tree), f"{A}/c"
    tree.make(path)
    assert made.apply({path: cpus("4-7")}) == {}
    tree.set(A, "cpuset.cpus", "0-5")
    (found,) = made.verify({path: cpus("4-7")})
    assert [(one.file, one.found, one.wanted) for one in found.drift] == [("cpuset.cpus.effective", "4-5", "4-7")]
    assert "cpuset.cpus.effective is '4-5', not '4-7'" in found.error
    tree.set(A, "cpuset.cpus", "0-7")
    assert made.verify({path: cpus("4-7")}) == ()


@pytest.mark.parametrize("file", ["cpuset.cpus", "cpuset.cpus.effective"])
def test_a_container_that_vanishes_on_the_way_is_no_error(
    tree: CgroupTree, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """While it is written, or before it is read back."""
    made = enforcer(tree)

    def put(path: str, value: str) -> None:
        if file != "cpuset.cpus":
            tree.put(path, value)
        tree.remove(A)
        if file == "cpuset.cpus":
            tree.put(path, value)

    monkeypatch.setattr(cgroupset, "put", put)
    assert made.apply({A: cpus("0-3")}) == {}
    assert made.verify({A: cpus("0-3")}) == ()


def test_limits_that_somebody_lowered_are_raised_again_and_those_above_too(tree: CgroupTree) -> None:
    made, path = enforcer(tree), f"{A}/c"
    tree.make(path)
    pod = Target(hugepages_at_least={MIB2: 4 * MIB2}, hugepages_above={MIB2: 64 * MIB2})
    own = Target(hugepage_limits={MIB2: 4 * MIB2})
    assert made.apply({A: pod, path: own}) == {}
    for one in ("kubepods", A, path):
        tree.set(one, "hugetlb.2MB.max", "0")
    (found, mine) = made.verify({A: pod, path: own})
    assert found.drift[0].wanted == f"at least {4 * MIB2}" and mine.drift[0].file == "hugetlb.2MB.max"
    limits = [int(tree.text(one, "hugetlb.2MB.max")) for one in ("kubepods", A, path)]
    assert limits == [64 * MIB2, 4 * MIB2, 4 * MIB2]


def test_a_partition_lets_its_cpus_through_and_keeps_them_back_when_it_is_gone(tree: CgroupTree) -> None:
    made, path = enforcer(tree), f"{A}/c"
    tree.make(path)
    assert made.apply({path: cpus("2-3", partition=ISOLATED)}) == {}
    assert tree.text(path, "cpuset.cpus.partition") == ISOLATED
    assert [tree.text(one, "cpuset.cpus.exclusive") for one in ("kubepods", A, path)] == ["2-3"] * 3
    tree.remove(path)
    made.forget(path)
    assert [tree.text(one, "cpuset.cpus.exclusive") for one in ("kubepods", A)] == ["", ""]


def test_a_partition_outlives_the_agent_and_ends_when_none_is_wanted(tree: CgroupTree) -> None:
    path, gone = f"{A}/c", f"{B}/c"
    for one in (path, gone):
        tree.make(one)
    enforcer(tree).apply({path: cpus("2-3", partition=ISOLATED), gone: cpus("6", partition=ISOLATED)})
    tree.remove(gone)
    made = enforcer(tree)
    tree.writes.clear()
    assert made.apply({path: cpus("2-3", partition=ISOLATED)}) == {} and tree.writes == []
    made.tidy()
    assert tree.text("kubepods", "cpuset.cpus.exclusive") == "2-3"
    assert made.apply({path: cpus("2-3")}) == {}
    assert tree.text(path, "cpuset.cpus.partition") == "member"
    assert [tree.text(one, "cpuset.cpus.exclusive") for one in ("kubepods", A, path)] == [""] * 3


@pytest.mark.parametrize(
    ("let_go", "effective", "right"),
    [
        ("2-3", "0-1,4-7", True),
        ("2-5", "0-1,4-7", True),  # of two containers the first is a partition, or it leaves threads idle
        ("0-7", "0-1,4-7", True),
        ("0-7", "", True),
        ("2-3", "0-1,5-7", False),
        ("2-3", "", False),
        ("", "0-1,4-7", False),
    ],
)
def test_what_partitions_below_take_of_what_they_may_is_no_drift_of_their_pod(
    tree: CgroupTree, let_go: str, effective: str, right: bool
) -> None:
    made = enforcer(tree)
    pod = cpus("0-7", let_go=CpuSet.parse(let_go))
    assert made.apply({A: pod}) == {}
    (tree.mount / A / "cpuset.cpus.effective").write_text(f"{effective}\n")
    found = [one.error for one in made.verify({A: pod})]
    assert found == [] if right else f"is '{effective}', not '0-7'" in found[0]


# Below a scope of crun's


SCOPE = f"{A}/crio-c.scope"


def test_the_copy_below_a_scope_follows_what_the_scope_is_given(tree: CgroupTree) -> None:
    """crun puts the processes there, with the CPUs and nodes that the runtime was told: they would never get more."""
    for path in (SCOPE, f"{SCOPE}/container"):
        tree.make(path, cpuset__cpus="2-3", cpuset__mems="0")
    made = enforcer(tree)
    for wanted in ("2-3", "1-5", "6-7", "0-7"):
        assert made.apply({SCOPE: cpus(wanted)}) == {}
        assert tree.effective(f"{SCOPE}/container") == wanted
    assert made.apply({SCOPE: cpus("0-7", mems=CpuSet.parse("0-1"))}) == {}
    assert tree.text(f"{SCOPE}/container", "cpuset.mems.effective") == "0-1"


def test_the_copy_follows_also_after_an_agent_that_was_killed_between_it_and_its_scope(tree: CgroupTree) -> None:
    tree.make(SCOPE, cpuset__cpus="2-3")
    tree.make(f"{SCOPE}/container", cpuset__cpus="1-5")
    made = enforcer(tree)
    for wanted in ("1-5", "0-7"):
        assert made.apply({SCOPE: cpus(wanted)}) == {}
        assert tree.effective(f"{SCOPE}/container") == wanted


def test_a_cgroup_that_a_container_has_made_below_its_own_is_left_alone(tree: CgroupTree) -> None:
    tree.make(SCOPE, cpuset__cpus="2-5")
    tree.make(f"{SCOPE}/container", cpuset__cpus="2")
    made = enforcer(tree)
    assert made.apply({SCOPE: cpus("1-5")}) == {} and made.apply({SCOPE: cpus("1-6")}) == {}
    assert tree.text(f"{SCOPE}/container", "cpuset.cpus") == "2"


def test_cpu_time_is_told_in_cpus(tree: CgroupTree) -> None:
    tree.set(A, "cpu.max", "150000 100000")
    made = enforcer(tree)
    assert (made.quota_cpus(A), made.quota_cpus(B), made.quota_cpus("kubepods/podc")) == (1.5, None, None)


# Bundles


@pytest.mark.parametrize("folder", BUNDLES)
def test_a_container_is_known_from_its_bundle_wherever_the_runtime_leaves_it(tmp_path: Path, folder: str) -> None:
    crio = "storage" in folder
    keys = {"name": "container.name", "namespace": "pod.namespace", "pod": "pod.name", "uid": "pod.uid"}
    cri = {"name": "container-name", "namespace": "sandbox-namespace", "pod": "sandbox-name", "uid": "sandbox-uid"}
    said = {f"io.kubernetes.{key}" if crio else f"io.kubernetes.cri.{cri[one]}": one for one, key in keys.items()}
    path = tmp_path / folder.format("abc")
    path.parent.mkdir(parents=True)
    spec = {"process": {"env": ["A=b=c", "D"]}, "annotations": said, "linux": {"cgroupsPath": "a.slice:cri:abc"}}
    path.write_text(json.dumps(spec))
    found = bundles.read(SysFs(tmp_path), "abc")
    assert found is not None
    assert (found.name, found.namespace, found.pod_name, found.pod_uid) == ("name", "namespace", "pod", "uid")
    assert (dict(found.env), found.cgroup_path) == ({"A": "b=c", "D": ""}, "a.slice:cri:abc")


def test_an_id_that_is_none_or_has_no_bundle_is_not_known(tmp_path: Path) -> None:
    for id in ("abc", "../../etc", "", "a/b"):
        assert bundles.read(SysFs(tmp_path), id) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"process": 3}', '{"annotations": {"a": 1}}'])
def test_a_bundle_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / BUNDLES[0].format("abc")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(HostError, match=f"cannot read {path}: "):
        bundles.read(SysFs(tmp_path), "abc")


def test_a_sandbox_of_cri_o_has_no_name(tmp_path: Path) -> None:
    """CRI-O writes one into its bundle, as for a container."""
    said = {"io.kubernetes.container.name": "POD", "io.kubernetes.pod.uid": "uid"}
    path = tmp_path / BUNDLES[-1].format("abc")
    path.parent.mkdir(parents=True)
    for kind, name in (("sandbox", ""), ("container", "POD")):
        annotations = {**said, "io.kubernetes.cri-o.ContainerType": kind}
        path.write_text(json.dumps({"annotations": annotations}))
        found = bundles.read(SysFs(tmp_path), "abc")
        assert found is not None and (found.name, found.pod_uid) == (name, "uid")
