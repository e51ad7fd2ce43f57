"""What a real GPU is to show (benchmarks/gpu): what nvidia-smi prints is read, what differs is named, and a machine
without a GPU says that nothing is possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.gpu import compare, contained, smi
from benchmarks.gpu.__main__ import run
from benchmarks.gpu.parts import NotPossible, Outcome, Result, farthest, faster, judged, limited
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.all_kinds import PartitionSelector
from nodeagent.host.nvml.values import Snapshot, Xid
from nodeagent.host.snapshot import Selectors, scan
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.support.mig_driver import CARDS, MigDriver, address, snapshot_of
from tests.support.paths import CHECKOUT

XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>580.95</driver_version>
  <attached_gpus>{count}</attached_gpus>
  {gpus}
</nvidia_smi_log>
"""
XML_GPU = """<gpu id="0000{address}">
    <product_name>{name}</product_name>
    <mig_mode><current_mig>{mode}</current_mig><pending_mig>{mode}</pending_mig></mig_mode>
    <mig_devices>None</mig_devices>
    <uuid>{uuid}</uuid>
    <minor_number>{minor}</minor_number>
    <fb_memory_usage><total>{mib} MiB</total><used>1 MiB</used></fb_memory_usage>
    <ecc_mode><current_ecc>N/A</current_ecc></ecc_mode>
  </gpu>"""
LGIP = """\
+-------------------------------------------------------------------------------+
| GPU instance profiles:                                                        |
| GPU   Name               ID    Instances   Memory     P2P    SM    DEC   ENC  |
|                                Free/Total   GiB              CE    JPEG  OFA  |
|===============================================================================|
{lines}
+-------------------------------------------------------------------------------+
"""
TOPO = (
    "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-3\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\tSYS\t0-3\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t4-7\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP interconnect\n"
)


def xml_of(snapshot: Snapshot, **changes: Any) -> str:
    gpus = [
        XML_GPU.format(
            **{
                "address": one.pci_address.upper(),
                "name": one.name,
                "mode": "Enabled" if one.mig_enabled else "Disabled",
                "uuid": one.uuid,
                "minor": one.minor,
                "mib": (one.memory_bytes or 0) >> 20,
                **changes,
            }
        )
        for one in snapshot.gpus
    ]
    return XML.format(count=len(gpus), gpus="\n".join(gpus))


def inventory_of(folder: Path, snapshot: Snapshot, *cards: str) -> Inventory:
    tree = DeviceTree(machine(folder / "root", "1s2n4c-smt"))
    MigDriver.of(folder / "nvml", *cards).machine(tree)
    selectors = Selectors(partitions=PartitionSelector(own=frozenset()))
    return scan(SysFs(str(tree.root)), all_kinds.builtin_kinds(), selectors, snapshot)


def tables(card: str, gpu: int = 0) -> tuple[str, str]:
    """What `nvidia-smi mig -lgip` and `-lgipp` print of a card."""
    profiles, placements = [], []
    for _, id, name, mib, most, _, units, *engines, size, starts in CARDS[card]["profiles"]:
        ce = engines[0]
        profiles.append(
            f"|   {gpu}  MIG {name:<16} {id:>2}   {most}/{most}   {mib / 1024:>8.2f}    No   {units:>4}   0   0   |"
        )
        profiles.append(f"|                                                              {ce}     0     0   |")
        word = "Placements" if len(starts) > 1 else "Placement "
        placements.append(f"GPU  {gpu} Profile ID {id:>2} {word}: {{{','.join(map(str, starts))}}}:{size}")
    return LGIP.format(lines="\n".join(profiles)), "\n".join(placements)


def test_an_inventory_is_what_nvidia_smi_shows(tmp_path: Path) -> None:
    snapshot = snapshot_of("h100-80", "a30")
    found = inventory_of(tmp_path, snapshot, "h100-80", "a30")
    version, shown = smi.gpus(xml_of(snapshot))
    assert (version, [one.address for one in shown]) == ("580.95", [address(0), address(1)])
    assert list(compare.inventory(found, version, shown)) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "another"}, "product"),
        ({"uuid": "GPU-x"}, "uuid"),
        ({"minor": 7}, "minor 0, nvidia-smi has 7"),
        ({"mib": 5}, "MiB of memory"),
        ({"mode": "Disabled"}, "MIG mode True, nvidia-smi has False"),
        ({"address": "0000:FF:00.0"}, "nvidia-smi does not show it"),
    ],
)
def test_what_differs_from_nvidia_smi_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    snapshot = snapshot_of("h100-80")
    found = inventory_of(tmp_path, snapshot, "h100-80")
    differences = list(compare.inventory(found, *smi.gpus(xml_of(snapshot, **changes))))
    assert any(named in one for one in differences)
    assert len(differences) == (2 if "address" in changes else 1)


def test_what_nvidia_smi_does_not_report_is_not_compared(tmp_path: Path) -> None:
    snapshot = snapshot_of("h100-80")
    found = inventory_of(tmp_path, snapshot, "h100-80")
    assert list(compare.inventory(found, *smi.gpus(xml_of(snapshot, minor="N/A")))) == []


@pytest.mark.parametrize("text", ["", "No devices were found", "<other/>"])
def test_another_text_is_not_taken_for_it(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read nvidia-smi -q -x"):
        smi.gpus(text)


@pytest.mark.parametrize("card", CARDS)
def test_published_counters_admit_what_nvidia_smi_lists(tmp_path: Path, card: str) -> None:
    found = inventory_of(tmp_path, snapshot_of(card), card)
    profiles, placements = tables(card)
    read = smi.profiles(profiles)
    assert len(read) == len(CARDS[card]["profiles"])
    assert list(compare.mig(found, read, smi.placements(placements))) == []


def test_another_geometry_is_named(tmp_path: Path) -> None:
    found = inventory_of(tmp_path, snapshot_of("h100-80"), "h100-80")
    profiles, placements = (smi.profiles(tables("h100-80")[0]), smi.placements(tables("h100-80")[1]))
    first = profiles[0]
    cases = {
        "the counters admit": ([first._replace(most=3), *profiles[1:]], placements),
        "multiprocessors": ([first._replace(multiprocessors=1), *profiles[1:]], placements),
        "placements": (profiles, [placements[0]._replace(starts=(0,)), *placements[1:]]),
        "it is not published": ([*profiles, first._replace(name="9g.99gb", id=99)], placements),
        "nvidia-smi lists no": (profiles[1:], placements),
        "the inventory has 1 GPUs": ([*profiles, first._replace(gpu=1)], placements),
    }
    for named, (its, places) in cases.items():
        differences = list(compare.mig(found, its, places))
        assert len(differences) == 1 and named in differences[0]


def linked(folder: Path, **links: int) -> Inventory:
    snapshot = snapshot_of("h100-80", "h100-80", "a30")
    ends = {0: {address(1): links.get("count", 18)}, 1: {address(0): links.get("count", 18)}, 2: {}}
    gpus = tuple(replace(one, nvlinks=ends[i], mig_enabled=False) for i, one in enumerate(snapshot.gpus))
    found = inventory_of(folder, replace(snapshot, gpus=gpus), "h100-80", "h100-80", "a30")
    nodes = {address(0): 0, address(1): 0, address(2): 1}
    devices = tuple(replace(one, numa_node=nodes.get(one.id, one.numa_node)) for one in found.devices)
    return replace(found, devices=devices)


def test_weights_of_links_fit_the_matrix(tmp_path: Path) -> None:
    found = linked(tmp_path)
    shown = smi.matrix(TOPO)
    assert shown.nodes == {0: 0, 1: 0, 2: 1}
    assert list(smi.pairs(shown)) == [(0, 1, "NV18"), (0, 2, "SYS"), (1, 2, "SYS")]
    assert list(compare.topology(found, shown)) == []


def test_other_links_and_nodes_are_named(tmp_path: Path) -> None:
    found = linked(tmp_path, count=4)
    (only,) = compare.topology(found, smi.matrix(TOPO))
    assert f"{address(0)}, {address(1)}: weight 130, NV18 would be 270" in only
    named = list(
        compare.topology(linked(tmp_path / "b"), smi.matrix(TOPO.replace("SYS", "???").replace("4-7\t1", "4-7\t0")))
    )
    assert [("legend" in one, "NUMA node 1, nvidia-smi has 0" in one) for one in named] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    with pytest.raises(ValueError, match="no GPU0"):
        smi.matrix("Unable to determine")


def test_colours_of_the_matrix_are_not_read() -> None:
    assert (
        smi.matrix(TOPO.replace("\tGPU0\tGPU1", "\t\x1b[4mGPU0\tGPU1").replace("ID\n", "ID\x1b[0m\n")).links[0, 1]
        == "NV18"
    )


def test_an_illegal_store_taints_nothing_and_another_xid_is_a_failure(tmp_path: Path) -> None:
    found = inventory_of(tmp_path, snapshot_of("h100-80"), "h100-80")
    (gpu,) = compare.whole_gpus(found)
    assert judged(found, Xid(pci_address=gpu.id, code=31), gpu, ["x"]).outcome == Outcome.PASS
    assert judged(found, Xid(pci_address=gpu.id, code=79), gpu, []).outcome == Outcome.FAIL
    assert judged(found, Xid(pci_address="0000:ff:00.0", code=31), gpu, []).outcome == Outcome.FAIL


@pytest.mark.parametrize(
    ("done", "servers", "outcome"),
    [
        ({"mib": 960, "out_of_memory": True}, 1, Outcome.PASS),
        ({"mib": 4096, "out_of_memory": False}, 1, Outcome.FAIL),
        ({"mib": 2048, "out_of_memory": True}, 1, Outcome.FAIL),
        ({"mib": 960, "out_of_memory": True}, 0, Outcome.FAIL),
        ({"failed": "no"}, 1, Outcome.FAIL),
    ],
)
def test_a_limit_of_memory_holds_only_if_the_daemon_s_server_refused_more(
    done: dict[str, Any], servers: int, outcome: Outcome
) -> None:
    assert limited(done, servers).outcome == outcome


def test_near_cpus_copy_at_least_as_fast(tmp_path: Path) -> None:
    assert faster({0: 25.0, 1: 20.0}, 0).outcome == Outcome.PASS
    assert faster({0: 20.0, 1: 25.0}, 0).outcome == Outcome.FAIL
    assert faster({0: 0.0, 1: 0.0}, 0).outcome == Outcome.FAIL
    found = scan(SysFs(str(machine(tmp_path / "root", "2s4n128c-smt"))), ())
    assert farthest(found, 0, [0, 1, 2, 3]) in (2, 3)


def test_a_part_that_breaks_fails_by_itself() -> None:
    def breaks(_: Any) -> Result:
        raise OSError(5, "Input/output error")

    def cannot(_: Any) -> Result:
        raise NotPossible("no GPU")

    assert run(breaks, None) == Result(Outcome.FAIL, ["OSError: [Errno 5] Input/output error"])  # type: ignore[arg-type]
    assert run(cannot, None) == Result(Outcome.NOT_POSSIBLE, ["no GPU"])  # type: ignore[arg-type]


def test_on_a_machine_without_a_gpu_nothing_is_possible_and_the_summary_says_so() -> None:
    """With GPUs this machine shows the parts themselves, which is not for a test."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a GPU of NVIDIA's")
    words = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=120)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["gpus"] == []
    assert {one["outcome"] for one in summary["parts"].values()} == {"NOT POSSIBLE"}
    assert len(summary["parts"]) == 7
    unknown = subprocess.run([*words, "none"], cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120)
    assert (unknown.returncode, "there is no part none" in unknown.stderr) == (2, True)


def test_everything_of_a_cdi_file_is_bound() -> None:
    edits = {
        "deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/host/dev/nvidia0"}, {"path": "/dev/nvidiactl"}],
        "mounts": [{"hostPath": "/a", "containerPath": "/b"}],
        "env": ["A=1"],
    }
    every, env = contained.binds(
        {"devices": [{"name": "gpu", "containerEdits": edits}], "containerEdits": {"env": ["B=2"]}}
    )
    assert every == [("/host/dev/nvidia0", "/dev/nvidia0"), ("/dev/nvidiactl", "/dev/nvidiactl"), ("/a", "/b")]
    assert env == ["A=1", "B=2"]


PROGRAM = """
import ctypes, json, os
print(json.dumps({"root": sorted(os.listdir("/")), "given": open("/given/file").read(), "env": os.environ["GIVEN"],
                  "etc": os.path.exists("/etc")}))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a mount namespace")
def test_a_program_sees_of_the_host_only_python_and_what_the_file_names(tmp_path: Path) -> None:
    """Really, in a mount namespace; nothing stays mounted afterwards."""
    root, file, program, given = (tmp_path / name for name in ("root", "claim.json", "program.py", "given"))
    root.mkdir()
    given.write_text("by the file")
    program.write_text(PROGRAM)
    edits = {"mounts": [{"hostPath": str(given), "containerPath": "/given/file"}], "env": ["GIVEN=yes"]}
    file.write_text(json.dumps({"devices": [{"name": "gpu", "containerEdits": edits}]}))
    words = [sys.executable, "-m", "benchmarks.gpu.contained", str(root), str(file), str(program)]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60)
    if "Operation not permitted" in done.stderr:
        pytest.skip(f"this machine permits no mount namespace: {done.stderr.strip()[-80:]}")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["given"], seen["env"], seen["etc"]) == ("by the file", "yes", False)
    assert {"given", "proc", "program.py", "tmp"} <= set(seen["root"])
    assert list(root.iterdir()) == []
    assert str(root) not in Path("/proc/self/mounts").read_text()
