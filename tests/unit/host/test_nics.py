"""Network adapters on synthetic trees: ports, virtual functions, RDMA, representors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.devices import DeviceTree
from tests.support.looking import by_id, edits, kinds_of, look, paths


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


def test_a_port_is_told_with_its_virtual_functions(tree: DeviceTree) -> None:
    """Four VFs of which one waits under vfio-pci."""
    tree.pci("0000:3b:00.0", driver="ice", numa_node=0, group=40)
    tree.net("0000:3b:00.0", "ens1f0", speed=100000, address="b4:96:91:00:00:01")
    for index in range(4):
        driver = "vfio-pci" if index == 3 else "iavf"
        tree.vf("0000:3b:00.0", index, f"0000:3b:01.{index}", driver=driver, group=50 + index)
    tree.net("0000:3b:01.0", "ens1f0v0", flags="0x1002", operstate="down")
    found = by_id(look(tree))
    assert found["0000:3b:00.0"].attributes == {
        "sriov": "pf",
        "sriov_totalvfs": 64,
        "sriov_numvfs": 4,
        "netdevs": "ens1f0",
        "operstate": "up",
        "carrier": True,
        "speed_mbps": 100000,
        "mtu": 1500,
        "mac": "b4:96:91:00:00:01",
    }
    vf = found["0000:3b:01.0"]
    assert (vf.kind, vf.parent, vf.attributes["sriov"], vf.attributes["vf_index"]) == ("nic", "0000:3b:00.0", "vf", 0)
    assert vf.attributes["carrier"] is False
    assert "speed_mbps" not in vf.attributes
    assert found["0000:3b:01.3"].paths == ("/dev/vfio/vfio", "/dev/vfio/53")
    given = edits(vf, found["0000:3b:01.3"])
    assert given.env == {"PCIDEVICE_NODEAGENT_NIC": "0000:3b:01.0,0000:3b:01.3"}
    assert paths(given) == ["/dev/vfio/vfio", "/dev/vfio/53"]


def test_an_rdma_adapter_brings_its_verbs_and_management_nodes(tree: DeviceTree) -> None:
    tree.pci("0000:5e:00.0", vendor="15b3", driver="mlx5_core")
    tree.net("0000:5e:00.0", "ens2np0", phys_port_name="p0", phys_switch_id="9a1b")
    tree.rdma("0000:5e:00.0", "mlx5_0", 0)
    nic = by_id(look(tree))["0000:5e:00.0"]
    assert (nic.attributes["rdma"], nic.attributes["phys_port_name"]) == ("mlx5_0", "p0")
    assert nic.paths == ("/dev/infiniband/uverbs0", "/dev/infiniband/umad0", "/dev/infiniband/rdma_cm")
    assert paths(edits(nic)) == list(nic.paths)


def test_representors_and_scalable_functions_are_told_apart(tree: DeviceTree) -> None:
    """A DPU: the uplink, two ports inside its switch that speak for others, one scalable function with RDMA."""
    tree.pci("0000:03:00.0", vendor="15b3", driver="mlx5_core", numa_node=1)
    tree.net("0000:03:00.0", "p0", phys_port_name="p0")
    tree.net("0000:03:00.0", "pf0hpf", phys_port_name="pf0vf0")
    tree.net("0000:03:00.0", "en3f0pf0sf1", phys_port_name="pf0sf1")
    tree.net("0000:03:00.0", "enp3s0f0s1", below="mlx5_core.sf.2")
    tree.rdma("0000:03:00.0", "mlx5_2", 2, below="mlx5_core.sf.2")
    for name in ("mlx5_core.eth.0", "mlx5_core.sf.2"):
        (tree.folders["0000:03:00.0"] / name).mkdir(exist_ok=True)
        tree.link(f"sys/bus/auxiliary/devices/{name}", tree.folders["0000:03:00.0"] / name)
    found = by_id(look(tree))
    port, scalable = found["0000:03:00.0"], found["0000:03:00.0/mlx5_core.sf.2"]
    assert port.attributes["netdevs"] == "p0"
    assert port.attributes["representors"] == "en3f0pf0sf1=pf0sf1,pf0hpf=pf0vf0"
    assert port.attributes["auxiliary"] == "mlx5_core.eth.0,mlx5_core.sf.2"
    assert (scalable.parent, scalable.numa_node, scalable.attributes["netdevs"]) == (port.id, 1, "enp3s0f0s1")
    assert scalable.paths == ("/dev/infiniband/uverbs2", "/dev/infiniband/umad2", "/dev/infiniband/rdma_cm")


def test_a_virtio_interface_belongs_to_its_function_and_a_usb_one_not_to_its_controller(tree: DeviceTree) -> None:
    tree.pci("0000:00:03.0", vendor="1af4", driver="virtio-pci")
    tree.net("0000:00:03.0", "eth0", below="virtio0", speed=-1)
    tree.pci("0000:00:14.0", pci_class="0c0330", driver="xhci_hcd")
    tree.net("0000:00:14.0", "enx0050b6", below="usb1/1-4/1-4:1.0")
    found = look(tree)
    assert kinds_of(found) == {"0000:00:03.0": "nic", "0000:00:14.0": "pci"}
    assert "speed_mbps" not in by_id(found)["0000:00:03.0"].attributes


def test_the_adapter_with_the_default_route_is_marked(tree: DeviceTree) -> None:
    """IPv4 on one, IPv6 on another; a third has none."""
    for number, name in enumerate(["eth0", "eth1", "eth2"]):
        tree.pci(f"0000:3b:00.{number}")
        tree.net(f"0000:3b:00.{number}", name)
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
    rows = ("eth0 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0", "eth2 0000A8C0 00000000 0001 0 0 0 0000FFFF 0 0 0")
    tree.write("proc/1/net/route", "\n".join((head, *rows)))
    zeros = "0" * 32
    tree.write("proc/1/net/ipv6_route", f"{zeros} 00 {zeros} 00 {'f' * 32} 00000400 00000001 00000000 00000003 eth1")
    marked = {device.id for device in look(tree).devices if device.attributes.get("default_route")}
    assert marked == {"0000:3b:00.0", "0000:3b:00.1"}


@pytest.mark.parametrize(("file", "value"), [("mtu", "big"), ("speed", "fast"), ("flags", "zz")])
def test_a_malformed_value_of_an_interface_costs_itself(tree: DeviceTree, file: str, value: str) -> None:
    """The warning names file and value; the interface keeps its other facts."""
    tree.pci("0000:3b:00.0")
    folder = tree.net("0000:3b:00.0", "eth0")
    (folder / file).write_text(f"{value}\n")
    found = look(tree)
    assert len(found.warnings) == 1
    assert str(folder / file) in found.warnings[0]
    assert f"'{value}'" in found.warnings[0]
    assert by_id(found)["0000:3b:00.0"].attributes["mac"] == "02:00:00:00:00:01"
