"""What systemd is told of pods' CPUs: the files that lie in its folder, and nothing of anybody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.errors import HostError
from nodeagent.host.cgroup.layout import CGROUPFS, SYSTEMD, CgroupLayout
from nodeagent.host.systemd.slice_drop_ins import FILE, SliceDropins

SHARED, OWN = CpuSet.parse("1-3,6-15"), CpuSet.parse("1-15")
POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu.slice"


def told(folder: Path) -> dict[str, str]:
    """CPUs by unit."""
    return {
        path.parent.name.removesuffix(".d"): path.read_text().rpartition("AllowedCPUs=")[2].strip()
        if "CPUs=" in path.read_text()
        else ""
        for path in folder.glob(f"*.d/{FILE}")
    }


def test_every_slice_of_a_pod_has_the_shared_pool_and_those_of_classes_have_all(tmp_path: Path) -> None:
    SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD)).keep(SHARED, {})
    assert told(tmp_path) == {
        "kubepods-.slice": "1-3,6-15",
        "kubepods-burstable.slice": "",
        "kubepods-besteffort.slice": "",
    }


def test_a_pod_with_cpus_of_its_own_has_a_file_of_its_own_while_it_is_there(tmp_path: Path) -> None:
    kept = SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD))
    kept.keep(SHARED, {POD: OWN})
    assert told(tmp_path)["kubepods-burstable-podu.slice"] == "1-15"
    kept.keep(OWN, {})
    assert "kubepods-burstable-podu.slice" not in told(tmp_path)
    assert not (tmp_path / "kubepods-burstable-podu.slice.d").exists()


def test_a_root_of_kubelet_s_own_is_in_the_names(tmp_path: Path) -> None:
    SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD, cgroup_root="/kube-let")).keep(SHARED, {})
    assert "kube_let-kubepods-.slice" in told(tmp_path)


def test_what_an_agent_before_left_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD)).keep(SHARED, {POD: OWN})
    mine = tmp_path / "kubepods-.slice.d/10-mine.conf"
    mine.write_text("[Slice]\nCPUWeight=50\n")
    SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD)).keep(None, {})
    assert told(tmp_path) == {} and mine.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["kubepods-.slice.d"]


def test_the_same_again_writes_nothing(tmp_path: Path) -> None:
    SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD)).keep(SHARED, {POD: OWN})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.d/*")}
    SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD)).keep(SHARED, {POD: OWN})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.d/*")} == before


def test_nothing_is_written_where_systemd_has_no_part(tmp_path: Path) -> None:
    SliceDropins(tmp_path, CgroupLayout(driver=CGROUPFS)).keep(SHARED, {POD: OWN})
    SliceDropins(tmp_path / "none", CgroupLayout(driver=SYSTEMD)).keep(SHARED, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_said_with_its_path_and_tried_again(tmp_path: Path) -> None:
    kept = SliceDropins(tmp_path, CgroupLayout(driver=SYSTEMD))
    (tmp_path / "kubepods-.slice.d").write_text("in the way")
    with pytest.raises(HostError, match=r"cannot write .*/kubepods-\.slice\.d/50-nodeagent\.conf: "):
        kept.keep(SHARED, {})
    (tmp_path / "kubepods-.slice.d").unlink()
    kept.keep(SHARED, {})
    assert told(tmp_path)["kubepods-.slice"] == "1-3,6-15"
