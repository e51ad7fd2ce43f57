"""Whether a pod lives, by its cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.ledger.witness import Sight
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.pod_cgroups import PodCgroupTree

UID = "0f6c7dd0-11e9-4b8e-8f0a-000000000001"


def sight(root: Path, uid: str = UID, **options: str) -> Sight:
    return PodCgroups(SysFs(root), **options).sights([uid])[uid].sight


@pytest.mark.parametrize("controller", ["", "pids", "memory", "cpu,cpuacct"])
@pytest.mark.parametrize("qos", ["", "burstable", "besteffort"])
def test_a_pod_lives_then_is_empty_then_is_gone(tmp_path: Path, controller: str, qos: str) -> None:
    """In both versions of cgroups, whatever its class of quality of service."""
    tree = PodCgroupTree(tmp_path, controller=controller)
    assert sight(tmp_path) is Sight.ABSENT
    path = tree.run(UID, qos=qos)
    found = PodCgroups(SysFs(tmp_path)).sights([UID])[UID]
    assert (found.sight, found.evidence) == (Sight.LIVES, f"processes run in {path}")
    tree.end(UID)
    assert sight(tmp_path) is Sight.EMPTY
    tree.remove(UID)
    assert sight(tmp_path) is Sight.ABSENT


@pytest.mark.parametrize("made", ["", "sys/fs/cgroup", "sys/fs/cgroup/system.slice"])
def test_a_machine_without_kubelets_cgroups_says_nothing_of_any_pod(tmp_path: Path, made: str) -> None:
    """No hierarchy, another cgroupRoot, or a kubelet that was never started: that is no proof of an end."""
    (tmp_path / made).mkdir(parents=True, exist_ok=True)
    if made:
        (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset\n")
    assert sight(tmp_path) is Sight.UNSEEN


def test_slices_of_systemd_are_found_below_a_root_of_kubelets(tmp_path: Path) -> None:
    """The names of the systemd driver, with cgroupRoot."""
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("cpuset\n")
    name = UID.replace("-", "_")
    pod = tmp_path / f"sys/fs/cgroup/a.slice/a-kubepods.slice/a-kubepods-pod{name}.slice"
    pod.mkdir(parents=True)
    (pod / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert sight(tmp_path, cgroup_root="/a") is Sight.LIVES
    assert sight(tmp_path) is Sight.UNSEEN


def test_pods_of_before_a_change_of_the_cgroup_driver_are_found(tmp_path: Path) -> None:
    """They still run below the old names while new ones come below the new."""
    tree = PodCgroupTree(tmp_path)
    tree.run(UID)
    (tmp_path / "sys/fs/cgroup/kubepods.slice").mkdir()
    assert sight(tmp_path) is Sight.LIVES


@pytest.mark.parametrize("uid", ["", "..", "a/b", "a_b", "x" * 300])
def test_what_cannot_be_a_uid_has_no_cgroup(tmp_path: Path, uid: str) -> None:
    """A checkpoint may say anything; nothing outside kubelet's cgroups is looked at."""
    PodCgroupTree(tmp_path).run(UID)
    assert sight(tmp_path, uid) is Sight.ABSENT


def test_a_cgroup_that_cannot_be_read_is_no_answer(tmp_path: Path) -> None:
    """Not empty, not gone."""
    pod = PodCgroupTree(tmp_path).run(UID)
    (pod / "cgroup.events").unlink()
    (pod / "cgroup.events").mkdir()
    assert sight(tmp_path) is Sight.UNSEEN
