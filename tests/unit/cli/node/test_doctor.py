"""`nodeagent doctor` as an admin sees it: the lines, the commands, the exit code, and that nothing makes it fail."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.cli import main
from nodeagent.cli.node.capture import archive, collect
from nodeagent.cli.node.capture.anonymize import anonymized
from nodeagent.cli.node.doctor import show
from nodeagent.cli.node.doctor.model import State, examine
from nodeagent.cli.node.doctor.registry import CHECKS, exit_code, findings
from nodeagent.cli.shared.capture_format import MANIFEST, PAGES, page_member
from nodeagent.config.load import load
from nodeagent.config.schema import Config
from nodeagent.core.dsa.division import Queue, device_id
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.dsa.accelerators import Accelerators
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut
from nodeagent.managers.dsa.journal import DsaJournal
from nodeagent.managers.dsa.keeper import QueueKeeper, Wanted
from tests.builders import tables
from tests.builders.doctor_node import BOOT, BuiltNode
from tests.doubles.idxd_kernel import IdxdKernel
from tests.doubles.kubelet_process import put

GARBAGE_FILES = (
    "etc/nodeagent/config.yaml",
    "var/lib/k.yaml",
    "etc/containerd/config.toml",
    "etc/crio/crio.conf",
    "etc/default/irqbalance",
    "etc/systemd/system/nodeagent.service.d/x.conf",
    "proc/swaps",
    "proc/sys/kernel/random/boot_id",
    "proc/sys/kernel/numa_balancing",
    "proc/sys/kernel/sched_rt_runtime_us",
    "proc/sys/vm/zone_reclaim_mode",
    "proc/9/comm",
    "proc/9/cmdline",
    "proc/9/status",
    "sys/kernel/mm/transparent_hugepage/enabled",
    "sys/devices/system/cpu/isolated",
    "sys/devices/system/cpu/nohz_full",
    "sys/devices/system/cpu/online",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor",
    "sys/devices/system/node/node0/distance",
    "sys/fs/cgroup/cgroup.controllers",
    "sys/fs/cgroup/kubepods.slice/cpuset.cpus.effective",
    "sys/module/nvidia/version",
)
KUBELET_FILES = ("cpu_manager_state", "memory_manager_state", "device-plugins/kubelet_internal_checkpoint")
STATE_FILES = ("ledger.db", "ledger.lock")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "version",
    "not_ready",
    "notes",
    "conflicts",
    "inventory",
    "refused",
    "kinds",
    "ledger",
    "boot_id",
    "config_error",
)


def test_a_captured_tree_is_answered_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = BuiltNode(tmp_path)
    assert main(["doctor", "--root", str(built.root)]) == 0
    out = capsys.readouterr().out
    assert "✔ machine: 8 CPUs on 2 NUMA nodes" in out and "all well" in out
    assert main(["doctor", "--root", str(built.root), "--all"]) == 0
    assert "– clock: not in a capture" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "code"), [("madvise", 0), ("always", 1)])
def test_the_exit_code_says_how_bad_it_is(tmp_path: Path, mode: str, code: int) -> None:
    built = BuiltNode(tmp_path)
    built.write("sys/kernel/mm/transparent_hugepage/enabled", f"[{mode}]")
    assert main(["doctor", "--root", str(built.root)]) == code
    built.configure(domian="x.y")
    assert main(["doctor", "--root", str(built.root)]) == 2


def test_a_capture_gives_the_same_answers_wherever_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for name in ("a", "b/c"):
        built = BuiltNode(tmp_path / name)
        built.configure(domian="x.y")
        built.write("proc/sys/kernel/numa_balancing", "1")
        assert main(["doctor", "--root", str(built.root), "-o", "json"]) == 2
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "/etc/nodeagent/config.yaml" in outputs[0]


def captured(built: BuiltNode, folder: Path, *, anonymous: bool = False) -> str:
    """A capture of a built node and its agent."""
    file, _ = built.root / "etc/nodeagent/config.yaml", folder.mkdir(exist_ok=True)
    node = collect.Node(
        root=str(built.root),
        socket=str(built.socket),
        state_dir=built.state_dir,
        kubelet_dir=built.kubelet_dir,
        config=load(file) if file.exists() else Config(),
        config_file=file if file.exists() else None,
    )
    found = collect.gather(node, lambda _: None)
    for page in PAGES if built.status is not None else ():
        found.members.files[page_member(page)] = json.dumps(built.status).encode()
    if anonymous:
        found.members, _ = anonymized(found.members, "host-of-the-test")
    manifest = msgspec.json.encode(found.manifest(host="n", anonymized=anonymous))
    archive.write(str(folder / "c.tar.zst"), (MANIFEST, manifest), found.members, found.at_s)
    return str(folder / "c.tar.zst")


def refused(built: BuiltNode) -> None:
    built.kubelet("cpuManagerPolicy: [\n")


def static(built: BuiltNode) -> None:
    """Reserved in a drop-in, static by the file that the flag names, and the state of its manager."""
    put(built.root / "etc/kubelet.d/20-reserve.conf", "reservedSystemCPUs: '0-1'\n")
    built.kubelet("cpuManagerPolicy: static\n", "--config-dir=/etc/kubelet.d")
    built.kubelet_file(
        "cpu_manager_state", json.dumps({"policyName": "static", "defaultCpuSet": "0-7", "entries": {}, "checksum": 1})
    )


def busy(built: BuiltNode) -> None:
    """An agent with a configuration of its own, grants, notes, and another device plugin alongside it."""
    built.kubelet("topologyManagerPolicy: restricted\n")
    built.configure(domain="a.b", resources=[{"name": "cpu", "kind": "cpu", "serve": "dra"}], reservedCpus="0")
    built.answer(notes=["look"], not_ready=["waiting"])
    built.checkpoint("nvidia.com/gpu")
    built.grant("4-5")
    built.cgroups()


@pytest.mark.parametrize(
    "make", [lambda built: None, refused, static, busy], ids=["plain", "refused", "static", "busy"]
)
@pytest.mark.parametrize("anonymous", [False, True], ids=["", "anonymous"])
def test_a_replayed_capture_is_examined_as_the_node_was(
    make: Callable[[BuiltNode], None], anonymous: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for what only the running machine can answer: the same states, of files that are found nowhere else."""
    built = BuiltNode(tmp_path / "node")
    make(built)
    built.live = False
    expected = {check.name: examine(check, built.node()) for check in CHECKS}
    file = captured(built, tmp_path / "capture", anonymous=anonymous)
    shutil.rmtree(tmp_path / "node")
    code = main(["replay", file, "doctor", "-o", "json"])
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    states = {one["state"] for one in found.values()}
    assert code == (2 if "failure" in states else int(bool(states & {"warning", "unknown"})))
    lacking = "not in a capture"
    different = {
        name: (one["state"], one["seen"], expected[name].seen)
        for name, one in found.items()
        if one["state"] != str(expected[name].state) and one["seen"] != lacking
    }
    assert different == {}
    assert {name for name in found if name.startswith("kubelet.") and found[name]["seen"] == lacking} <= {
        "kubelet.sockets"
    }


def test_a_hostile_capture_leads_the_doctor_to_no_file_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by its configuration nor by kubelet's command line."""
    outside = tmp_path / "outside.yaml"
    outside.write_text("secret: [\n")
    up = "/.." * 20
    built = BuiltNode(tmp_path / "node")
    built.configure(kubeletConfig={"file": f"{up}{outside}"})
    built.kubelet("", f"--config-dir={up}{outside}")
    file = captured(built, tmp_path / "capture")
    capsys.readouterr()
    assert main(["replay", file, "doctor", "-o", "json", "--all"]) in (0, 1, 2)
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize("name", tables.names())
def test_every_recorded_machine_can_be_examined(
    name: str, recorded_tree: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--root", str(recorded_tree(name)), "-o", "json"]) in (0, 1, 2)
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert not [one for one in checks if "the check itself failed" in one["seen"]]
    assert next(one for one in checks if one["name"] == "cpus.machine")["state"] == "ok"


def test_json_has_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--root", str(BuiltNode(tmp_path).root), "-o", "json"])
    document = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in document["checks"]] == [check.name for check in CHECKS]
    assert document["counts"]["ok"] == sum(one["state"] == "ok" for one in document["checks"])


def test_fix_hints_are_commands_to_copy_and_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = BuiltNode(tmp_path)
    file = built.write("sys/kernel/mm/transparent_hugepage/enabled", "[always]")
    assert main(["doctor", "--root", str(built.root), "--fix-hint"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled" in lines
    assert all(line.startswith("#") for line in lines if "transparent hugepages are" in line)
    assert file.read_text() == "[always]\n"


def test_a_root_that_is_no_tree_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_configuration_is_compared_with_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the same checks; what is configured well by itself can be wrong here."""
    built = BuiltNode(tmp_path)
    built.configure(hugepages=[{"pageSize": "2Mi", "node": 7, "pages": 4}])
    file = str(built.root / "etc/nodeagent/config.yaml")
    assert main(["config", "check", file, "--root", str(built.root)]) == 0
    assert "✖" not in capsys.readouterr().out
    assert main(["config", "check", file, "--root", str(built.root), "--here"]) == 1
    out = capsys.readouterr().out
    assert "✖ pools: hugepages[0]: this machine has no NUMA node 7" in out and "swap" not in out


class Stream(io.StringIO):
    def __init__(self, encoding: str, terminal: bool = False) -> None:
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


def test_signs_are_ascii_where_others_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert show.signs_for(Stream("utf-8", terminal=True)) is show.SIGNS
    assert show.signs_for(Stream("ascii")) is show.PLAIN_SIGNS
    assert show.signs_for(Stream("iso8859-1")) is show.PLAIN_SIGNS
    monkeypatch.setenv("TERM", "linux")
    assert show.signs_for(Stream("utf-8", terminal=True)) is show.PLAIN_SIGNS
    assert all(sign.isascii() for sign in show.PLAIN_SIGNS.values())
    assert {*show.SIGNS} == {*show.PLAIN_SIGNS} == {*State}


def test_a_locale_without_these_signs_gets_plain_text(tmp_path: Path) -> None:
    built = BuiltNode(tmp_path)
    words = [sys.executable, "-m", "nodeagent", "doctor", "--all", "--root", str(built.root)]
    done = subprocess.run(words, capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"}, check=True)
    assert b"[ok]   machine: 8 CPUs" in done.stdout and not done.stderr


def test_what_a_file_holds_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = BuiltNode(tmp_path)
    built.write("proc/sys/vm/zone_reclaim_mode", "\x1b[31m1")
    main(["doctor", "--root", str(built.root)])
    out = capsys.readouterr().out
    assert "zone-reclaim" in out and "\x1b" not in out


@settings(max_examples=40)
@given(data=st.data())
def test_no_file_makes_it_fail(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes in any of the files that are read, and anything on the agent's page: unknown at worst."""
    built = BuiltNode(tmp_path_factory.mktemp("doctor"))
    built.kubelet("cpuManagerPolicy: none\n")
    built.write("etc/systemd/system/nodeagent.service", "")
    built.process(9, "/usr/bin/containerd", name="containerd")
    content = st.binary(max_size=40) | st.text(max_size=40).map(str.encode)
    for name in GARBAGE_FILES:
        _put(built.root / name, data.draw(st.none() | content))
    for name in KUBELET_FILES:
        _put(built.kubelet_dir / name, data.draw(st.none() | content))
    built.state_dir.mkdir()
    for name in STATE_FILES:
        _put(built.state_dir / name, data.draw(st.none() | content))
    status: Any = data.draw(st.none() | st.dictionaries(st.sampled_from(KEYS), JSON))
    built.status = status
    found = list(findings(built.node()))
    assert [check for check, _ in found] == list(CHECKS)
    assert not [(check.name, one.seen) for check, one in found if "the check itself failed" in one.seen]
    assert exit_code(found) in (0, 1, 2)


def _put(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_the_daemon_loads_nothing_of_it() -> None:
    """Nor what only the command line uses (docs/decisions/0011-no-psutil-in-the-daemon.md)."""
    loaded = "[n for n in sys.modules if n.startswith(('psutil', 'nodeagent.cli'))]"
    source = f"import sys, nodeagent.daemon.daemon; print(*{loaded})"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("by", ["doctor", "config check"])
def test_the_inventory_has_the_slots_of_accelerators_that_the_agent_has_divided(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = BuiltNode(tmp_path)
    built.state_dir = built.root / "state"
    built.state_dir.mkdir()
    kernel, sysfs = IdxdKernel(built.devices), SysFs(built.root)
    kernel.add("dsa0", "0000:6a:01.0")
    keeper = QueueKeeper(
        DsaJournal(built.state_dir, BOOT), Accelerators(sysfs, TimedPut(kernel.put), kernel.numbers_of)
    )
    queue = Queue(size=16, priority=10)
    keeper.make(Wanted(address="0000:6a:01.0", slot=1, claim="c", grant="g", queues=(queue, queue)))
    divided = {"dsa": [{"accelerators": ["dsa*"], "queues": [{"count": 2, "size": 16}]}]}
    built.configure(accelerators=divided, stateDir="/state")
    found: list[Inventory] = []
    if by == "doctor":
        found.append(built.node().inventory)
    else:
        monkeypatch.setattr("nodeagent.cli.node.config._notes", lambda _config, _every, it: found.append(it) or [])
        assert main(["config", "check", str(built.root / "etc/nodeagent/config.yaml"), "--root", str(built.root)]) == 0
    assert [one.id for one in found[0].devices_by_kind["dsa-queue"]] == [
        device_id("0000:6a:01.0", slot, queue) for slot in range(2)
    ]
