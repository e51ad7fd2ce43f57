"""PCI functions: on recorded machines as hwloc saw them, and on synthetic trees with what those lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.host import pci
from nodeagent.host.pci import Function
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders import tables
from tests.builders.devices import DeviceTree
from tests.builders.tables import Listed

NOT_IN_HWLOC = {
    # hwloc 2.9 skips domains beyond 16 bits unless it is built for them
    "2pa-pcidomain32bits": {"10000:00:00.0", "10000:00:04.0"},
}
"""Functions that the recorded listing leaves out, alongside PCI-to-PCI bridges (class 0604), which are no PCI objects
in hwloc. Its locality is the file local_cpus; none of the recorded runs had HWLOC_PCI_LOCALITY set."""


Tree = Callable[[str], Path]


def _listed(name: str) -> list[Listed]:
    answers = tables.load(name).hwloc
    assert answers is not None
    return answers.pci


def _functions(root: Path) -> tuple[list[str], dict[str, Function]]:
    reader = Tolerant(SysFs(root))
    found = pci.functions(reader)
    return reader.warnings, {function.address: function for function in found}


@pytest.mark.parametrize("name", ["2pa-pcidomain32bits", "32intel64-2p8co2t+8ve", "40intel64-2g2n4c+pcilocality"])
def test_every_function_of_a_recorded_machine_is_found_as_recorded(name: str, recorded_tree: Tree) -> None:
    """Address, class, vendor, device and local CPUs are those of the recorded listing, and nothing else is there."""
    warnings, found = _functions(recorded_tree(name))
    ours = {
        address: (f"{one.pci_class[:4] if one.pci_class else None} [{one.vendor}:{one.device}]", str(one.local_cpus))
        for address, one in found.items()
        if not one.is_class("0604") and address not in NOT_IN_HWLOC.get(name, set())
    }
    assert ours == {one.address: (one.type, one.local_cpus) for one in _listed(name)}
    assert warnings == []


def test_recorded_machines_without_pci_have_no_function(recorded_tree: Tree) -> None:
    """A machine whose listing is empty gives an empty answer and no warning."""
    name = "fakeheteromemtiers"
    assert _listed(name) == []
    assert _functions(recorded_tree(name)) == ([], {})


def test_where_a_recorded_function_sits_is_read_from_its_path(recorded_tree: Tree) -> None:
    """Root bus and bridges, the outermost first, also in a domain of 32 bits."""
    _, found = _functions(recorded_tree("32intel64-2p8co2t+8ve"))
    assert found["0000:1a:00.0"].pcie_root == "pci0000:17"
    assert found["0000:1a:00.0"].bridges == ("0000:17:00.0", "0000:18:00.0", "0000:19:04.0")
    _, found = _functions(recorded_tree("2pa-pcidomain32bits"))
    assert found["10000:00:04.0"].pcie_root == "pci10000:00"
    assert list(found)[-1] == "10000:00:04.0"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


def test_a_physical_function_knows_its_virtual_functions_by_index(tree: DeviceTree) -> None:
    """Four VFs, whose addresses are not in order of their index."""
    tree.bridge("0000:3a:00.0")
    tree.pci("0000:3b:00.0", under="0000:3a:00.0", driver="ice")
    for index, address in enumerate(["0000:3b:02.0", "0000:3b:01.3", "0000:3b:01.2", "0000:3b:01.1"]):
        tree.vf("0000:3b:00.0", index, address)
    warnings, found = _functions(tree.root)
    assert found["0000:3b:00.0"].vfs == {
        "0000:3b:02.0": 0,
        "0000:3b:01.3": 1,
        "0000:3b:01.2": 2,
        "0000:3b:01.1": 3,
    }
    assert {one.physical for one in found.values() if one.physical} == {"0000:3b:00.0"}
    assert found["0000:3b:00.0"].max_vfs == 64
    assert warnings == []


def test_devices_below_one_switch_share_its_bridges(tree: DeviceTree) -> None:
    """Two GPUs and a NIC below each of two switches: three bridges above each, two of them common."""
    for root, bus in (("0000:15:01.0", 0x16), ("0000:97:01.0", 0x98)):
        tree.bridge(root, numa_node=int(bus > 0x90))
        ports = [f"0000:{bus + 1:02x}:{port:02x}.0" for port in range(3)]
        tree.switch(f"0000:{bus:02x}:00.0", ports, under=root)
        for index, port in enumerate(ports):
            kind = "030200" if index < 2 else "020000"
            tree.pci(f"0000:{bus + 2 + index:02x}:00.0", under=port, pci_class=kind)
    _, found = _functions(tree.root)
    assert found["0000:18:00.0"].bridges == ("0000:15:01.0", "0000:16:00.0", "0000:17:00.0")
    assert found["0000:1a:00.0"].bridges == ("0000:15:01.0", "0000:16:00.0", "0000:17:02.0")
    assert found["0000:9a:00.0"].pcie_root == "pci0000:97"


def test_a_drive_behind_a_volume_controller_counts_as_where_the_controller_is(tree: DeviceTree) -> None:
    """VMD makes a root bus of its own below a function of another."""
    owner = tree.pci("0000:5d:05.5", pci_class="010400", driver="vmd")
    folder = owner / "pci10000:00" / "10000:00:02.0"
    tree.write(f"{folder.relative_to(tree.root)}/class", "0x010802")
    for name, value in (("vendor", "0x8086"), ("device", "0x0a54"), ("numa_node", 1), ("local_cpus", "f0")):
        tree.write(f"{folder.relative_to(tree.root)}/{name}", value)
    tree.link("sys/bus/pci/devices/10000:00:02.0", folder)
    _, found = _functions(tree.root)
    assert found["10000:00:02.0"].pcie_root == "pci0000:5d"
    assert found["10000:00:02.0"].bridges == ("0000:5d:05.5",)


def test_a_tree_without_the_bus_folder_is_walked(tree: DeviceTree) -> None:
    """Some captures keep only /sys/devices."""
    tree.bridge("0000:3a:00.0")
    tree.pci("0000:3b:00.0", under="0000:3a:00.0")
    with_bus = _functions(tree.root)
    for link in (tree.root / "sys/bus/pci/devices").iterdir():
        link.unlink()
    assert _functions(tree.root) == with_bus
    assert len(with_bus[1]) == 2


def test_a_tree_with_only_the_bus_folder_still_lists_its_functions(tree: DeviceTree) -> None:
    """Then it is not known what lies above them."""
    tree.write("sys/bus/pci/devices/0000:3b:00.0/class", "0x020000")
    tree.write("sys/bus/pci/devices/0000:3b:00.0/vendor", "0x8086")
    tree.write("sys/bus/pci/devices/0000:3b:00.0/device", "0x1572")
    warnings, found = _functions(tree.root)
    assert found["0000:3b:00.0"].pci_class == "020000"
    assert found["0000:3b:00.0"].pcie_root is None
    assert found["0000:3b:00.0"].bridges == ()
    assert warnings == []


def test_local_cpus_come_from_the_list_where_there_is_no_mask(tree: DeviceTree) -> None:
    """And CPUs that are offline are left out where the online ones are known."""
    folder = tree.pci("0000:3b:00.0")
    (folder / "local_cpus").unlink()
    (folder / "local_cpulist").write_text("0-7\n")
    found = pci.functions(Tolerant(SysFs(tree.root)), CpuSet([0, 1, 9]))
    assert str(found[0].local_cpus) == "0-1"


@pytest.mark.parametrize(
    ("name", "text", "field", "said"),
    [
        ("numa_node", "abc", "numa_node", "'abc' is not valid"),
        ("numa_node", "-7", "numa_node", "there is no NUMA node -7"),
        ("numa_node", "9", "numa_node", "there is no NUMA node 9"),
        ("class", "0x02", "pci_class", "'0x02' is not 0x and 6 hexadecimal digits"),
        ("class", "020000zz", "pci_class", "'020000zz' is not 0x"),
        ("vendor", "0xghij", "vendor", "'0xghij' is not 0x and 4"),
        ("device", "", "device", "'' is not 0x and 4"),
        ("sriov_totalvfs", "many", "max_vfs", "'many' is not valid"),
        ("local_cpus", "fffffffff", "local_cpus", "cannot read CPU mask 'fffffffff'"),
    ],
)
def test_a_malformed_value_costs_itself_and_is_named(
    tree: DeviceTree, name: str, text: str, field: str, said: str
) -> None:
    """The warning has file and value; the function's other facts and the next function are whole."""
    folder = tree.pci("0000:3b:00.0", numa_node=1)
    good = tree.pci("0000:3c:00.0", numa_node=1)
    (folder / name).write_text(f"{text}\n")
    reader = Tolerant(SysFs(tree.root))
    bad, whole = pci.functions(reader, CpuSet(range(8)), frozenset({0, 1}))
    assert not getattr(bad, field)
    assert len(reader.warnings) == 1
    assert said in reader.warnings[0]
    assert str(folder / name) in reader.warnings[0]
    others = {"pci_class": "020000", "vendor": "8086", "device": "1572", "numa_node": 1, "pcie_root": "pci0000:3b"}
    assert {key: getattr(bad, key) for key in others if key != field} == {
        key: value for key, value in others.items() if key != field
    }
    assert (whole.path, whole.numa_node) == (str(good.relative_to(tree.root)), 1)


def test_a_missing_class_and_an_unreadable_vendor_are_warnings(tree: DeviceTree) -> None:
    """A folder in the place of a file cannot be read by anyone, root included."""
    folder = tree.pci("0000:3b:00.0")
    (folder / "class").unlink()
    (folder / "vendor").unlink()
    (folder / "vendor").mkdir()
    warnings, found = _functions(tree.root)
    assert found["0000:3b:00.0"].pci_class is None
    assert found["0000:3b:00.0"].device == "1572"
    assert [str(folder / name) in said for name, said in zip(("class", "vendor"), warnings, strict=True)] == [
        True,
        True,
    ]


def test_the_functions_of_this_machine_are_those_that_the_kernel_lists() -> None:
    """The real tree: every entry of the bus, none without its class."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        pytest.skip("this machine has no PCI bus")
    warnings, found = _functions(Path("/"))
    assert sorted(found) == sorted(entry.name for entry in bus.iterdir())
    assert {one.pci_class for one in found.values()} == {
        (entry / "class").read_text().strip()[2:] for entry in bus.iterdir()
    }
    assert warnings == []
