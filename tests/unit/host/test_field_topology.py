"""Machines on which CPUs, caches, NUMA nodes or interrupts were read wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import SINGLE, Request
from nodeagent.core.placement.place import place
from nodeagent.errors import Refused
from nodeagent.host.cgroup.layout import is_pods
from nodeagent.host.irq.intruders import interrupt_names
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.topology import cpus as topology
from tests.builders import tables
from tests.builders.machines import GIB

INTERRUPTS = """\
           CPU0       CPU1
 24:          0          5   Hyper-V PCIe MSI 4194304-edge      mlx5_async0@pci:0001:00:02.0
 25:          0          5   Hyper-V PCIe MSI 4194305-edge      mlx5_comp0@pci:0001:00:02.0
 28:          1          1  SiFive PLIC   10 Edge      ttyS0
 29:          1          1  xen-dyn    -event     eth0-q0-tx
"""


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tree of the machine that a test names."""
    return tables.build(tmp_path, tables.load(request.param))


def read(tree: Path) -> Inventory:
    return topology.read(SysFs(tree))


@pytest.mark.parametrize("tree", ["icache-first"], indirect=True)
def test_each_cpu_has_caches_of_its_own_behind_its_instruction_cache(tree: Path) -> None:
    found = read(tree)
    assert [(one.level, str(one.cpus)) for one in found.caches] == [(1, "0"), (1, "1"), (2, "0"), (2, "1")]
    assert [cpu.l2 for cpu in found.cpus] == [0, 1]


@pytest.mark.parametrize("tree", ["two-dies-no-siblings"], indirect=True)
def test_equal_core_ids_on_two_nodes_are_two_cores(tree: Path) -> None:
    assert [(cpu.core, cpu.package, cpu.numa_node) for cpu in read(tree).cpus] == [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 1),
        (3, 0, 1),
    ]


@pytest.mark.parametrize("tree", ["cpus-without-node"], indirect=True)
def test_one_node_is_the_one_that_is_online(tree: Path) -> None:
    found = read(tree)
    assert str(place(found, Ledger(), Request(cpus=8, numa=SINGLE)).cpus) == "5,7,9,11,13,15,17,19"
    with pytest.raises(Refused, match="8 CPUs would fit"):
        place(found, Ledger(), Request(cpus=9, numa=SINGLE))


@pytest.mark.parametrize("tree", ["gpu-memory-node"], indirect=True)
@pytest.mark.parametrize("hidden", ["", "proc/driver/nvidia/gpus/0009:01:00.0/numa_status", "has_normal_memory"])
def test_memory_of_a_gpu_is_no_ordinary_memory_whichever_evidence_is_missing(tree: Path, hidden: str) -> None:
    if hidden:
        (tree / (hidden if "/" in hidden else f"sys/devices/system/node/{hidden}")).unlink()
    found = read(tree)
    assert found.numa_nodes[1].kind == ("special" if "status" in hidden else "gpu")
    assert place(found, Ledger(), Request(memory_bytes=16 * GIB)).memory == ((0, 16 * GIB),)
    with pytest.raises(Refused, match="16Gi can be granted"):
        place(found, Ledger(), Request(memory_bytes=20 * GIB))


def test_interrupts_of_chips_with_several_words_have_names(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/interrupts").write_text(INTERRUPTS)
    assert interrupt_names(SysFs(tmp_path)) == {
        24: "mlx5_async0@pci:0001:00:02.0",
        25: "mlx5_comp0@pci:0001:00:02.0",
        28: "ttyS0",
        29: "eth0-q0-tx",
    }


def test_a_static_pod_in_a_private_namespace_is_a_pod() -> None:
    assert is_pods("/../../pod0123456789abcdef0123456789abcdef/aaaa")
