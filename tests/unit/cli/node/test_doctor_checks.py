"""Each check of `nodeagent doctor`: a node on which it is well, and one on which it is not."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nodeagent.cli.node.doctor import agent
from nodeagent.cli.node.doctor.model import Finding, State, examine
from nodeagent.cli.node.doctor.probes import DiskSpace
from nodeagent.cli.node.doctor.registry import CHECKS
from nodeagent.config.load import load
from nodeagent.version import VERSION
from tests.builders.doctor_node import GPU, BuiltNode
from tests.support.paths import CHECKOUT

BY_NAME = {check.name: check for check in CHECKS}
OK, WARNING, FAILURE, UNKNOWN, SKIPPED = State.OK, State.WARNING, State.FAILURE, State.UNKNOWN, State.SKIPPED
Make = Callable[[BuiltNode], object]


def found(name: str, built: BuiltNode) -> Finding:
    return examine(BY_NAME[name], built.node())


def done(*steps: object) -> None:
    """Several steps in a lambda."""


def listen(built: BuiltNode, mode: int = 0o660) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(built.socket))
    os.chmod(built.socket, mode)


def unit(built: BuiltNode, shown: str) -> None:
    built.write("etc/systemd/system/nodeagent.service", "[Service]")
    built.probes["systemctl"] = shown


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def vfio(built: BuiltNode) -> None:
    built.devices.pci(GPU, driver="vfio-pci", group=3)
    link(built.root / f"sys/bus/pci/drivers/vfio-pci/{GPU}", f"../../devices/{GPU}")
    built.devices.node("/dev/vfio/vfio")


def virtual_function(built: BuiltNode) -> None:
    built.devices.pci("0000:5e:00.0", driver="ice", numa_node=0)
    built.devices.vf("0000:5e:00.0", 0, "0000:5e:01.0")


def damage(built: BuiltNode) -> None:
    built.grant("4-5")
    path = built.state_dir / "ledger.db"
    path.write_bytes(path.read_bytes()[:100] + b"garbage" * 1000)


def newer(built: BuiltNode) -> None:
    built.grant("4-5")
    db = sqlite3.connect(built.state_dir / "ledger.db")
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()


def state_mode(built: BuiltNode, mode: int) -> None:
    built.state_dir.mkdir()
    built.state_dir.chmod(mode)


def lost(built: BuiltNode) -> None:
    built.grant("4-5")
    (built.state_dir / "ledger.lock").write_text("7\nit was replaced by an older copy\n")


def governor(built: BuiltNode, name: str) -> None:
    for cpu in range(8):
        built.write(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor", name)


CPUS_BY_CLAIM = [{"name": "cpu", "kind": "cpu", "serve": "dra"}]
PAGES = [{"name": "pages", "kind": "hugepages", "pageSize": "2Mi"}]
POOL = [{"pageSize": "2Mi", "node": 0, "pages": 4}]
NODE0 = "sys/devices/system/node/node0/hugepages/hugepages-2048kB"
ACTIVE = "LoadState=loaded\nActiveState=active\nSubState=running\nNRestarts=0\nUnitFileState=enabled\n"
CDI_ON = '[plugins."io.containerd.cri.v1.runtime"]\nenable_cdi = true\n'
STATIC = "cpuManagerPolicy: static\nreservedSystemCPUs: '0'\n"


def pool(built: BuiltNode, pages: int) -> None:
    for name in ("nr_hugepages", "free_hugepages"):
        built.write(f"{NODE0}/{name}", str(pages))
    built.write(f"{NODE0}/surplus_hugepages", "0")


class Case(NamedTuple):
    """Nodes on which a check ends well, and otherwise."""

    well: Make
    otherwise: Make
    state: State
    word: str
    """Something that is said of the second node."""


CASES = {
    "unit.state": Case(
        lambda n: unit(n, ACTIVE), lambda n: unit(n, ACTIVE.replace("=active", "=failed")), FAILURE, "has failed"
    ),
    "unit.drop-ins": Case(
        lambda n: unit(n, ""),
        lambda n: done(unit(n, ""), n.configure(metrics={"listen": "127.0.0.1:9464"})),
        FAILURE,
        "nodeagent-metrics.conf",
    ),
    "agent.answers": Case(lambda n: n.answer(), lambda n: None, WARNING, "no agent answers"),
    "agent.ready": Case(lambda n: n.answer(), lambda n: n.answer(not_ready=["waiting"]), FAILURE, "waiting"),
    "agent.resources": Case(
        lambda n: n.answer(refused={}), lambda n: n.answer(refused={"gpu": "others"}), FAILURE, "gpu: others"
    ),
    "agent.notes": Case(lambda n: n.answer(), lambda n: n.answer(notes=["look"]), WARNING, "look"),
    "agent.version": Case(lambda n: n.answer(), lambda n: n.answer(version="0.0.1"), WARNING, VERSION),
    "agent.configuration": Case(
        lambda n: n.configure(domain="a.b"), lambda n: n.configure(domian="a.b"), FAILURE, "did you mean domain"
    ),
    "agent.socket": Case(listen, lambda n: listen(n, 0o666), FAILURE, "0666"),
    "agent.metrics": Case(
        lambda n: n.configure(metrics={"listen": "127.0.0.1:9464"}),
        lambda n: done(n.configure(metrics={"listen": "127.0.0.1:9464"}), n.probes.update(answers=True)),
        WARNING,
        "127.0.0.1:9464",
    ),
    "agent.boot": Case(lambda n: n.answer(), lambda n: n.answer(boot_id="another"), FAILURE, "this boot is"),
    "kubelet.process": Case(lambda n: n.kubelet(), lambda n: None, WARNING, "no kubelet"),
    "kubelet.configuration": Case(
        lambda n: n.kubelet("cpuManagerPolicy: none\n"), lambda n: n.kubelet("a: [\n"), FAILURE, "cannot read"
    ),
    "kubelet.cpu-manager": Case(lambda n: n.kubelet(), lambda n: n.kubelet(STATIC), FAILURE, "static"),
    "kubelet.memory-manager": Case(
        lambda n: done(n.kubelet(), n.configure(resources=PAGES)),
        lambda n: done(n.kubelet("memoryManagerPolicy: Static\n"), n.configure(resources=PAGES)),
        FAILURE,
        "memoryManagerPolicy: None",
    ),
    "kubelet.topology-manager": Case(
        lambda n: n.kubelet("topologyManagerPolicy: restricted\n"),
        lambda n: done(n.kubelet("topologyManagerPolicy: restricted\n"), n.configure(resources=CPUS_BY_CLAIM)),
        WARNING,
        "restricted",
    ),
    "kubelet.contradictions": Case(
        lambda n: n.kubelet(), lambda n: n.kubelet("cgroupRoot: /elsewhere\n"), WARNING, "/elsewhere"
    ),
    "kubelet.cgroup-driver": Case(
        lambda n: n.cgroups(),
        lambda n: done(n.cgroups(), n.write("sys/fs/cgroup/kubepods/cgroup.controllers", "cpu")),
        WARNING,
        "both drivers",
    ),
    "kubelet.sockets": Case(
        lambda n: done(n.kubelet_file("device-plugins/kubelet.sock"), n.kubelet_file("pod-resources/kubelet.sock")),
        lambda n: n.kubelet(),
        FAILURE,
        "kubelet.sock is missing",
    ),
    "kubelet.plugins": Case(
        lambda n: n.checkpoint("nodeagent.dev/gpu", "rdma.example/hca"),
        lambda n: n.checkpoint("nvidia.com/gpu"),
        WARNING,
        "nvidia.com/gpu",
    ),
    "kubelet.drivers": Case(
        lambda n: n.kubelet_file("plugins_registry/gpu.nvidia.com-reg.sock"), lambda n: None, SKIPPED, "there is no"
    ),
    "runtime.nri": Case(
        lambda n: n.write("var/run/nri/nri.sock", ""),
        lambda n: n.write("etc/containerd/config.toml", '[plugins."io.containerd.nri.v1.nri"]\ndisable = true\n'),
        WARNING,
        "NRI is off by /etc/containerd/config.toml",
    ),
    "runtime.cdi": Case(
        lambda n: done(n.configure(resources=CPUS_BY_CLAIM), n.write("etc/containerd/config.toml", CDI_ON)),
        lambda n: done(
            n.configure(resources=CPUS_BY_CLAIM),
            n.write("etc/containerd/config.toml", f'{CDI_ON}cdi_spec_dirs = ["/etc/cdi"]\n'),
        ),
        FAILURE,
        "/var/run/cdi",
    ),
    "runtime.bundles": Case(
        lambda n: n.write("run/containerd/io.containerd.runtime.v2.task/k8s.io/a/config.json", "{}"),
        lambda n: n.configure(pinning={"mode": "off"}),
        SKIPPED,
        "pinning.mode is off",
    ),
    "cgroup.hierarchy": Case(
        lambda n: n.cgroups(), lambda n: n.write("sys/fs/cgroup/cpu/tasks", ""), FAILURE, "cgroup v1"
    ),
    "cgroup.controllers": Case(lambda n: n.cgroups(), lambda n: n.cgroups("cpu memory"), FAILURE, "lacks cpuset"),
    "cgroup.pods": Case(lambda n: n.cgroups(), lambda n: n.cgroups(pods_cpus="0-3"), FAILURE, "CPUs 4-7"),
    "cluster.clock": Case(
        lambda n: None, lambda n: n.probes.update(clock_is_synchronised=False), WARNING, "follows no other"
    ),
    "cluster.kubelet-version": Case(
        lambda n: done(n.kubelet(), n.probes.update(kubelet="Kubernetes v1.36.1\n")),
        lambda n: done(n.kubelet(), n.probes.update(kubelet="Kubernetes v1.30.0\n")),
        WARNING,
        "older than 1.34",
    ),
    "cluster.runtime-version": Case(
        lambda n: done(
            n.process(9, "/usr/bin/containerd", name="containerd"),
            n.probes.update(containerd="containerd github.com/containerd/containerd v2.0.2 abc\n"),
        ),
        lambda n: done(
            n.process(9, "/usr/bin/containerd", name="containerd"),
            n.probes.update(containerd="containerd github.com/containerd/containerd 1.6.20~ds1\n"),
        ),
        FAILURE,
        "1.6.20",
    ),
    "state.folder": Case(lambda n: state_mode(n, 0o700), lambda n: state_mode(n, 0o777), FAILURE, "others can change"),
    "state.space": Case(
        lambda n: None,
        lambda n: n.probes.update(space=DiskSpace("/s", "ext4", 1 << 20, 9, 9)),
        FAILURE,
        "1 MiB free",
    ),
    "state.fsync": Case(
        lambda n: state_mode(n, 0o700),
        lambda n: done(state_mode(n, 0o700), n.probes.update(sync_s=0.1)),
        WARNING,
        "100.0 ms",
    ),
    "state.ledger": Case(lambda n: n.grant("4-5"), damage, FAILURE, "ledger.db"),
    "state.whole": Case(lambda n: n.grant("4-5"), lost, FAILURE, "older copy"),
    "state.reboots": Case(
        lambda n: n.grant("4-5"), lambda n: n.grant("4-5", boot="an-earlier-one"), WARNING, "1 of 1 grants"
    ),
    "cpus.machine": Case(lambda n: None, lambda n: n.configure(reservedCpus="0,99"), UNKNOWN, "99"),
    "cpus.reserved": Case(lambda n: None, lambda n: n.configure(reservedCpus="0-7"), FAILURE, "none can be granted"),
    "cpus.isolcpus": Case(
        lambda n: None, lambda n: n.write("sys/devices/system/cpu/isolated", "0-3"), WARNING, "reserved CPUs 0"
    ),
    "cpus.nohz-full": Case(
        lambda n: n.write("sys/devices/system/cpu/nohz_full", "4-7"),
        lambda n: n.write("sys/devices/system/cpu/nohz_full", "0-7"),
        WARNING,
        "reserved CPUs 0",
    ),
    "cpus.irqbalance": Case(
        lambda n: None, lambda n: n.process(9, "/usr/sbin/irqbalance", name="irqbalance"), WARNING, "interrupts"
    ),
    "cpus.governor": Case(
        lambda n: governor(n, "performance"), lambda n: governor(n, "powersave"), WARNING, "CPUs 1-7: powersave"
    ),
    "cpus.offline": Case(
        lambda n: None,
        lambda n: done(
            n.grant("6-7"),
            n.write("sys/devices/system/cpu/online", "0-6"),
            n.write("sys/devices/system/cpu/offline", "7"),
        ),
        FAILURE,
        "7 of a/b/c",
    ),
    "cpus.real-time": Case(
        lambda n: n.write("proc/sys/kernel/sched_rt_runtime_us", "950000"),
        lambda n: n.write("proc/sys/kernel/sched_rt_runtime_us", "-1"),
        WARNING,
        "all of a CPU",
    ),
    "memory.pools": Case(
        lambda n: done(n.configure(hugepages=POOL), pool(n, 4)),
        lambda n: done(n.configure(hugepages=POOL), pool(n, 3)),
        WARNING,
        "3 of 4",
    ),
    "memory.hugepages": Case(
        lambda n: done(n.configure(resources=PAGES), pool(n, 4)),
        lambda n: done(n.configure(resources=PAGES), pool(n, 0)),
        WARNING,
        "no such pages",
    ),
    "memory.transparent-hugepages": Case(
        lambda n: n.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never"),
        lambda n: n.write("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never"),
        WARNING,
        "for all memory",
    ),
    "memory.swap": Case(
        lambda n: n.write("proc/swaps", "Filename Type Size Used Priority"),
        lambda n: n.write("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 9 0 -2"),
        WARNING,
        "/dev/sda2",
    ),
    "memory.numa-balancing": Case(
        lambda n: n.write("proc/sys/kernel/numa_balancing", "0"),
        lambda n: n.write("proc/sys/kernel/numa_balancing", "1"),
        WARNING,
        "unmaps pages",
    ),
    "memory.zone-reclaim": Case(
        lambda n: n.write("proc/sys/vm/zone_reclaim_mode", "0"),
        lambda n: n.write("proc/sys/vm/zone_reclaim_mode", "1"),
        WARNING,
        "page cache",
    ),
    "devices.kinds": Case(
        lambda n: None,
        lambda n: n.answer(kinds=[{"kind": "gpu", "state": "degraded", "reason": "NVML hangs"}]),
        FAILURE,
        "gpu: NVML hangs",
    ),
    "devices.readable": Case(
        lambda n: None,
        lambda n: n.write("sys/devices/system/node/node0/distance", "ten"),
        WARNING,
        "distance",
    ),
    "devices.iommu": Case(vfio, virtual_function, WARNING, "no IOMMU"),
    "devices.vfio": Case(
        lambda n: done(vfio(n), n.devices.node("/dev/vfio/3")), vfio, FAILURE, f"no device node of {GPU} (group 3)"
    ),
    "devices.nvidia-driver": Case(
        lambda n: done(n.gpu(), n.write("sys/module/nvidia/version", "570.1")),
        lambda n: n.gpu(driver=None),
        FAILURE,
        "no driver",
    ),
    "devices.nvml": Case(
        lambda n: n.gpu(),
        lambda n: done(n.gpu(), n.probes.update(library_error="there is no library libnvidia-ml.so.1")),
        FAILURE,
        "there is no library",
    ),
    "devices.mps": Case(
        lambda n: None,
        lambda n: n.process(9, "/usr/bin/nvidia-cuda-mps-control", "-d", name="nvidia-cuda-mps"),
        WARNING,
        "process 9",
    ),
}
ELSEWHERE = {"cluster.rights", "cluster.node-name"}
"""These ask an API server: test_doctor_cluster.py."""


@pytest.fixture
def built(tmp_path: Path) -> BuiltNode:
    return BuiltNode(tmp_path)


def test_every_check_is_tried_on_two_nodes() -> None:
    assert {*CASES, *ELSEWHERE} == {*BY_NAME}
    assert len(CHECKS) == len(BY_NAME) >= 40


@pytest.mark.parametrize("name", CASES)
def test_a_check_is_well_on_a_good_node(name: str, built: BuiltNode) -> None:
    CASES[name].well(built)
    finding = found(name, built)
    assert (finding.state, finding.fix) == (OK, ""), finding


@pytest.mark.parametrize("name", CASES)
def test_a_check_notices_what_it_is_there_for(name: str, built: BuiltNode) -> None:
    """And names what it saw; what is wrong comes with a remedy."""
    case = CASES[name]
    case.otherwise(built)
    finding = found(name, built)
    assert finding.state is case.state and case.word in finding.seen, finding
    assert bool(finding.fix) == (finding.state in (WARNING, FAILURE))


def test_an_unreadable_configuration_of_kubelet_names_what_is_not_served_for_it(built: BuiltNode) -> None:
    built.configure(resources=[*CPUS_BY_CLAIM, *PAGES, {"name": "nvme", "kind": "nvme"}])
    built.kubelet("a: [\n")
    finding = found("kubelet.configuration", built)
    assert finding.state is FAILURE and finding.seen.endswith("these are not served: cpu, pages")


def test_a_dra_driver_that_hands_out_cpus_too_is_a_warning_where_cpus_are_served(built: BuiltNode) -> None:
    built.kubelet_file("plugins_registry/dra.cpu-reg.sock")
    built.configure(resources=PAGES)
    assert found("kubelet.drivers", built).state is OK
    built.configure(resources=CPUS_BY_CLAIM)
    finding = found("kubelet.drivers", built)
    assert finding.state is WARNING and "dra.cpu hands out CPUs" in finding.seen and finding.fix


def test_what_may_not_be_read_is_unknown_and_says_why(built: BuiltNode) -> None:
    """A folder in the place of a file stands for a lack of rights, which root does not have."""
    (built.root / "proc/swaps").mkdir()
    finding = found("memory.swap", built)
    assert finding.state is UNKNOWN and "because" in finding.seen and "proc/swaps" in finding.seen


def test_without_rights_nothing_follows_from_defaults(built: BuiltNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that may not be read could say anything."""
    built.configure(reservedCpus="0")
    monkeypatch.setattr(os, "access", lambda path, mode: "config.yaml" not in str(path))
    for name in ("agent.configuration", "cpus.reserved", "memory.hugepages", "runtime.nri"):
        finding = found(name, built)
        assert finding.state is UNKNOWN and "may not be read" in finding.seen, finding


def test_an_agent_that_may_not_be_asked_is_not_taken_for_dead(built: BuiltNode) -> None:
    built.refusal = "cannot ask the agent at status.sock: Permission denied"
    assert found("agent.answers", built).state is UNKNOWN


def test_hidden_processes_are_no_proof_that_none_runs(built: BuiltNode) -> None:
    link = built.root / "proc/self/ns/pid"
    link.unlink()
    link.symlink_to("pid:[4026532201]")
    for name in ("cpus.irqbalance", "devices.mps"):
        assert found(name, built).state is UNKNOWN


@pytest.mark.parametrize(
    ("shown", "state", "words", "command"),
    [
        ({"missing_cpus": "4-7", "missing_irqs": [24]}, FAILURE, "CPUs 4-7", "echo IRQBALANCE_BANNED_CPULIST=4-7"),
        (
            {"missing_cpus": "", "missing_irqs": [24, 31]},
            FAILURE,
            "move 2 interrupts",
            "irqbalance --banirq=24 --banirq=31",
        ),
        ({"missing_cpus": "", "missing_irqs": [], "banned_cpus": "4-7"}, OK, "has banned", ""),
        (
            {"error": "cannot ask irqbalance"},
            FAILURE,
            "pinning.deviceInterrupts is on",
            "systemctl disable --now irqbalance",
        ),
        ({"running": False}, FAILURE, "pinning.deviceInterrupts is on", "systemctl disable --now irqbalance"),
    ],
)
def test_irqbalance_is_judged_by_what_the_agent_was_told(
    built: BuiltNode, shown: dict[str, Any], state: State, words: str, command: str
) -> None:
    """And by the configuration alone where the agent does not know or has moved nothing yet."""
    built.configure(pinning={"deviceInterrupts": "follow"})
    built.process(9, "/usr/sbin/irqbalance", name="irqbalance")
    built.answer(pinning={"intruders": {"irqbalance": {"running": True, "error": "", **shown}}})
    finding = found("cpus.irqbalance", built)
    assert finding.state is state and words in finding.seen, finding
    assert any(one.startswith(command) for one in finding.commands) or not command


def test_a_capture_without_the_file_gives_no_verdict(built: BuiltNode) -> None:
    built.live = False
    for name in ("memory.swap", "memory.numa-balancing", "cpus.real-time", "state.fsync", "cluster.clock"):
        assert found(name, built) == Finding(SKIPPED, "not in a capture")


def test_a_ledger_of_a_newer_version_is_left_to_that_version(built: BuiltNode) -> None:
    newer(built)
    finding = found("state.ledger", built)
    assert finding.state is FAILURE and "layout 99" in finding.seen
    assert "nodeagent ledger export -o grants.json" in finding.commands


def test_an_absent_agent_is_one_warning(built: BuiltNode) -> None:
    """The other questions to it do not arise."""
    states = {check.name: examine(check, built.node()).state for check in CHECKS if check.subject == "agent"}
    assert states["agent.answers"] is WARNING
    assert {one for name, one in states.items() if name != "agent.answers"} <= {OK, SKIPPED}


def test_a_status_that_shows_nothing_is_no_proof_that_all_is_well(built: BuiltNode) -> None:
    built.status = {}
    assert {found(name, built).state for name in ("agent.ready", "agent.resources", "agent.notes")} == {UNKNOWN}


def test_the_daemons_of_mps_that_the_agent_keeps_are_no_finding(built: BuiltNode) -> None:
    """Nor the servers that they have started; another one is."""
    built.status = {"sharing": {"mps": [{"name": "a", "pid": 9}]}}
    built.process(9, "/usr/bin/nvidia-cuda-mps-control", "-f", name="nvidia-cuda-mps")
    built.process(10, "/usr/bin/nvidia-cuda-mps-server", name="nvidia-cuda-mps")
    built.write("proc/10/status", "Name:\tnvidia-cuda-mps\nPPid:\t9")
    assert found("devices.mps", built) == Finding(OK, "MPS runs for claims (1)")
    built.process(11, "/usr/bin/nvidia-cuda-mps-control", "-d", name="nvidia-cuda-mps")
    assert "process 11" in found("devices.mps", built).seen


def test_a_configured_containerd_of_another_folder_is_the_one_that_counts(built: BuiltNode) -> None:
    """As k3s has it: the file that the process was started with, and what that imports."""
    built.configure(resources=CPUS_BY_CLAIM)
    built.process(9, "/opt/bin/containerd", "-c", "/opt/c/config.toml", name="containerd")
    built.write("etc/containerd/config.toml", CDI_ON)
    built.write("opt/c/config.toml", 'imports = ["/opt/c/conf.d/*.toml"]\n')
    built.write("opt/c/conf.d/1.toml", CDI_ON.replace("true", "false"))
    finding = found("runtime.cdi", built)
    assert finding.state is FAILURE and "/opt/c/config.toml" in finding.seen


def test_a_pod_without_the_runtime_s_bundles_is_a_warning(built: BuiltNode, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("runtime.bundles", built).state is SKIPPED
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    finding = found("runtime.bundles", built)
    assert finding.state is WARNING and "runtimeBundles" in finding.fix


def test_cri_o_is_read_with_its_drop_ins(built: BuiltNode) -> None:
    built.configure(resources=CPUS_BY_CLAIM, pinning={"mode": "nri"})
    built.write("etc/crio/crio.conf", "[crio.runtime]\ncdi_spec_dirs = ['/etc/cdi', '/run/cdi']\n")
    built.write("etc/crio/crio.conf.d/10.conf", "[crio.nri]\nenable_nri = false\n")
    assert found("runtime.cdi", built).state is OK
    nri = found("runtime.nri", built)
    assert nri.state is FAILURE and "NRI is off by /etc/crio/crio.conf" in nri.seen


def test_each_drop_in_that_a_configuration_asks_for_is_known(built: BuiltNode) -> None:
    """All that come with the project, but MPS's, which claims ask for; by settings that each of them really has."""
    files = {one.name: one.read_text() for one in (CHECKOUT / "systemd").glob("nodeagent-*.conf")}
    assert [one.name for one in agent.DROP_INS] == list(dict.fromkeys(one.name for one in agent.DROP_INS))
    assert {one.name for one in agent.DROP_INS} == set(files) - {"nodeagent-mps.conf"}
    assert [one.name for one in agent.DROP_INS if not all(word in files[one.name] for word in one.opens)] == []
    pinning = {"partition": "isolated", "moveInterrupts": True, "tuning": {"governor": "performance"}, "resctrl": {}}
    network = {
        "deviceInfoDir": "/run/devinfo",
        "moveInterfaces": True,
        "vfProperties": ["mac"],
        "vfs": [{"match": {"netdevs": "a*"}, "count": 2}],
    }
    target = {"name": "fast", "nqn": "nqn.2024-01.com.example:fast", "traddr": "192.0.2.10"}
    everything = {
        "metrics": {"listen": "127.0.0.1:9464"},
        "pinning": pinning,
        "dra": {"passthroughDrivers": ["vfio-pci"]},
        "network": network,
        "amd": {"partitions": [{"gpus": ["*"], "compute": "SPX"}]},
        "accelerators": {"dsa": [{"accelerators": ["dsa*"], "queues": [{"size": 8}]}]},
        "resources": [
            {"name": "gpu", "kind": "gpu", "serve": "dra"},
            {"name": "san", "kind": "nvmeof", "serve": "dra", "targets": [target]},
        ],
    }
    assert agent.needed(load(built.write("all.yaml", json.dumps(everything)))) == list(agent.DROP_INS)
    assert agent.needed(load(built.write("none.yaml", "{}"))) == []
