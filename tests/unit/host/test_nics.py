"""Network adapters on synthetic trees: ports, virtual functions, RDMA, representors."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.devices import DeviceResource
from tests.builders import tables
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


# ---------------------------------------------------------------- the node's own routes

FIRST, SECOND, THIRD = "0000:3b:00.0", "0000:3b:00.1", "0000:5e:00.0"


def _three_adapters(tree: DeviceTree) -> None:
    """eth0, eth1 and eth2, each with its own MAC address."""
    for number, address in enumerate((FIRST, SECOND, THIRD)):
        tree.pci(address)
        tree.net(address, f"eth{number}", address=f"02:00:00:00:00:0{number}")


def _virtual(tree: DeviceTree, name: str, *lowers: str, **files: object) -> Path:
    """A software interface above others, with the links that the kernel makes on both sides."""
    folder = tree.member("net", name, tree.root / f"sys/devices/virtual/net/{name}", {"flags": "0x1003", **files})
    for lower in lowers:
        tree.link(f"{folder.relative_to(tree.root)}/lower_{lower}", _interface(tree, lower))
        tree.link(f"{_interface(tree, lower).relative_to(tree.root)}/upper_{name}", folder)
    return folder


def _interface(tree: DeviceTree, name: str) -> Path:
    return (tree.root / f"sys/class/net/{name}").resolve()


def _default_route(tree: DeviceTree, name: str) -> None:
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
    tree.write("proc/1/net/route", f"{head}\n{name} 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0")


def _routed(tree: DeviceTree) -> set[str]:
    """The adapters with a default route; none of them is served."""
    found = [device for device in look(tree).devices if device.attributes.get("default_route")]
    resource = DeviceResource(name="r/nic", kind="nic")
    assert not any(resource.serves(one) for one in found)
    return {device.id for device in found}


def test_every_adapter_of_a_routed_bond_is_marked(tree: DeviceTree) -> None:
    _three_adapters(tree)
    _virtual(tree, "bond0", "eth0", "eth1")
    _default_route(tree, "bond0")
    assert _routed(tree) == {FIRST, SECOND}


def test_adapters_are_found_below_a_bridge_on_a_vlan_on_a_bond(tree: DeviceTree) -> None:
    _three_adapters(tree)
    _virtual(tree, "bond0", "eth0", "eth2")
    _virtual(tree, "bond0.100", "bond0")
    _virtual(tree, "br0", "bond0.100")
    _virtual(tree, "macvlan0", "br0")
    _default_route(tree, "macvlan0")
    assert _routed(tree) == {FIRST, THIRD}


@pytest.mark.parametrize("how", ["lower link", "upper link", "master", "slaves", "port of a bridge", "table of VLANs"])
def test_one_witness_of_a_relation_is_enough(tree: DeviceTree, how: str) -> None:
    _three_adapters(tree)
    above, below = _virtual(tree, "above"), _interface(tree, "eth1")
    at = {"lower link": above / "lower_eth1", "upper link": below / "upper_above", "master": below / "master"}
    if how in at:
        tree.link(str(at[how].relative_to(tree.root)), below if how == "lower link" else above)
    elif how == "slaves":
        (above / "bonding").mkdir()
        (above / "bonding/slaves").write_text("eth1\n")
    elif how == "port of a bridge":
        (above / "brif/eth1").mkdir(parents=True)
    else:
        head = "VLAN Dev name | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD"
        tree.write("proc/1/net/vlan/config", f"{head}\nabove          | 100  | eth1")
    _default_route(tree, "above")
    assert _routed(tree) == {SECOND}


def test_a_loop_of_interfaces_ends(tree: DeviceTree) -> None:
    _three_adapters(tree)
    _virtual(tree, "a", "eth0")
    _virtual(tree, "b", "a")
    tree.link("sys/devices/virtual/net/a/lower_b", tree.root / "sys/devices/virtual/net/b")
    _default_route(tree, "b")
    assert _routed(tree) == {FIRST}


@pytest.mark.parametrize("linked", [True, False])
def test_the_virtual_function_below_hyper_vs_interface_is_marked(tree: DeviceTree, linked: bool) -> None:
    """An old kernel does not link them; they have the same MAC address."""
    _three_adapters(tree)
    folder = tree.root / "sys/devices/LNXSYSTM:00/VMBUS:00/000d3a00/net/synthetic"
    tree.member("net", "synthetic", folder, {"flags": "0x1003", "address": "02:00:00:00:00:02"})
    if linked:
        tree.link(f"{_interface(tree, 'eth2').relative_to(tree.root)}/master", folder)
    _default_route(tree, "synthetic")
    assert _routed(tree) == {THIRD}


def test_the_ports_of_open_vswitch_are_below_its_bridges(tree: DeviceTree) -> None:
    """The bridge's own interface has no link to anything; the ports have the datapath as their master."""
    _three_adapters(tree)
    _virtual(tree, "ovs-system", "eth0", "eth1", address="12:34:56:78:9a:bc")
    _virtual(tree, "br-ex", address="02:00:00:00:00:00")
    _default_route(tree, "br-ex")
    assert _routed(tree) == {FIRST, SECOND}


VRF_TABLES = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 10.0.0.0
        /24 link UNICAST
Id 200:
  +-- 0.0.0.0/0 2 0 2
     |-- 0.0.0.0
        /0 universe {kind}"""


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        (VRF_TABLES.format(kind="UNICAST"), {FIRST}),
        (VRF_TABLES.format(kind="UNREACHABLE"), set()),
        (VRF_TABLES.replace("Id 200:", "Main:").format(kind="UNICAST"), set()),
        (None, {FIRST}),
    ],
)
def test_the_members_of_a_vrf_are_marked_if_its_table_may_have_a_default_route(
    tree: DeviceTree, tables: str | None, wanted: set[str]
) -> None:
    """/proc/net/route has the main table alone; without the list of tables nothing proves that there is none."""
    _three_adapters(tree)
    _virtual(tree, "blue", "eth0", flags="0x4c1")
    _virtual(tree, "bond0", "eth1", flags="0x1443")
    if tables is not None:
        tree.write("proc/1/net/fib_trie", tables)
    assert _routed(tree) == wanted


def test_a_route_on_a_virtual_function_marks_the_physical_one_and_not_its_siblings(tree: DeviceTree) -> None:
    tree.pci(FIRST, driver="ice")
    for index in range(2):
        tree.vf(FIRST, index, f"0000:3b:01.{index}")
        tree.net(f"0000:3b:01.{index}", f"vf{index}")
    _default_route(tree, "vf1")
    assert _routed(tree) == {FIRST, "0000:3b:01.1"}


@pytest.mark.parametrize(("name", "wanted"), [("bond", {"0000:00:03.0", "0000:00:03.1"}), ("netvsc", {"0001:00:02.0"})])
def test_the_adapters_of_a_recorded_route_are_marked(tmp_path: Path, name: str, wanted: set[str]) -> None:
    root = tables.build(tmp_path, tables.load(f"nic-default-route-{name}", tables.TREES))
    assert _routed(DeviceTree(root)) == wanted


# ---------------------------------------------------------------- routes that are default routes by another name


def _ipv4_routes(tree: DeviceTree, *routes: tuple[str, str, str]) -> None:
    """Routes as (interface, destination, mask), the latter two in the file's byte order."""
    lines = [f"{name} {to} 00000000 0001 0 0 0 {mask} 0 0 0" for name, to, mask in routes]
    tree.write("proc/1/net/route", "\n".join(["Iface Destination Gateway Flags RefCnt Use Metric Mask", *lines]))


def test_two_halves_of_all_addresses_are_a_default_route(tree: DeviceTree) -> None:
    """0.0.0.0/1 and 128.0.0.0/1, one on each adapter; a network of 8 bits is none."""
    _three_adapters(tree)
    _ipv4_routes(
        tree, ("eth0", "00000000", "00000080"), ("eth1", "00000080", "00000080"), ("eth2", "0000000A", "000000FF")
    )
    assert _routed(tree) == {FIRST, SECOND}


@pytest.mark.parametrize(("prefix", "routed"), [("00", {FIRST}), ("03", {FIRST}), ("08", set()), ("40", set())])
def test_all_global_addresses_of_ipv6_are_a_default_route(tree: DeviceTree, prefix: str, routed: set[str]) -> None:
    """2000::/3; neither ff00::/8 nor a network of 64 bits is one, nor what is unreachable through lo."""
    _three_adapters(tree)
    rest = f"{prefix} {'0' * 32} 00 {'0' * 32} 00000400 00000001 00000000 00000003"
    tree.write("proc/1/net/ipv6_route", f"20{'0' * 30} {rest} eth0\n{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} 0 0 0 0 lo")
    assert _routed(tree) == routed


@pytest.mark.parametrize("tunnel", ["wg0", "ppp0", "dummy0"])
def test_below_a_tunnel_every_adapter_with_a_route_may_carry_the_network(tree: DeviceTree, tunnel: str) -> None:
    """No link shows which one does: neither adapter with a route of its own is known to be free."""
    _three_adapters(tree)
    _virtual(tree, tunnel)
    _virtual(tree, "bond0", "eth1")
    wide = (tunnel, "00000000", "00000000")
    _ipv4_routes(tree, wide, ("eth0", "0001A8C0", "00FFFFFF"), ("bond0", "0002A8C0", "00FFFFFF"))
    assert _routed(tree) == {FIRST, SECOND}
    _ipv4_routes(tree, wide)
    assert _routed(tree) == {FIRST, SECOND, THIRD}
    _ipv4_routes(tree, wide, ("eth2", "00000000", "00000000"))
    assert _routed(tree) == {THIRD}


def test_a_default_route_through_an_adapter_that_is_not_on_pci_marks_no_other(tree: DeviceTree) -> None:
    """Such as the adapter of a system on chip."""
    _three_adapters(tree)
    tree.member("net", "end0", tree.root / "sys/devices/platform/soc/eth/net/end0", {"flags": "0x1003"})
    _ipv4_routes(tree, ("end0", "00000000", "00000000"), ("eth0", "0001A8C0", "00FFFFFF"))
    assert _routed(tree) == set()


def test_a_function_says_what_other_plugins_select_it_by(tree: DeviceTree) -> None:
    """The interface of its physical function, which is no representor; the type of its link; the firmware's number."""
    tree.pci("0000:3b:00.0", driver="mlx5_core")
    tree.net("0000:3b:00.0", "eth9", phys_port_name="pf0vf0")
    tree.net("0000:3b:00.0", "ens1f0", phys_port_name="p0", type=1)
    for index in range(2):
        tree.vf("0000:3b:00.0", index, f"0000:3b:01.{index}")
    tree.net("0000:3b:01.1", "ib1", type=32)
    tree.write("sys/bus/pci/devices/0000:3b:01.1/acpi_index", 7)
    found = by_id(look(tree))
    names = ("pf_name", "link_type", "acpi_index")
    told = {id: tuple(one.attributes.get(name) for name in names) for id, one in found.items()}
    assert told == {
        "0000:3b:00.0": (None, "ether", None),
        "0000:3b:01.0": ("ens1f0", None, None),
        "0000:3b:01.1": ("ens1f0", "infiniband", "7"),
    }
