"""Control groups of pods: their names, what the kernel says of them, what is written, who else writes.

Built trees are plain folders that stand for the unified hierarchy; what needs the kernel runs in cgroups of its own on
the machine's real one, where it has the controllers, and is skipped with the reason where not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from asyncinotify import Inotify
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup import read as cgroup
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.cgroup.layout import (
    BEST_EFFORT,
    BURSTABLE,
    CGROUPFS,
    CONTAINER,
    GUARANTEED,
    MONITOR,
    POD,
    QOS,
    SYSTEMD,
    TOP,
    CgroupLayout,
    expand_slice,
    is_pods,
    layouts,
    runtime_path,
)
from nodeagent.host.cgroup.read import (
    HYBRID,
    NONE,
    V1,
    V2,
    CgroupPart,
    CgroupReader,
    find,
    has_begun,
    hierarchy,
    page_sizes,
    size_name,
)
from nodeagent.host.cgroup.watch import CAME, GONE, LOOK, WRITTEN, CgroupChange, Watch
from nodeagent.host.cgroup.write import CgroupTarget, Drift, Writer, drift
from nodeagent.host.sysfs.sysfs import SysFs

MIB2, GIB = 2 << 20, 1 << 30
UID = "0a1b2c3d-1111-2222-3333-444455556666"
ID = "ab" * 32
STATIC = "0123456789abcdef0123456789abcdef"
"""The UID that kubelet gives a static pod."""
LONG_S = 30.0
ROUND_BUDGET_MS = 50
CLASSES = (GUARANTEED, BURSTABLE, BEST_EFFORT)
FILES = {
    "cgroup.controllers": "cpuset cpu hugetlb",
    "cgroup.subtree_control": "cpuset cpu hugetlb",
    "cgroup.events": "populated 1\nfrozen 0",
    "cgroup.procs": "12\n13",
    "cpu.max": "200000 100000",
    "cpu.stat": "usage_usec 7\nnr_periods 4\nnr_throttled 3\nthrottled_usec 900\nnr_bursts 0",
    "cpuset.cpus": "0-3",
    "cpuset.cpus.effective": "0-3",
    "cpuset.cpus.exclusive": "",
    "cpuset.cpus.partition": "member",
    "cpuset.mems": "0",
    "cpuset.mems.effective": "0",
    **{
        f"hugetlb.{size}.{file}": value
        for size in ("2MB", "1GB")
        for file, value in (
            ("max", "max"),
            ("rsvd.max", "0"),
            ("current", "4194304"),
            ("rsvd.current", "2097152"),
            ("events", "max 5"),
        )
    },
}


def make(mount: Path, path: str, **changed: str | None) -> Path:
    """A built cgroup; "__" in a name stands for a dot, None leaves a file out."""
    folder = mount / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (FILES | {name.replace("__", "."): value for name, value in changed.items()}).items():
        if value is not None:
            (folder / name).write_text(f"{value}\n")
    return folder


def reader(mount: Path) -> CgroupReader:
    return CgroupReader(str(mount), (MIB2, GIB))


def said(folder: Path, *names: str) -> list[str]:
    return [(folder / name).read_text().strip() for name in names]


# Names


@pytest.mark.parametrize(
    ("driver", "root", "qos", "path"),
    [
        (SYSTEMD, "/", GUARANTEED, "kubepods.slice/kubepods-podU.slice/cri-containerd-I.scope"),
        (
            SYSTEMD,
            "/",
            BURSTABLE,
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU.slice/cri-containerd-I.scope",
        ),
        (
            SYSTEMD,
            "/kube-let/x",
            BEST_EFFORT,
            "kube_let.slice/kube_let-x.slice/kube_let-x-kubepods.slice/kube_let-x-kubepods-besteffort.slice/"
            "kube_let-x-kubepods-besteffort-podU.slice/cri-containerd-I.scope",
        ),
        (CGROUPFS, "", GUARANTEED, "kubepods/podV/cri-containerd-I"),
        (CGROUPFS, "/kube-let/", BURSTABLE, "kube-let/kubepods/burstable/podV/cri-containerd-I"),
    ],
)
def test_a_container_lies_where_kubelet_puts_it(driver: str, root: str, qos: str, path: str) -> None:
    """And what lies there is that container."""
    wanted = path.replace("podU", "pod" + UID.replace("-", "_")).replace("podV", "pod" + UID).replace("-I", "-" + ID)
    layout = CgroupLayout(driver=driver, cgroup_root=root)
    assert layout.container(UID, qos, ID, "cri-containerd") == wanted
    found = layout.parse(wanted)
    assert found is not None
    assert (found.kind, found.qos, found.pod_uid, found.container_id) == (CONTAINER, qos, UID, ID)
    assert (found.path, found.driver, found.prefix) == (wanted, driver, "cri-containerd")


@given(
    uid=st.uuids().map(str) | st.text("0123456789abcdef", min_size=32, max_size=32),
    qos=st.sampled_from(CLASSES),
    container=st.text("0123456789abcdef", min_size=64, max_size=64),
    prefix=st.sampled_from(["cri-containerd", "crio", "docker", ""]),
    root=st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True), max_size=3),
)
def test_names_read_back_as_they_were_given(uid: str, qos: str, container: str, prefix: str, root: list[str]) -> None:
    """Both drivers, any cgroupRoot, also the UIDs of static pods, which have no dashes."""
    for layout in layouts("/".join(root)):
        found = layout.parse(layout.container(uid, qos, container, prefix))
        assert found is not None
        assert (found.qos, found.pod_uid, found.container_id, found.prefix) == (qos, uid, container, prefix)


@given(path=st.text(max_size=60), root=st.sampled_from(["/", "/a"]))
def test_any_path_is_read_without_an_error(path: str, root: str) -> None:
    for layout in layouts(root):
        assert layout.parse(path) is None or path.startswith(layout.top)
        found = layout.parse(f"{layout.top}/{path}")
        assert found is None or found.kind in (TOP, QOS, POD, CONTAINER, MONITOR)


@pytest.mark.parametrize("driver", [SYSTEMD, CGROUPFS])
def test_what_watches_over_a_container_is_no_container(driver: str) -> None:
    layout = CgroupLayout(driver=driver)
    found = layout.parse(layout.container(UID, BURSTABLE, ID, "crio-conmon"))
    assert found is not None
    assert (found.kind, found.pod_uid, found.container_id) == (MONITOR, UID, ID)


def test_what_lies_inside_a_container_is_none() -> None:
    layout = CgroupLayout(driver=SYSTEMD)
    pod = layout.pod(UID, GUARANTEED)
    assert layout.parse(f"{pod}/crio-{ID}.scope/container") is None
    assert layout.parse("system.slice/kubepods-x.scope") is None
    kinds = [found and found.kind for found in map(layout.parse, (layout.top, layout.qos(BURSTABLE), pod))]
    assert kinds == [TOP, QOS, POD]


@pytest.mark.parametrize(
    ("given_path", "path"),
    [
        (
            "kubepods-burstable-podu_1.slice:cri-containerd:abc",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice/cri-containerd-abc.scope",
        ),
        (":crio:abc", "system.slice/crio-abc.scope"),
        ("-.slice:crio:abc", "crio-abc.scope"),
        ("kubepods.slice::abc", "kubepods.slice/runc-abc.scope"),
        ("/kubepods/burstable/podu-1/abc", "kubepods/burstable/podu-1/abc"),
        ("kubepods//podu-1/abc/", "kubepods/podu-1/abc"),
    ],
)
def test_the_runtimes_form_of_a_cgroup_becomes_a_path(given_path: str, path: str) -> None:
    assert runtime_path(given_path) == path


@pytest.mark.parametrize("bad", ["", "/", "a:b", "a.slice:b:", "a:b:c", "../../x", "a.slice:../b:c", "a--b.slice:x:y"])
def test_a_cgroup_path_that_names_none_is_refused_with_its_text(bad: str) -> None:
    with pytest.raises(InputError, match="cannot read"):
        runtime_path(bad)


@given(st.text(max_size=40))
def test_what_a_runtime_says_never_leads_out_of_the_hierarchy(text: str) -> None:
    with contextlib.suppress(InputError):
        assert not set(runtime_path(text).split("/")) & {"", ".", ".."}


def test_a_slice_lies_in_the_slices_that_its_name_tells() -> None:
    assert expand_slice("a-b-c.slice") == "a.slice/a-b.slice/a-b-c.slice"
    with pytest.raises(InputError, match="'a-b'"):
        expand_slice("a-b")


def test_impossible_names_are_refused() -> None:
    layout = CgroupLayout(driver=SYSTEMD)
    for uid in ("", "../x", "a_b", "-a"):
        with pytest.raises(InputError, match="is not a UID"):
            layout.pod(uid, GUARANTEED)
    with pytest.raises(InputError, match="'gold'"):
        layout.qos("gold")
    with pytest.raises(InputError, match="'openrc'"):
        CgroupLayout(driver="openrc")
    with pytest.raises(InputError, match="does not stay below"):
        CgroupLayout(driver=CGROUPFS, cgroup_root="/../x")


@pytest.mark.parametrize("driver", [SYSTEMD, CGROUPFS])
@pytest.mark.parametrize("qos", [GUARANTEED, BURSTABLE, BEST_EFFORT])
def test_the_cgroups_of_a_static_pod_are_named_and_read_back(driver: str, qos: str) -> None:
    layout = CgroupLayout(driver=driver)
    found = layout.parse(layout.container(STATIC, qos, ID, "crio"))
    assert found is not None
    assert (found.kind, found.pod_uid, found.qos) == (CONTAINER, STATIC, qos)


@pytest.mark.parametrize(
    ("path", "pods"),
    [
        ("/kubepods.slice/kubepods-podx.slice/crio-1.scope", True),
        ("/kubelet.slice/kubelet-kubepods.slice", True),
        ("/kubepods/burstable", True),
        (f"/../pod{UID}/{ID}", True),
        (f"/../kubepods-burstable-pod{UID.replace('-', '_')}.slice/crio-1.scope", True),
        (f"/../../pod{STATIC}/{ID}", True),
        (f"/../../../burstable/pod{STATIC}/{ID}", True),
        (f"/../../../besteffort/podmy-static-web/{ID}", True),
        (f"/../../pod{STATIC}", True),
        (f"/../../../kubepods-besteffort-pod{STATIC}.slice/cri-containerd-{ID}.scope", True),
        (f"/pod{STATIC}/{ID}", True),
        (f"/../{'0a' * 32}", True),
        (f"/../cri-containerd-{'0a' * 32}.scope", True),
        (f"/../crio-{'0a' * 32}.scope/container", True),
        (f"/../docker-{'0a' * 32}.scope", False),
        (f"/../../{'0a' * 32}", False),
        (f"/system.slice/{'0a' * 32}", False),
        (f"/pod{STATIC[:-1]}", False),
        (f"/pod{STATIC}0", False),
        (f"/user.slice/{STATIC}", False),
        ("/podruntime/kubelet", False),
        ("/burstable/podium.service", False),
        ("/../../../../system.slice/kubelet.service", False),
        ("/system.slice/podman.service", False),
        ("/user.slice/my-pod", False),
        ("/", False),
    ],
)
def test_a_process_of_a_pod_is_known_by_its_cgroup(path: str, pods: bool) -> None:
    assert is_pods(path) is pods


# Which hierarchy


def test_cgroup_v2_can_be_enforced_on(tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text("cpuset cpu io hugetlb\n")
    found = hierarchy(SysFs(tmp_path))
    assert (found.mode, found.unsupported, found.namespaced) == (V2, "", False)
    assert found.mount == str(mount) and "hugetlb" in found.controllers
    (mount / "cgroup.type").write_text("domain\n")
    assert hierarchy(SysFs(tmp_path)).namespaced
    (mount / "cgroup.controllers").write_text("cpu\n")
    assert hierarchy(SysFs(tmp_path)).unsupported.endswith("/cgroup.controllers has no cpuset")


def test_other_hierarchies_are_said_to_be_unsupported(tmp_path: Path) -> None:
    assert hierarchy(SysFs(tmp_path)).mode == NONE
    mount = tmp_path / "sys/fs/cgroup"
    (mount / "cpuset").mkdir(parents=True)
    assert hierarchy(SysFs(tmp_path)).mode == V1
    (mount / "unified").mkdir()
    (mount / "unified/cgroup.controllers").write_text("\n")
    found = hierarchy(SysFs(tmp_path))
    assert found.mode == HYBRID and found.mount == str(mount / "unified")
    assert all(hierarchy(SysFs(root)).unsupported for root in (tmp_path, tmp_path / "empty"))


def test_page_sizes_are_those_the_kernel_knows(tmp_path: Path) -> None:
    for name in ("hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "odd"):
        (tmp_path / "sys/kernel/mm/hugepages" / name).mkdir(parents=True)
    sizes = page_sizes(SysFs(tmp_path))
    assert sizes == (64 << 10, MIB2, GIB)
    assert [size_name(size) for size in (*sizes, 32 << 20, 16 << 30)] == ["64KB", "2MB", "1GB", "32MB", "16GB"]


# Finding and reading


def test_pods_and_containers_of_both_drivers_are_found(tmp_path: Path) -> None:
    """Also with a cgroupRoot; what else lies there is passed over, and nothing is no error."""
    assert find(str(tmp_path)) == ()
    wanted = []
    for layout in layouts("/own"):
        for qos in CLASSES:
            make(tmp_path, f"{layout.container(UID, qos, ID, 'crio')}/container")
            make(tmp_path, f"{layout.pod(UID, qos)}/crio-conmon-{ID}.scope")
            wanted += [layout.pod(UID, qos), layout.container(UID, qos, ID, "crio")]
    assert [one.path for one in find(str(tmp_path), "/own")] == sorted(wanted)
    assert find(str(tmp_path)) == ()


def test_everything_about_a_container_is_read(tmp_path: Path) -> None:
    make(tmp_path, "kubepods/p/c", cpuset__cpus__effective="0-2")
    state = reader(tmp_path).read("kubepods/p/c")
    assert state is not None
    assert (state.cpus, state.cpus_effective) == (CpuSet(range(4)), CpuSet(range(3)))
    assert (state.mems, state.mems_effective) == (CpuSet([0]), CpuSet([0]))
    assert (state.partition, state.partition_invalid) == ("member", "")
    assert (state.quota_us, state.period_us, state.throttled_count, state.throttled_us) == (200000, 100000, 3, 900)
    assert (state.processes, state.populated) == (2, True)
    assert state.hugetlb is not None and list(state.hugetlb) == [MIB2, GIB]
    pages = state.hugetlb[MIB2]
    assert (pages.max_bytes, pages.rsvd_max_bytes, pages.has_rsvd) == (None, 0, True)
    assert (pages.current_bytes, pages.failures) == (4194304, 5)


@pytest.mark.parametrize(
    ("names", "populated", "begun"),
    [
        (["runc:[2:INIT]"], 1, False),
        (["crun"], 1, False),
        (["runc:[2:INIT]", "sh"], 1, True),
        (["postgres"], 1, True),
        ([], 1, True),
        (["sh"], 0, False),
    ],
)
@pytest.mark.parametrize("inner", ["", "/container"], ids=["runc", "crun"])
def test_a_container_whose_first_process_still_waits_has_not_begun(
    tmp_path: Path, names: list[str], populated: int, begun: bool, inner: str
) -> None:
    """Where nothing is to be seen of its processes it is taken to have begun."""
    for pid, name in enumerate(names, 70):
        (tmp_path / f"proc/{pid}").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/comm").write_text(f"{name}\n")
    procs = "\n".join(map(str, range(70, 70 + len(names))))
    mount = tmp_path / "sys/fs/cgroup"
    make(mount, "c", cgroup__events=f"populated {populated}", cgroup__procs="")
    make(mount, f"c{inner}", cgroup__events=f"populated {populated}", cgroup__procs=procs)
    state = CgroupReader(str(mount), ()).read("c", CgroupPart.CPUSET)
    assert state is not None and has_begun(SysFs(tmp_path), state) == begun


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """So a bad file elsewhere costs nothing."""
    make(tmp_path, "c", cpu__max="nonsense", cgroup__procs="x", hugetlb__2MB__current="?")
    state = reader(tmp_path).read("c", CgroupPart.LIMITS)
    assert state is not None and state.cpus == CpuSet(range(4)) and state.hugetlb is not None
    assert (state.period_us, state.processes, state.hugetlb[MIB2].current_bytes) == (None, None, None)


def test_a_controller_that_is_off_reads_as_none(tmp_path: Path) -> None:
    off = {name.replace(".", "__"): None for name in FILES if name.startswith(("cpuset", "hugetlb", "cpu.max"))}
    make(tmp_path, "c", **off, cpu__stat="usage_usec 7")
    state = reader(tmp_path).read("c")
    assert state is not None
    assert (state.cpus, state.cpus_effective, state.mems, state.partition) == (None, None, None, None)
    assert (state.hugetlb, state.quota_us, state.period_us, state.throttled_count) == (None, None, None, None)


def test_nothing_written_and_no_limit_are_told_from_no_controller(tmp_path: Path) -> None:
    make(tmp_path, "c", cpuset__cpus="", cpu__max="max 100000", cgroup__events="populated 0", cgroup__procs="")
    state = reader(tmp_path).read("c")
    assert state is not None
    assert (state.cpus, state.quota_us, state.period_us, state.populated) == (EMPTY, None, 100000, False)
    assert state.processes == 0


def test_a_kernel_without_limits_of_reservations_is_read(tmp_path: Path) -> None:
    make(tmp_path, "c", hugetlb__2MB__rsvd__max=None, hugetlb__2MB__rsvd__current=None, hugetlb__1GB__max=None)
    state = reader(tmp_path).read("c")
    assert state is not None and state.hugetlb is not None and list(state.hugetlb) == [MIB2]
    assert not state.hugetlb[MIB2].has_rsvd


@pytest.mark.parametrize(
    ("text", "partition", "why"),
    [
        ("isolated", "isolated", ""),
        ("root", "root", ""),
        ("isolated invalid (Parent is not a partition root)", "isolated", "Parent is not a partition root"),
        ("root invalid", "root", "invalid"),
    ],
)
def test_an_invalid_partition_says_why(tmp_path: Path, text: str, partition: str, why: str) -> None:
    make(tmp_path, "c", cpuset__cpus__partition=text)
    state = reader(tmp_path).read("c")
    assert state is not None and (state.partition, state.partition_invalid) == (partition, why)


def test_a_cgroup_that_is_gone_is_none(tmp_path: Path) -> None:
    """Never there, no folder any longer, and one whose files went while it was read."""
    assert reader(tmp_path).read("c") is None
    (tmp_path / "file").write_text("")
    assert reader(tmp_path).read("file/c") is None
    make(tmp_path, "c", cgroup__events=None)
    assert reader(tmp_path).read("c") is None


@pytest.mark.parametrize(
    ("file", "value", "shown"),
    [
        ("cpuset.cpus", "0-x", "'0-x'"),
        ("cpuset.cpus.effective", "3-1", "'3-1'"),
        ("cpuset.mems", "0 1", "'0 1'"),
        ("hugetlb.2MB.max", "-1", "'-1'"),
        ("hugetlb.2MB.rsvd.max", "lots", "'lots'"),
        ("hugetlb.1GB.current", "", "''"),
        ("hugetlb.1GB.events", "max many", "'many'"),
        ("cpu.max", "100000", "'100000'"),
        ("cpu.max", "none 100000", "'none'"),
        ("cpu.stat", "nr_throttled \u0663", "xd9"),
        ("cgroup.events", "populated yes", "'yes'"),
        ("cpuset.mems.effective", "9" * 5000, "'" + "9" * 80 + "'"),
    ],
)
def test_bad_content_is_named_with_file_and_value(tmp_path: Path, file: str, value: str, shown: str) -> None:
    folder = make(tmp_path, "c")
    (folder / file).write_text(f"{value}\n", encoding="utf-8")
    with pytest.raises(HostError) as refused:
        reader(tmp_path).read("c")
    assert str(refused.value).startswith(f"cannot read {folder}/{file}: ")
    assert shown in str(refused.value)


def test_long_lists_of_large_machines_are_read_whole(tmp_path: Path) -> None:
    every_other = CpuSet(range(0, 8000, 2))
    make(tmp_path, "c", cpuset__cpus=str(every_other), cgroup__procs="\n".join(map(str, range(5000))))
    state = reader(tmp_path).read("c")
    assert state is not None and state.cpus == every_other and state.processes == 5000


def test_a_round_over_250_containers_is_cheap_and_leaves_no_file_open(folder: Path) -> None:
    layout = CgroupLayout(driver=SYSTEMD)
    paths = [layout.container(str(uuid.UUID(int=n)), BURSTABLE, f"{n:064x}", "cri-containerd") for n in range(250)]
    for path in paths:
        make(folder, path)
    reads = reader(folder)
    gc.collect()  # what other tests left open
    before = len(os.listdir("/proc/self/fd"))
    figures = {}
    for name, parts in (("limits", CgroupPart.LIMITS), ("all", CgroupPart.ALL)):
        figures[name] = min(_cpu_ms(lambda parts=parts: [reads.read(path, parts) for path in paths]) for _ in range(3))
    figures["find"] = _cpu_ms(lambda: find(str(folder)))
    print(f"\n250 containers, CPU: {', '.join(f'{name} {ms:.1f} ms' for name, ms in figures.items())}")
    assert figures["limits"] <= ROUND_BUDGET_MS
    assert len(os.listdir("/proc/self/fd")) == before


def _cpu_ms(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return 1e3 * (time.process_time() - begun)


# Writing


def test_only_what_differs_is_written_and_in_a_safe_order(tmp_path: Path) -> None:
    """Limits fall first, those of reservations before the others; then nodes, then CPUs; then limits rise."""
    folder = make(tmp_path, "c", hugetlb__1GB__max="0", hugetlb__1GB__rsvd__max="0", hugetlb__2MB__rsvd__max="max")
    wanted = CgroupTarget(cpus=CpuSet([4, 5]), mems=CpuSet([1]), hugetlb={GIB: 2 * GIB, MIB2: 4 * MIB2})
    written = Writer(reader(tmp_path)).write("c", wanted)
    assert [(one.path.removeprefix(f"{folder}/"), one.before, one.value) for one in written] == [
        ("hugetlb.2MB.rsvd.max", "max", "8388608"),
        ("hugetlb.2MB.max", "max", "8388608"),
        ("cpuset.mems", "0", "1"),
        ("cpuset.cpus", "0-3", "4-5"),
        ("hugetlb.1GB.max", "0", "2147483648"),
        ("hugetlb.1GB.rsvd.max", "0", "2147483648"),
    ]
    assert said(folder, "cpuset.cpus", "hugetlb.1GB.rsvd.max") == ["4-5", "2147483648"]
    assert Writer(reader(tmp_path)).write("c", wanted) == ()


def test_what_is_not_wanted_stays(tmp_path: Path) -> None:
    folder = make(tmp_path, "c")
    Writer(reader(tmp_path)).write("c", CgroupTarget(mems=CpuSet([2])))
    assert said(folder, "cpuset.cpus", "cpuset.mems", "hugetlb.2MB.max") == ["0-3", "2", "max"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EBUSY, errno.EINVAL, errno.EACCES, errno.EROFS, errno.ENOENT])
def test_a_refused_write_says_path_cause_and_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    folder = make(tmp_path, "c")

    def refuse(handle: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cgroupset.os, "write", refuse)
    with pytest.raises(HostError) as refused:
        Writer(reader(tmp_path)).write("c", CgroupTarget(cpus=CpuSet([7])))
    assert str(refused.value) == f"cannot write {folder}/cpuset.cpus: {os.strerror(code)}, value '7'"


def test_what_cannot_be_written_to_is_said_and_never_made(tmp_path: Path) -> None:
    """A cgroup that is gone; a controller that is off."""
    with pytest.raises(HostError, match=r"cannot write .*/c: the cgroup is gone"):
        Writer(reader(tmp_path)).write("c", CgroupTarget(cpus=CpuSet([1])))
    folder = make(tmp_path, "c", cpuset__cpus=None, hugetlb__2MB__max=None, hugetlb__2MB__rsvd__max=None)
    for wanted, file in (
        (CgroupTarget(cpus=CpuSet([1])), "cpuset.cpus"),
        (CgroupTarget(hugetlb={MIB2: 0}), "hugetlb.2MB.rsvd.max"),
    ):
        with pytest.raises(HostError, match=f"cannot write .*{file}: No such file or directory, value"):
            Writer(reader(tmp_path)).write("c", wanted)
        assert not (folder / file).exists()


def test_a_limit_that_is_not_whole_pages_is_refused() -> None:
    """The kernel would round it, and it would look like drift indefinitely."""
    for limit in (MIB2 + 1, -MIB2):
        with pytest.raises(InputError, match=f"2MB: {limit} bytes"):
            CgroupTarget(hugetlb={MIB2: limit})


def test_drift_names_each_file_that_differs(tmp_path: Path) -> None:
    make(tmp_path, "c", cpuset__cpus__effective="0-1", hugetlb__1GB__max=None)
    state = reader(tmp_path).read("c", CgroupPart.LIMITS)
    assert state is not None
    wanted = CgroupTarget(cpus=CpuSet(range(4)), mems=CpuSet([0]), hugetlb={MIB2: 0, GIB: 0})
    assert drift(state, wanted) == (
        Drift(file="cpuset.cpus.effective", found="0-1", wanted="0-3"),
        Drift(file="hugetlb.2MB.max", found="max", wanted="0"),
        Drift(file="hugetlb.1GB.max", found="", wanted="0"),
        Drift(file="hugetlb.1GB.rsvd.max", found="", wanted="0"),
    )
    assert drift(state, CgroupTarget()) == ()


def built_chain(mount: Path, layout: CgroupLayout, **changed: str | None) -> str:
    path = layout.container(UID, BURSTABLE, ID, "crio")
    for one in (layout.top, layout.qos(BURSTABLE), layout.pod(UID, BURSTABLE), path):
        make(mount, one, **changed)
    return path


def test_limits_above_a_container_are_raised_and_never_lowered(tmp_path: Path) -> None:
    """Kubelet writes 0 into the pod's cgroup for sizes that the pod does not ask of kubelet."""
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    pod = make(tmp_path, layout.pod(UID, BURSTABLE), hugetlb__2MB__max="0", hugetlb__2MB__rsvd__max="0")
    top = make(tmp_path, layout.top, hugetlb__2MB__max=str(GIB), hugetlb__2MB__rsvd__max="max")
    written = Writer(reader(tmp_path)).raise_limits(layout, path, {MIB2: 8 * MIB2})
    files = ("hugetlb.2MB.max", "hugetlb.2MB.rsvd.max")
    assert said(pod, *files) == [str(8 * MIB2)] * 2
    assert said(top, *files) == [str(GIB), "max"]
    assert said(tmp_path / path, *files) == ["max", "0"]
    assert [one.path for one in written if str(pod) == os.path.dirname(one.path)] == [f"{pod}/{one}" for one in files]


def test_controllers_are_switched_on_where_they_are_off(tmp_path: Path) -> None:
    layout = CgroupLayout(driver=CGROUPFS)
    path = built_chain(tmp_path, layout)
    pod = make(tmp_path, layout.pod(UID, BURSTABLE), cgroup__subtree_control="cpu hugetlb")
    written = Writer(reader(tmp_path)).enable(layout, path)
    assert [(one.path, one.before, one.value) for one in written] == [
        (f"{pod}/cgroup.subtree_control", "cpu hugetlb", "+cpuset")
    ]
    make(tmp_path, layout.top, cgroup__controllers="cpu", cgroup__subtree_control="cpu")
    with pytest.raises(HostError, match=r"cannot enable cpuset in .*/kubepods: cgroup.controllers has only 'cpu'"):
        Writer(reader(tmp_path)).enable(layout, path)


def test_nothing_outside_kubepods_is_written(tmp_path: Path) -> None:
    writer, layout = Writer(reader(tmp_path)), CgroupLayout(driver=SYSTEMD)
    for path in ("system.slice/x.service", "kubepods.slice", "kubepods.slicer/x", ""):
        with pytest.raises(InputError, match="is not below kubepods"):
            writer.enable(layout, path)


def test_cpus_are_let_through_to_a_partition_and_kept_back_again(tmp_path: Path) -> None:
    """Another partition's CPUs stay let through. A file that keeps what is written stands for a kernel that agrees."""
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    top = make(tmp_path, layout.top, cpuset__cpus__exclusive="8-9")
    writer = Writer(reader(tmp_path))
    writer.isolate(layout, path, CpuSet([2, 3]))
    assert said(top, "cpuset.cpus.exclusive") == ["2-3,8-9"]
    assert said(tmp_path / path, "cpuset.cpus.exclusive", "cpuset.cpus.partition") == ["2-3", "isolated"]
    writer.release(layout, path, CpuSet([2, 3]))
    assert said(top, "cpuset.cpus.exclusive") == ["8-9"]
    assert said(tmp_path / path, "cpuset.cpus.exclusive", "cpuset.cpus.partition") == ["", "member"]


def test_a_partition_that_the_kernel_calls_invalid_is_undone_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)

    def kernel(file: str, value: str) -> None:
        put(file, f"{value} invalid (Cpu list in cpuset.cpus not exclusive)" if value == "isolated" else value)

    put = cgroupset.put
    monkeypatch.setattr(cgroupset, "put", kernel)
    with pytest.raises(HostError, match=r"cannot make a partition of .*: Cpu list in cpuset.cpus not exclusive, value"):
        Writer(reader(tmp_path)).isolate(layout, path, CpuSet([2]))
    assert said(tmp_path / path, "cpuset.cpus.partition", "cpuset.cpus.exclusive") == ["member", ""]
    assert said(tmp_path / layout.top, "cpuset.cpus.exclusive") == [""]


# The kernel's own


@dataclass(frozen=True)
class Real:
    """Cgroups of a test's own in the machine's unified hierarchy."""

    mount: str
    layout: CgroupLayout

    def make(self, path: str) -> Path:
        """A cgroup and those above it, all with the controllers of the one above."""
        folder = Path(self.mount)
        for part in path.split("/"):
            on = " ".join(f"+{one}" for one in (folder / "cgroup.controllers").read_text().split() if one in WANT)
            if folder != Path(self.mount):
                (folder / "cgroup.subtree_control").write_text(on)
            folder /= part
            folder.mkdir(exist_ok=True)
        return folder


WANT = ("cpuset", "hugetlb")


@pytest.fixture
def real() -> Iterator[Real]:
    mount = next(
        (one for one in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if Path(one, "cgroup.procs").exists()), ""
    )
    if not mount or not Path(mount, "cgroup.controllers").exists() or not os.access(mount, os.W_OK) or os.geteuid():
        pytest.skip("no unified cgroup hierarchy that may be written to")
    own = CgroupLayout(driver=CGROUPFS, cgroup_root=f"/na-test-{uuid.uuid4().hex[:8]}")
    with contextlib.ExitStack() as stack:
        handle = os.open(mount, os.O_RDONLY)
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)  # one test at a time switches controllers of the whole machine
        control = Path(mount, "cgroup.subtree_control")
        try:
            for one in set(Path(mount, "cgroup.controllers").read_text().split()) & set(WANT):
                if one not in control.read_text().split():
                    control.write_text(f"+{one}")
                    stack.callback(control.write_text, f"-{one}")
            stack.callback(_remove_all, Path(mount, own.cgroup_root[1:]))
            Path(mount, own.cgroup_root[1:]).mkdir()
        except OSError as error:
            pytest.skip(f"no cgroup can be made below {mount}: {error.strerror}")
        yield Real(mount, own)


def _remove_all(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        os.rmdir(path)


def needs(real: Real, controller: str) -> None:
    if controller not in Path(real.mount, "cgroup.controllers").read_text().split():
        pytest.skip(f"{real.mount} has no {controller} controller")


def test_the_kernels_own_files_are_read(real: Real) -> None:
    needs(real, "hugetlb")
    path = real.layout.container(UID, BURSTABLE, ID)
    real.make(path)
    assert [one.kind for one in find(real.mount, real.layout.cgroup_root)] == [POD, CONTAINER]
    state = CgroupReader(real.mount, page_sizes(SysFs())).read(path)
    assert state is not None and not state.populated and state.processes == 0
    assert state.hugetlb is not None and tuple(state.hugetlb) == page_sizes(SysFs())
    pages = state.hugetlb[page_sizes(SysFs())[0]]
    assert (pages.max_bytes, pages.rsvd_max_bytes, pages.has_rsvd) == (None, None, True)
    assert (pages.current_bytes, pages.failures) == (0, 0)


def test_a_live_process_is_seen_in_a_real_cgroup(real: Real) -> None:
    path = real.layout.container(UID, GUARANTEED, ID)
    folder = real.make(path)
    reads = CgroupReader(real.mount, ())
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        (folder / "cgroup.procs").write_text(str(process.pid))
        state = reads.read(path)
        assert state is not None and (state.processes, state.populated) == (1, True)
        process.communicate()
    (folder).rmdir()
    assert reads.read(path) is None


def test_the_kernel_takes_hugepage_limits(real: Real) -> None:
    """A pod's limit of 0 is raised; what is written reads back as no drift; a second write writes nothing."""
    needs(real, "hugetlb")
    sizes = page_sizes(SysFs())
    page = sizes[0]
    path = real.layout.container(UID, BURSTABLE, ID)
    pod = real.make(path).parent
    for file in ("max", "rsvd.max"):
        (pod / f"hugetlb.{size_name(page)}.{file}").write_text("0")
    reads = CgroupReader(real.mount, sizes)
    writer, wanted = Writer(reads), CgroupTarget(hugetlb={page: 4 * page})
    assert len(writer.raise_limits(real.layout, path, wanted.hugetlb)) == 2
    assert len(writer.write(path, wanted)) == 2
    state = reads.read(path, CgroupPart.LIMITS)
    assert state is not None and drift(state, wanted) == ()
    assert writer.write(path, wanted) == () == writer.raise_limits(real.layout, path, wanted.hugetlb)
    with pytest.raises(HostError, match=r"hugetlb\..*\.max: Invalid argument, value 'lots'"):
        cgroupset.put(f"{pod}/hugetlb.{size_name(page)}.max", "lots")


def test_the_kernel_switches_controllers_on(real: Real) -> None:
    needs(real, "hugetlb")
    path = real.layout.container(UID, BURSTABLE, ID)
    folder = real.make(path)
    for above in (folder.parent, folder.parent.parent):
        (above / "cgroup.subtree_control").write_text("-hugetlb")
    reads = CgroupReader(real.mount, page_sizes(SysFs()))
    state = reads.read(path)
    assert state is not None and state.hugetlb is None
    written = Writer(reads).enable(real.layout, path, ("hugetlb",))
    assert [Path(one.path).parent for one in written] == [folder.parent.parent, folder.parent]
    state = reads.read(path)
    assert state is not None and state.hugetlb is not None


def test_the_kernel_pins_a_container(real: Real) -> None:
    needs(real, "cpuset")
    path = real.layout.container(UID, BURSTABLE, ID)
    folder = real.make(path)
    reads, last = CgroupReader(real.mount, ()), CpuSet([max(os.sched_getaffinity(0))])
    wanted = CgroupTarget(cpus=last, mems=CpuSet([0]))
    Writer(reads).write(path, wanted)
    state = reads.read(path, CgroupPart.LIMITS)
    assert state is not None and drift(state, wanted) == ()
    (folder.parent / "cpuset.cpus").write_text("0")
    state = reads.read(path, CgroupPart.LIMITS)
    assert state is not None and [one.file for one in drift(state, wanted)] == ["cpuset.cpus.effective"]
    with pytest.raises(HostError, match=r"cannot write .*/cpuset.cpus: .*, value '8191'"):
        Writer(reads).write(path, CgroupTarget(cpus=CpuSet([8191])))


def test_the_kernel_makes_a_partition(real: Real) -> None:
    needs(real, "cpuset")
    path = real.layout.container(UID, BURSTABLE, ID)
    if not (real.make(path) / "cpuset.cpus.exclusive").exists():
        pytest.skip("this kernel has no cpuset.cpus.exclusive (Linux 6.7)")
    cpus = CpuSet([max(os.sched_getaffinity(0))])
    reads = CgroupReader(real.mount, ())
    Writer(reads).write(path, CgroupTarget(cpus=cpus))
    Writer(reads).isolate(real.layout, path, cpus)
    state = reads.read(path)
    assert state is not None and (state.partition, state.partition_invalid) == (cgroup.ISOLATED, "")
    assert state.cpus_effective == cpus
    Writer(reads).release(real.layout, path, cpus)
    state = reads.read(path)
    assert state is not None and state.partition == cgroup.MEMBER
    assert said(Path(real.mount, real.layout.top), "cpuset.cpus.exclusive") == [""]


# Watching


async def until(watch: Watch, wanted: Callable[[list[CgroupChange]], bool]) -> list[CgroupChange]:
    """All changes up to the one that makes `wanted` true."""
    seen: list[CgroupChange] = []
    while not wanted(seen):
        seen += await watch.changes()
    return seen


def told(seen: list[CgroupChange]) -> list[tuple[str, str, str]]:
    return [(one.what, one.path, one.file) for one in seen]


@dataclass(frozen=True)
class Place:
    """A hierarchy to watch, built or the kernel's."""

    mount: str
    layout: CgroupLayout
    make: Callable[[str], Path]
    write: Callable[[Path], str]


@pytest.fixture(params=["built", "real"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "built":
        return Place(
            str(tmp_path),
            CgroupLayout(driver=CGROUPFS, cgroup_root="/own"),
            lambda path: make(tmp_path, path),
            lambda folder: _write(folder, "cpuset.cpus", "1"),
        )
    real: Real = request.getfixturevalue("real")
    needs(real, "hugetlb")
    file = f"hugetlb.{size_name(page_sizes(SysFs())[0])}.max"
    return Place(real.mount, real.layout, real.make, lambda folder: _write(folder, file, "0"))


def _write(folder: Path, file: str, value: str) -> str:
    (folder / file).write_text(value)
    return file


async def test_a_watch_begins_with_all_there_is_and_tells_of_what_comes_goes_and_is_written(place: Place) -> None:
    """Also of kubepods itself, which comes after the watch; and of a cgroup that is re-created."""
    first, second = (place.layout.container(UID, qos, ID) for qos in (GUARANTEED, BURSTABLE))
    place.make(first)
    with Watch(place.mount, [place.layout], poll_s=LONG_S) as watch:
        seen = await until(watch, bool)
        assert [one.path for one in seen if one.what == CAME] == [place.layout.top, os.path.dirname(first), first]
        folder = place.make(second)
        seen = await until(watch, lambda seen: (CAME, second, "") in told(seen))
        assert {one.path for one in seen if one.what == CAME} == {
            place.layout.qos(BURSTABLE),
            os.path.dirname(second),
            second,
        }
        cgroup_of_it = next(one.cgroup for one in seen if one.path == second)
        assert cgroup_of_it is not None and cgroup_of_it.container_id == ID
        file = place.write(folder)
        await until(watch, lambda seen: (WRITTEN, second, file) in told(seen))
        _remove(folder)
        await until(watch, lambda seen: (GONE, second, "") in told(seen))
        place.make(second)
        await until(watch, lambda seen: (CAME, second, "") in told(seen))


def _remove(folder: Path) -> None:
    if (folder / "cgroup.events").is_file() and not str(folder).startswith("/sys/"):
        for one in folder.iterdir():
            one.unlink()
    folder.rmdir()


async def test_a_write_to_a_pod_is_told_and_other_files_are_not(tmp_path: Path) -> None:
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    pod = layout.pod(UID, BURSTABLE)
    with Watch(str(tmp_path), layouts(), poll_s=LONG_S) as watch:
        await watch.changes()
        (tmp_path / path / "cgroup.procs").write_text("77\n")
        (tmp_path / pod / "cpuset.mems").write_text("1\n")
        seen = await watch.changes()
    assert told(list(seen)) == [(WRITTEN, pod, "cpuset.mems")]
    assert seen[0].cgroup is not None and seen[0].cgroup.kind == POD


async def test_kubepods_and_what_lies_above_it_may_come_later(tmp_path: Path) -> None:
    layout = CgroupLayout(driver=SYSTEMD, cgroup_root="/a/b")
    with Watch(str(tmp_path), [layout], poll_s=LONG_S) as watch:
        waiting = asyncio.create_task(
            until(watch, lambda seen: any(one.path.endswith(f"crio-{ID}.scope") for one in seen))
        )
        await asyncio.wait({waiting}, timeout=0)
        path = built_chain(tmp_path, layout)
        seen = await waiting
    came = (layout.top, layout.qos(BURSTABLE), layout.pod(UID, BURSTABLE), path)
    assert [one.path for one in seen if one.what == CAME] == list(came)


async def test_nothing_inside_a_container_is_watched(tmp_path: Path) -> None:
    """Who runs there could use up all watches."""
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    make(tmp_path, f"{path}/inside")
    with Watch(str(tmp_path), [layout], poll_s=LONG_S) as watch:
        await watch.changes()
        make(tmp_path, f"{path}/inside", cpuset__cpus="1")
        make(tmp_path, f"{path}/more")
        (tmp_path / path / "cpuset.cpus").write_text("1\n")
        assert told(list(await watch.changes())) == [(WRITTEN, path, "cpuset.cpus")]


async def test_cgroups_that_come_and_go_in_a_storm_are_all_known_at_the_end(folder: Path) -> None:
    """A thousand are made and half of them removed, some more than once, while the watch reads along."""
    layout = CgroupLayout(driver=CGROUPFS)
    pods = [layout.pod(str(uuid.UUID(int=n)), GUARANTEED) for n in range(200)]

    def storm() -> None:
        for n, pod in enumerate(pods):
            for container in range(4):
                (folder / pod / f"{container:064x}").mkdir(parents=True)
            for container in range(n % 4):
                (folder / pod / f"{container:064x}").rmdir()
            if n % 5 == 0:
                (folder / pod / f"{3:064x}").rmdir()
                (folder / pod / f"{3:064x}").mkdir()

        (folder / last).mkdir()

    there: set[str] = set()
    last = layout.pod(UID, GUARANTEED)
    with Watch(str(folder), [layout], poll_s=LONG_S) as watch:
        writing = asyncio.create_task(asyncio.to_thread(storm))
        while last not in there:
            for one in await watch.changes():
                assert one.what in (CAME, GONE)
                (there.add if one.what == CAME else there.discard)(one.path)
        await writing
    assert {one.path for one in find(str(folder))} == there - {layout.top}
    assert len(there) == 2 + 200 + sum(4 - n % 4 for n in range(200))


async def test_giving_up_the_wait_loses_nothing(tmp_path: Path) -> None:
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    with Watch(str(tmp_path), [layout], poll_s=LONG_S) as watch:
        await watch.changes()
        waiting = asyncio.create_task(watch.changes())
        await asyncio.wait({waiting}, timeout=0.01)
        (tmp_path / path / "cpuset.cpus").write_text("2\n")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (WRITTEN, path, "cpuset.cpus") in told(list(await watch.changes()))


async def test_lost_events_make_everything_be_looked_at_again(tmp_path: Path) -> None:
    """What came and went among those that were lost is told all the same."""
    queue = SysFs().number("proc/sys/fs/inotify/max_queued_events") or 0
    if queue > 1 << 16:
        pytest.skip(f"the queue holds {queue} events, too many to fill here")
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    with Watch(str(tmp_path), [layout], poll_s=LONG_S) as watch, capture_logs() as logs:
        await watch.changes()
        handles = [os.open(tmp_path / path / name, os.O_WRONLY) for name in ("cpuset.cpus", "cpuset.mems")]
        for n in range(queue + 10):
            os.write(handles[n % 2], b"")
            os.pwrite(handles[n % 2], b"0", 0)
        for handle in handles:
            os.close(handle)
        other = layout.container(UID, GUARANTEED, ID, "crio")
        make(tmp_path, other)
        for one in (tmp_path / path).iterdir():
            one.unlink()
        (tmp_path / path).rmdir()
        seen = await until(watch, lambda seen: (CAME, other, "") in told(seen))
    assert {(LOOK, "", ""), (GONE, path, "")} <= set(told(seen))
    assert [one["event"] for one in logs] == ["cgroup-events-lost"]


@pytest.mark.parametrize("broken", ["add_watch", "__init__"])
async def test_without_inotify_the_poll_is_left_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    if broken == "__init__":
        monkeypatch.setattr("nodeagent.host.cgroup.watch.Inotify", refuse)
    else:
        monkeypatch.setattr(Inotify, broken, refuse)
    with capture_logs() as logs, Watch(str(tmp_path), [layout], poll_s=0.02) as watch:
        assert (CAME, path, "") in told(list(await watch.changes()))
        other = layout.container(UID, GUARANTEED, ID, "crio")
        make(tmp_path, other)
        seen = await until(watch, lambda seen: (CAME, other, "") in told(seen))
        assert (LOOK, "", "") in told(seen)
    assert [(one["event"], one["error"]) for one in logs] == [("cgroup-not-watched", "No space left on device")]


async def test_every_poll_says_to_look(tmp_path: Path) -> None:
    """Also while other things keep happening."""
    layout = CgroupLayout(driver=SYSTEMD)
    path = built_chain(tmp_path, layout)
    with Watch(str(tmp_path), [layout], poll_s=0.05) as watch:
        await watch.changes()
        looks = 0
        while looks < 2:
            (tmp_path / path / "cpuset.cpus").write_text("2\n")
            looks += [one.what for one in await watch.changes()].count(LOOK)
