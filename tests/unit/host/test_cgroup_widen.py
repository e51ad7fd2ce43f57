"""What confined pods and containers is undone, whatever it was; nothing of others is touched."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.host.cgroup import write
from nodeagent.host.cgroup.layout import CgroupLayout
from nodeagent.host.cgroup.read import CgroupReader
from nodeagent.host.cgroup.widen import CPUS, MEMS, Widener
from tests.builders.cgroup_tree import CgroupTree

POD, OTHER = "kubepods/poda", "kubepods/burstable/podb"
CONTAINER = f"{POD}/c1"
LAYOUT = CgroupLayout(driver="cgroupfs")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CgroupTree:
    """8 CPUs on 2 nodes, two pods with a container each, and a service of the host's."""
    made = CgroupTree(tmp_path / "root", cpus="0-7", mems="0-1")
    monkeypatch.setattr(write, "put", made.put)
    for path in (CONTAINER, f"{OTHER}/c2", "system.slice/a.service"):
        made.make(path)
    return made


def widener(tree: CgroupTree, **options: bool) -> Widener:
    return Widener(str(tree.mount), "/", **options)


def test_pods_and_containers_have_what_their_parents_have(tree: CgroupTree) -> None:
    tree.set(CONTAINER, CPUS, "2-3")
    tree.set(CONTAINER, MEMS, "1")
    tree.set(OTHER, CPUS, "0-1,4-7")
    tree.set("system.slice/a.service", CPUS, "0")
    assert list(widener(tree).undo()) == []
    assert [tree.effective(one) for one in (CONTAINER, OTHER, f"{OTHER}/c2")] == ["0-7"] * 3
    assert tree.text(CONTAINER, "cpuset.mems.effective") == "0-1"
    assert tree.text("system.slice/a.service", CPUS) == "0"
    assert widener(tree).plan() == []


def test_the_plan_names_each_file_with_what_is_in_it_and_what_will_be(tree: CgroupTree) -> None:
    """Parents first; a container gets what its pod will have, not what it has now."""
    tree.set(POD, CPUS, "0-3")
    tree.set(CONTAINER, CPUS, "2-3")
    assert widener(tree).plan() == [(POD, CPUS, "0-3", "0-7"), (CONTAINER, CPUS, "2-3", "0-7")]
    assert tree.writes == []


def test_what_is_above_pods_limits_them_still(tree: CgroupTree) -> None:
    tree.set("kubepods", CPUS, "0-5")
    tree.set(CONTAINER, CPUS, "2")
    assert widener(tree).plan() == [(CONTAINER, CPUS, "2", "0-5")]


def test_partitions_end_and_nothing_is_passed_on_to_them_any_longer(tree: CgroupTree) -> None:
    tree.set(CONTAINER, CPUS, "2-3")
    writer = write.Writer(CgroupReader(str(tree.mount), ()))
    writer.isolate(LAYOUT, CONTAINER, CpuSet.parse("2-3"))
    assert list(widener(tree).undo()) == []
    assert tree.text(CONTAINER, "cpuset.cpus.partition") == "member"
    assert {tree.text(one, "cpuset.cpus.exclusive") for one in (CONTAINER, POD, "kubepods")} == {""}
    assert tree.effective(CONTAINER) == "0-7"


@pytest.mark.parametrize(("ours", "left"), [({"cpus": False}, CPUS), ({"mems": False}, MEMS)])
def test_what_kubelet_s_own_manager_writes_stays(ours: dict[str, bool], left: str, tree: CgroupTree) -> None:
    tree.set(CONTAINER, CPUS, "2-3")
    tree.set(CONTAINER, MEMS, "1")
    assert list(widener(tree, **ours).undo()) == []
    assert tree.text(CONTAINER, left) in ("2-3", "1")
    assert widener(tree).plan() != []


def test_a_cgroup_that_refuses_is_reported_and_the_others_are_widened(tree: CgroupTree) -> None:
    tree.set(CONTAINER, CPUS, "2-3")
    tree.set(OTHER, CPUS, "0-1")
    tree.refuses[f"{CONTAINER}/{CPUS}"] = errno.EPERM
    (error,) = widener(tree).undo()
    assert error.startswith(f"cannot write {tree.mount}/{CONTAINER}/{CPUS}: Operation not permitted")
    assert tree.effective(OTHER) == "0-7"


SCOPE = "kubepods.slice/kubepods-podc.slice/crio-c3.scope"
COPY = f"{SCOPE}/container"


@pytest.mark.parametrize(("copy", "wide"), [("2-3", "0-7"), ("2", "2")])
def test_what_crun_copied_below_a_scope_follows_it_and_what_the_container_has_set_stays(
    copy: str, wide: str, tree: CgroupTree
) -> None:
    for path, value in ((SCOPE, "2-3"), (COPY, copy)):
        tree.make(path, cpuset__cpus=value, cpuset__mems="1")
    copied = [(SCOPE, f"container/{CPUS}", "2-3", "0-7")] if copy == "2-3" else []
    assert [one for one in widener(tree).plan() if CPUS in one.file] == [*copied, (SCOPE, CPUS, "2-3", "0-7")]
    assert list(widener(tree).undo()) == []
    assert [tree.effective(one) for one in (SCOPE, COPY)] == ["0-7", wide]
    assert tree.text(COPY, MEMS) == "0-1"


def test_a_copy_that_refuses_keeps_its_scope_so_that_both_are_widened_the_next_time(tree: CgroupTree) -> None:
    for path in (SCOPE, COPY):
        tree.make(path, cpuset__cpus="2-3")
    tree.refuses[f"{COPY}/{CPUS}"] = errno.EBUSY
    first, second = widener(tree).undo()
    assert first.startswith(f"cannot write {tree.mount}/{COPY}/{CPUS}: Device or resource busy")
    assert second == f"cannot widen {tree.mount}/{SCOPE}: {CPUS} is '2-3', not '0-7'"
    tree.refuses.clear()
    assert list(widener(tree).undo()) == []
    assert [tree.effective(one) for one in (SCOPE, COPY)] == ["0-7"] * 2


SETS = st.frozensets(st.integers(0, 7), min_size=1).map(lambda cpus: str(CpuSet(cpus)))


@given(cpus=st.dictionaries(st.sampled_from([POD, CONTAINER, OTHER, f"{OTHER}/c2"]), SETS))
def test_whatever_was_narrowed_all_is_as_if_nothing_had_been(
    cpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        tree = CgroupTree(tmp_path_factory.mktemp("any"), cpus="0-7", mems="0-1")
        patch.setattr(write, "put", tree.put)
        for path in (CONTAINER, f"{OTHER}/c2"):
            tree.make(path)
        for path, value in cpus.items():
            tree.set(path, CPUS, value)
        assert list(widener(tree).undo()) == []
        assert {tree.effective(one) for one in (POD, CONTAINER, OTHER, f"{OTHER}/c2")} == {"0-7"}
