"""The unit file: what systemd itself says of it, and that it fits what the agent does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from nodeagent.config.schema import Config
from tests.support.paths import CHECKOUT

UNIT = CHECKOUT / "systemd" / "nodeagent.service"
DROP_IN = UNIT.with_name("nodeagent-dra.conf")
MPS = UNIT.with_name("nodeagent-mps.conf")
EVERY_DROP_IN = tuple(sorted({*UNIT.parent.glob("nodeagent-*.conf")} - {MPS}))
"""But the one for MPS, with which programs of NVIDIA run in the sandbox."""
WORST_EXPOSURE = {(): 1.6, (DROP_IN,): 2.0, EVERY_DROP_IN: 3.3}
"""Of 10, by the drop-ins that are installed; docs/operations.md states the scores."""

pytestmark = pytest.mark.skipif(not UNIT.exists(), reason="the unit lies in the checkout")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings() -> list[tuple[str, str]]:
    lines = [line for line in UNIT.read_text().splitlines() if re.match(r"[A-Z]\w*=", line)]
    return [tuple(line.split("=", 1)) for line in lines]  # type: ignore[misc]


def runnable(folder: Path) -> Path:
    """The unit with a program that is there on every machine."""
    copy = folder / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    return copy


def problems(folder: Path, *drop_ins: Path) -> tuple[int, str]:
    """What systemd finds wrong with the unit and these drop-ins: its exit code and words."""
    (folder / f"{UNIT.name}.d").mkdir()
    for one in drop_ins:
        shutil.copy(one, folder / f"{UNIT.name}.d" / one.name)
    command = ["systemd-analyze", "verify", "--man=no", str(runnable(folder))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    assert problems(tmp_path) == (0, "")


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_dra(tmp_path: Path) -> None:
    """And takes it: the families are added, the folders too, and the network is open."""
    assert problems(tmp_path, DROP_IN) == (0, "")
    lines = DROP_IN.read_text().splitlines()
    assert "IPAddressDeny=" in lines and "RestrictAddressFamilies=AF_INET AF_INET6" in lines
    (writable,) = [line for line in lines if line.startswith("ReadWritePaths=")]
    folders = ("/var/lib/kubelet/plugins", "/var/lib/kubelet/plugins_registry", Config().dra.cdi_dir)
    assert set(writable.removeprefix("ReadWritePaths=").replace("-/", "/").split()) == set(folders)


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_mps(tmp_path: Path) -> None:
    assert problems(tmp_path, MPS) == (0, "")


def test_with_the_drop_in_for_mps_daemons_outlive_the_agent_and_without_it_they_end_with_it() -> None:
    """The unit leaves systemd's default, KillMode=control-group."""
    assert "KillMode=process" in MPS.read_text().splitlines()
    assert "KillMode" not in dict(settings())


METRICS = UNIT.with_name("nodeagent-metrics.conf")


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_metrics(tmp_path: Path) -> None:
    """It opens TCP, and to this host alone: everything else stays denied by the unit."""
    assert problems(tmp_path, METRICS) == (0, "")


def test_the_drop_in_for_metrics_opens_tcp_to_this_host_and_nothing_else() -> None:
    lines = [line for line in METRICS.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["[Service]", "RestrictAddressFamilies=AF_INET AF_INET6", "IPAddressAllow=localhost"]
    assert ("IPAddressDeny", "any") in settings()
    assert ("RestrictAddressFamilies", "AF_UNIX AF_NETLINK") in settings()
    assert "PrivateNetwork" not in dict(settings())


def test_the_drop_in_for_tuning_opens_the_files_of_cpus_and_nothing_else() -> None:
    lines = [line for line in UNIT.with_name("nodeagent-tuning.conf").read_text().splitlines() if line[:1] not in "#"]
    assert lines == ["[Service]", "ReadWritePaths=/sys/devices/system/cpu"]


def test_the_drop_in_for_resctrl_opens_its_files_and_nothing_else() -> None:
    lines = [line for line in UNIT.with_name("nodeagent-resctrl.conf").read_text().splitlines() if line[:1] not in "#"]
    assert lines == ["[Service]", "ReadWritePaths=/sys/fs/resctrl"]


def test_the_drop_in_for_passthrough_opens_the_files_of_pci_functions_and_nothing_else() -> None:
    text = UNIT.with_name("nodeagent-passthrough.conf").read_text()
    lines = [line for line in text.splitlines() if line[:1] not in "#"]
    assert lines == ["[Service]", "ReadWritePaths=/sys/bus/pci /sys/devices"]


def test_the_drop_in_for_virtual_functions_opens_the_files_of_pci_functions_and_nothing_else() -> None:
    lines = [line for line in UNIT.with_name("nodeagent-vfs.conf").read_text().splitlines() if line[:1] not in "#"]
    assert lines == ["[Service]", "ReadWritePaths=/sys/bus/pci /sys/devices"]


def test_the_drop_in_for_work_queues_opens_the_files_of_accelerators_and_nothing_else() -> None:
    lines = [line for line in UNIT.with_name("nodeagent-dsa.conf").read_text().splitlines() if line[:1] not in "#"]
    assert lines[lines.index("[Service]") :] == ["[Service]", "ReadWritePaths=-/sys/bus/dsa /sys/devices"]


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_work_queues(tmp_path: Path) -> None:
    assert problems(tmp_path, UNIT.with_name("nodeagent-dsa.conf")) == (0, "")


def test_the_drop_in_for_interfaces_opens_network_namespaces_and_nothing_else() -> None:
    text = UNIT.with_name("nodeagent-interfaces.conf").read_text()
    lines = [line for line in text.splitlines() if line[:1] not in "#"]
    assert lines == ["[Service]", "CapabilityBoundingSet=CAP_NET_ADMIN CAP_SYS_ADMIN", "RestrictNamespaces=net"]
    assert ("RestrictNamespaces", "true") in settings()


def test_the_drop_in_for_properties_of_virtual_functions_lets_adapters_be_changed_and_nothing_else() -> None:
    text = UNIT.with_name("nodeagent-vf-properties.conf").read_text()
    lines = [line for line in text.splitlines() if line[:1] not in "#"]
    assert lines == ["[Service]", "CapabilityBoundingSet=CAP_NET_ADMIN"]
    assert ("RestrictAddressFamilies", "AF_UNIX AF_NETLINK") in settings()


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_properties_of_virtual_functions(tmp_path: Path) -> None:
    assert problems(tmp_path, UNIT.with_name("nodeagent-vf-properties.conf")) == (0, "")


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_drop_in_for_interfaces(tmp_path: Path) -> None:
    assert problems(tmp_path, UNIT.with_name("nodeagent-interfaces.conf")) == (0, "")


def test_the_drop_in_for_partitions_of_gpus_opens_sysfs_and_the_view_of_all_processes() -> None:
    lines = [line for line in UNIT.with_name("nodeagent-amd.conf").read_text().splitlines() if line[:1] not in "#"]
    assert lines == [
        "[Service]",
        "ReadWritePaths=/sys/devices",
        "CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH",
        "ProtectProc=default",
    ]


def test_the_drop_in_for_cni_opens_the_folder_of_device_information_and_nothing_else() -> None:
    lines = [line for line in UNIT.with_name("nodeagent-cni.conf").read_text().splitlines() if line[:1] not in "#"]
    folder = "/run/k8s.cni.cncf.io"
    made = f"ExecStartPre=+/bin/mkdir -p {folder}/devinfo/dp"
    assert lines == ["[Service]", made, f"ReadWritePaths=-{folder}"]


@needs_systemd
@pytest.mark.parametrize("drop_ins", WORST_EXPOSURE, ids=["alone", "with-dra", "with-every-drop-in"])
def test_the_exposure_is_what_the_documentation_says(drop_ins: tuple[Path, ...], tmp_path: Path) -> None:
    (tmp_path / f"{UNIT.name}.d").mkdir()
    for one in drop_ins:
        shutil.copy(one, tmp_path / f"{UNIT.name}.d" / one.name)
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", str(runnable(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert score is not None, done.stderr
    assert float(score[1]) <= WORST_EXPOSURE[drop_ins]
    said = " ".join((UNIT.parent.parent / "docs" / "operations.md").read_text().split())
    assert "rates it 1.6 of 10 (0 is best), 2.0 with the drop-in for DRA and 3.3 with every drop-in" in said


def test_it_knows_the_agents_folders_and_words() -> None:
    found = dict(settings())
    assert found["Type"] == "notify"
    assert (found["StateDirectory"], found["RuntimeDirectory"]) == ("nodeagent", "nodeagent")
    assert "-HUP" in found["ExecReload"]
    assert float(found["WatchdogSec"].removesuffix("s")) >= 10


def test_every_hardening_says_why_or_is_grouped_under_what_it_is_for() -> None:
    comments = [line for line in UNIT.read_text().splitlines() if line.startswith("#")]
    assert len(comments) >= 15


@pytest.mark.skipif(bool(os.geteuid()) or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_the_drop_in_for_partitions_of_gpus_shows_what_processes_of_other_users_have_open() -> None:
    """Their folders in /proc are their own: that takes a right besides that of tracing."""
    text = UNIT.with_name("nodeagent-amd.conf").read_text()
    (said,) = [line for line in text.splitlines() if line.startswith("CapabilityBoundingSet=")]
    rights = said.partition("=")[2].lower().replace("cap_", "+").replace(" ", ",")
    other = subprocess.Popen(["setpriv", "--reuid=65534", "--clear-groups", "sleep", "60"])
    try:
        until_s = time.monotonic() + 20
        while "\nUid:\t65534" not in Path(f"/proc/{other.pid}/status").read_text():
            assert time.monotonic() < until_s
        look = ["setpriv", f"--bounding-set=-all,{rights}", "--inh-caps=-all", "readlink", f"/proc/{other.pid}/fd/1"]
        subprocess.run(look, check=True, stdout=subprocess.DEVNULL, timeout=20)
    finally:
        other.kill()
        other.wait()
