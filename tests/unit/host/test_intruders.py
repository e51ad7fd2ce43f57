"""Who else runs on exclusive CPUs: threads of the host, interrupts; on built trees and on this machine."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.errors import HostError, InputError
from nodeagent.host.cgroup import write as cgroupset
from nodeagent.host.irq.intruders import interrupt_names, irqs, move_irq, threads
from nodeagent.host.sysfs.sysfs import SysFs

KTHREAD, BOUND = 0x00208040, 0x04208040
POD = "/kubepods.slice/kubepods-podx.slice/cri-containerd-1.scope"
INTERRUPTS = """\
           CPU0       CPU1       CPU2
  0:         36          0          0   IO-APIC   2-edge      timer
  8:          0          0          0   IO-APIC   8-edge      rtc0
 16:          0          4          0   IR-IO-APIC  16-fasteoi   i801_smbus, ehci_hcd:usb1
 27:          0          1          0   PCI-MSIX-0000:00:01.0   0-edge      nvme0q1
 28:          0          1          0   IR-PCI-MSI 524288-edge      eth0-TxRx-0
 29:          7          1          2     GICv3  27 Level     arch_timer
 30:          0          0          0   PCI-MSI 5-edge
NMI:          0          0          0   Non-maskable interrupts
ERR:          0
"""


def thread(root: Path, pid: int, cpus: str, *, tid: int = 0, name: str = "sshd", flags: int = 0x400000) -> Path:
    """One thread of a process whose cgroup is the host's; its name may hold anything but a line end."""
    folder = root / f"proc/{pid}/task/{tid or pid}"
    folder.mkdir(parents=True)
    (folder / "status").write_text(
        f"Name:\t{name}\nUmask:\t0022\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t0\n"
    )
    (folder / "stat").write_text(f"{tid or pid} ({name}) S 1 1 1 0 -1 {flags} 0 0 0 0\n")
    in_cgroup(root, pid, "/system.slice/ssh.service")
    return folder


def in_cgroup(root: Path, pid: int, path: str) -> None:
    (root / f"proc/{pid}/cgroup").write_text(f"0::{path}\n")


def irq(root: Path, number: int, **files: str) -> None:
    folder = root / f"proc/irq/{number}"
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is warned of; nothing, unless a test takes it out."""
    found: list[str] = []
    yield found
    assert not found


def test_threads_of_the_host_that_may_run_there_are_named(tmp_path: Path, warnings: list[str]) -> None:
    """Each thread by itself; those that keep away and those of pods are not."""
    thread(tmp_path, 100, "0-7")
    thread(tmp_path, 100, "3", tid=101, name="a (b) c")
    thread(tmp_path, 100, "0-1", tid=102)
    thread(tmp_path, 200, "0-7", name="app")
    in_cgroup(tmp_path, 200, POD)
    found = threads(SysFs(tmp_path), CpuSet([3, 4]), warnings)
    assert [(one.pid, one.tid, one.comm, str(one.cpus), str(one.hits)) for one in found] == [
        (100, 100, "sshd", "0-7", "3-4"),
        (100, 101, "a (b) c", "3", "3"),
    ]
    assert all((one.cgroup, one.kernel, one.movable) == ("/system.slice/ssh.service", False, True) for one in found)


def test_kernel_threads_of_one_cpu_belong_there_and_others_do_not(tmp_path: Path, warnings: list[str]) -> None:
    thread(tmp_path, 20, "3", name="migration/3", flags=BOUND)
    thread(tmp_path, 21, "0-7", name="kworker/u16:0", flags=BOUND)
    thread(tmp_path, 22, "0-7", name="kswapd0", flags=KTHREAD)
    thread(tmp_path, 23, "3", name="pinned by hand")
    found = threads(SysFs(tmp_path), CpuSet([3]), warnings)
    assert [(one.comm, one.kernel, one.movable) for one in found] == [
        ("kworker/u16:0", True, False),
        ("kswapd0", True, True),
        ("pinned by hand", False, True),
    ]


def test_a_pod_is_known_in_any_hierarchy(tmp_path: Path, warnings: list[str]) -> None:
    thread(tmp_path, 1, "0-7")
    (tmp_path / "proc/1/cgroup").write_text("9:cpuset:/kubepods/burstable/podx/y\n0::/\n")
    assert threads(SysFs(tmp_path), CpuSet([3]), warnings) == ()


def test_a_static_pod_is_no_intruder_in_a_cgroup_namespace(tmp_path: Path, warnings: list[str]) -> None:
    thread(tmp_path, 1, "0-7")
    in_cgroup(tmp_path, 1, f"/../../pod{'0123456789abcdef' * 2}/{'ab' * 32}")
    thread(tmp_path, 2, "0-7", name="host")
    in_cgroup(tmp_path, 2, "/../../../../system.slice/ssh.service")
    assert [one.comm for one in threads(SysFs(tmp_path), CpuSet([3]), warnings)] == ["host"]


def test_no_exclusive_cpus_have_no_intruders(tmp_path: Path, warnings: list[str]) -> None:
    thread(tmp_path, 1, "0-7")
    irq(tmp_path, 1, effective_affinity_list="0", smp_affinity_list="0")
    assert threads(SysFs(tmp_path), EMPTY, warnings) == () == irqs(SysFs(tmp_path), EMPTY, warnings)


def test_processes_that_end_meanwhile_are_passed_over(tmp_path: Path, warnings: list[str]) -> None:
    (thread(tmp_path, 1, "0-7") / "stat").unlink()
    (thread(tmp_path, 2, "0-7") / "status").unlink()
    (tmp_path / "proc/3").mkdir()
    thread(tmp_path, 4, "0-7")
    assert [one.pid for one in threads(SysFs(tmp_path), CpuSet([3]), warnings)] == [4]


def test_one_bad_file_is_named_and_costs_one_thread(tmp_path: Path) -> None:
    status = thread(tmp_path, 1, "0-x") / "status"
    stat = thread(tmp_path, 2, "0-7") / "stat"
    stat.write_text("2 (x) S 1\n")
    other = thread(tmp_path, 3, "0-7") / "status"
    other.write_text("what is this\n")
    thread(tmp_path, 4, "0-7")
    warnings: list[str] = []
    assert [one.pid for one in threads(SysFs(tmp_path), CpuSet([3]), warnings)] == [4]
    assert [str(path) in line for path, line in zip((status, stat, other), warnings, strict=True)] == [True] * 3


def test_a_real_thread_of_this_machine_is_seen(warnings: list[str]) -> None:
    """A process of the test's own, pinned to one CPU."""
    cpu = max(os.sched_getaffinity(0))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"0")
        assert process.stdout.read(1) == b"0"  # its name is that of its parent until its first instruction
        os.sched_setaffinity(process.pid, {cpu})
        found = threads(SysFs(), CpuSet([cpu]), warnings)
        others = threads(SysFs(), CpuSet([cpu + 1]), warnings)
        process.communicate()
    mine = [one for one in found if one.pid == process.pid]
    assert [(one.comm, one.cpus, one.kernel) for one in mine] in ([("cat", CpuSet([cpu]), False)], [])
    assert mine or SysFs().text("proc/self/cgroup", "").count("kubepods")
    assert process.pid not in [one.pid for one in others]
    assert not [one.comm for one in found if one.comm.startswith(("migration/", "ksoftirqd/"))]


def test_interrupts_are_named_as_the_kernel_names_them(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/interrupts").write_text(INTERRUPTS)
    assert interrupt_names(SysFs(tmp_path)) == {
        0: "timer",
        8: "rtc0",
        16: "i801_smbus, ehci_hcd:usb1",
        27: "nvme0q1",
        28: "eth0-TxRx-0",
        29: "arch_timer",
        30: "",
    }
    assert interrupt_names(SysFs(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Hyper-V PCIe MSI 4194304-edge      mlx5_async0@pci:0001:00:02.0", "mlx5_async0@pci:0001:00:02.0"),
        ("SiFive PLIC   10 Edge      ttyS0", "ttyS0"),
        ("RISC-V INTC   5 Edge      riscv-timer", "riscv-timer"),
        ("riscv-imsic   3 Edge      nvme0q0", "nvme0q0"),
        ("xen-dyn    -event     eth0-q0-tx", "eth0-q0-tx"),
        ("xen-percpu    -virq      timer0", "timer0"),
        ("xen-pirq    -ioapic-level  acpi, ahci[0000:00:1f.2]", "acpi, ahci[0000:00:1f.2]"),
        ("OPAL EVT   0 Level     0opal", "0opal"),
        ("GPIO stub   7 Level    -fasteoi   Power Button", "Power Button"),
        ("ITS-PCI-MSIX-0000:01:00.0   1 Edge      hns3-0000:7d:00.0-TxRx-0", "hns3-0000:7d:00.0-TxRx-0"),
        ("IO-APIC-edge      timer", "timer"),
        ("PCI-MSI  mlx5_comp0", "mlx5_comp0"),
        ("-   4-edge      serial", "serial"),
        ("SiFive PLIC   11 Edge", ""),
        ("Hyper-V PCIe MSI 4194306-edge", ""),
        ("xen-dyn    -event", ""),
        ("None", ""),
    ],
)
def test_names_stand_behind_chips_of_any_number_of_words(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/interrupts").write_text(f"     CPU0       CPU1\n 24:     0     5   {line}      \n")
    assert interrupt_names(SysFs(tmp_path)) == {24: name}


def sysfs_irq(root: Path, number: int, **files: str) -> None:
    folder = root / f"sys/kernel/irq/{number}"
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_the_kernels_own_list_of_actions_comes_before_the_table(tmp_path: Path) -> None:
    """The table has one column too many for its chip's name; it is read for what has no list."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/interrupts").write_text(
        "     CPU0\n 1:   0   chip  9  x  y\n 2:   0   chip  9   5 Edge      eth0\n 3:  0   gone   1-edge      z\n"
    )
    sysfs_irq(tmp_path, 1, actions="i801_smbus,ehci_hcd:usb1", chip_name="chip  9")
    sysfs_irq(tmp_path, 2, chip_name="chip  9")
    sysfs_irq(tmp_path, 4, actions="", chip_name="dummy")
    assert interrupt_names(SysFs(tmp_path)) == {1: "i801_smbus, ehci_hcd:usb1", 2: "eth0", 3: "z", 4: ""}


def test_a_list_of_actions_that_cannot_be_read_leaves_the_table(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/interrupts").write_text(INTERRUPTS)
    (tmp_path / "sys/kernel/irq/27/actions").mkdir(parents=True)
    (tmp_path / "sys/kernel/irq/27/chip_name").mkdir()
    assert interrupt_names(SysFs(tmp_path))[27] == "nvme0q1"


def test_interrupts_that_are_delivered_there_are_named(tmp_path: Path, warnings: list[str]) -> None:
    """By where they go, not by where they might; an older kernel says only the latter."""
    irq(tmp_path, 27, effective_affinity_list="3", smp_affinity_list="0-7")
    irq(tmp_path, 28, effective_affinity_list="1", smp_affinity_list="0-7")
    irq(tmp_path, 29, smp_affinity_list="2-3")
    irq(tmp_path, 30, effective_affinity_list="", smp_affinity_list="0-7")
    irq(tmp_path, 31)
    (tmp_path / "proc/interrupts").write_text(INTERRUPTS)
    found = irqs(SysFs(tmp_path), CpuSet([3, 4]), warnings)
    assert [(one.irq, one.name, str(one.cpus), str(one.asked), str(one.hits)) for one in found] == [
        (27, "nvme0q1", "3", "0-7", "3"),
        (29, "arch_timer", "2-3", "2-3", "3"),
    ]


def test_one_bad_interrupt_is_named_and_costs_no_other(tmp_path: Path) -> None:
    irq(tmp_path, 1, effective_affinity_list="x", smp_affinity_list="0")
    irq(tmp_path, 2, effective_affinity_list="3", smp_affinity_list="3")
    warnings: list[str] = []
    assert [one.irq for one in irqs(SysFs(tmp_path), CpuSet([3]), warnings)] == [2]
    assert len(warnings) == 1 and "proc/irq/1/effective_affinity_list" in warnings[0]


def test_this_machines_interrupts_are_read(warnings: list[str]) -> None:
    """The kernel's lists agree with what is read of them."""
    sysfs = SysFs()
    online = sysfs.cpus("sys/devices/system/cpu/online") or EMPTY
    if not sysfs.names("proc/irq"):
        pytest.skip("this machine shows no interrupts in /proc/irq")
    found = irqs(sysfs, online, warnings)
    assert all(one.cpus <= online and one.cpus == one.hits for one in found)
    assert {one.irq for one in found} <= {number for number, _ in sysfs.numbered("proc/irq", "")}


def test_an_interrupt_is_moved_away(tmp_path: Path) -> None:
    irq(tmp_path, 27, effective_affinity_list="1", smp_affinity_list="0-7")
    assert move_irq(SysFs(tmp_path), 27, CpuSet([0, 1])) == CpuSet([1])
    assert (tmp_path / "proc/irq/27/smp_affinity_list").read_text() == "0-1\n"
    irq(tmp_path, 28, smp_affinity_list="0-7")
    assert move_irq(SysFs(tmp_path), 28, CpuSet([2])) == CpuSet([2])


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.EIO, "manages this interrupt"),
        (errno.EPERM, "manages this interrupt"),
        (errno.ENOSPC, "have no free vectors"),
        (errno.EINVAL, ", value '0'"),
    ],
)
def test_an_interrupt_that_cannot_be_moved_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, why: str
) -> None:
    def refuse(handle: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    irq(tmp_path, 27, smp_affinity_list="0-7")
    monkeypatch.setattr(cgroupset.os, "write", refuse)
    with pytest.raises(HostError) as refused:
        move_irq(SysFs(tmp_path), 27, CpuSet([0]))
    path = tmp_path / "proc/irq/27/smp_affinity_list"
    assert str(refused.value).startswith(f"cannot write {path}: {os.strerror(code)}, value '0'")
    assert str(refused.value).endswith(why)


@pytest.mark.parametrize(("mode", "managed"), [(0o444, True), (0o644, False)])
def test_a_file_that_nobody_may_write_is_of_an_interrupt_that_the_kernel_manages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, managed: bool
) -> None:
    """As Linux 6.12 has it; without CAP_DAC_OVERRIDE it cannot be opened."""

    def open_(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    irq(tmp_path, 27, smp_affinity_list="0-7")
    (tmp_path / "proc/irq/27/smp_affinity_list").chmod(mode)
    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(HostError, match="Permission denied, value '0'") as refused:
        move_irq(SysFs(tmp_path), 27, CpuSet([0]))
    assert str(refused.value).endswith("manages this interrupt") == managed


def test_an_interrupt_that_is_gone_or_has_nowhere_to_go_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="irq/27/smp_affinity_list: No such file"):
        move_irq(SysFs(tmp_path), 27, CpuSet([0]))
    with pytest.raises(InputError, match="cannot move interrupt 27: no CPUs are left"):
        move_irq(SysFs(tmp_path), 27, EMPTY)
