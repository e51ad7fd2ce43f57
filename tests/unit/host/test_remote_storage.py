"""Adapters that lead to the node's disks and file systems over the network are the node's own."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.uses.remote_storage import storage_interfaces
from tests.builders.devices import DeviceTree
from tests.support.looking import look

NODES, STORAGE, OTHER = "0000:3b:00.0", "0000:5e:00.0", "0000:86:00.0"
HEAD = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"
MOUNT = "40 22 0:45 / /data rw,relatime shared:9 - {} {} {}"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """eth0 has the default route, eth1 the storage network 10.9.0.0/16 and fd00:9::/32, eth2 another network."""
    tree = DeviceTree(tmp_path)
    for number, address in enumerate((NODES, STORAGE, OTHER)):
        tree.pci(address, driver="ice")
        tree.net(address, f"eth{number}")
    tree.write("proc/1/net/route", "\n".join([HEAD, v4("eth0", "0.0.0.0/0"), v4("eth1", "10.9.0.0/16")]))
    tree.write("proc/1/net/ipv6_route", "\n".join([v6("eth0", "::/0"), v6("eth1", "fd00:9::/32")]))
    return tree


def v4(name: str, network: str) -> str:
    """A line of /proc/net/route, whose words are in the byte order of the network, read as little endian."""
    found = ipaddress.IPv4Network(network)
    to, mask = (one.packed[::-1].hex().upper() for one in (found.network_address, found.netmask))
    return f"{name} {to} 00000000 0001 0 0 100 {mask} 0 0 0"


def v6(name: str, network: str) -> str:
    found, zeros = ipaddress.IPv6Network(network), "0" * 32
    return f"{found.network_address.packed.hex()} {found.prefixlen:02x} {zeros} 00 {zeros} 00000400 1 0 1 {name}"


def mount(tree: DeviceTree, type: str, source: str, options: str) -> None:
    tree.write("proc/1/mountinfo", MOUNT.format(type, source, options))


def in_use(tree: DeviceTree) -> set[str]:
    return {one.id for one in look(tree).devices if one.kind == "nic" and one.attributes.get("in_use")}


@pytest.mark.parametrize(
    ("type", "source", "options"),
    [
        ("nfs4", "10.9.0.5:/export", "rw,vers=4.2,proto=tcp,clientaddr=10.9.0.2,local_lock=none,addr=10.9.0.5"),
        ("nfs", "filer:/export", "rw,vers=3,mountaddr=10.9.0.5,mountproto=udp,addr=10.9.0.5"),
        ("nfs4", "[fd00:9::5]:/export", "rw,vers=4.1,clientaddr=fd00:9::2,addr=fd00:9::5"),
        ("cifs", "//filer/share", "rw,vers=3.1.1,uid=0,addr=10.9.0.5,file_mode=0755"),
        ("ceph", "10.9.0.5:6789,10.9.0.6:6789:/", "rw,name=admin,secret=<hidden>,acl"),
        ("ceph", "admin@b3acfc0d.cephfs=/", "rw,mon_addr=10.9.0.5:3300/10.9.0.6:3300,acl"),
        ("ceph", "[fd00:9::5]:6789:/", "rw,name=admin"),
    ],
)
def test_the_adapter_to_a_mounted_file_system_is_in_use(tree: DeviceTree, type: str, source: str, options: str) -> None:
    assert in_use(tree) == set()
    mount(tree, type, source, options)
    assert in_use(tree) == {STORAGE}


def test_the_adapter_to_an_iscsi_target_is_in_use(tree: DeviceTree) -> None:
    tree.write("sys/class/iscsi_connection/connection1:0/address", "10.9.0.7")
    tree.write("sys/class/iscsi_connection/connection1:0/persistent_address", "10.0.0.7")
    assert in_use(tree) == {STORAGE}


@pytest.mark.parametrize(
    ("address", "used"),
    [
        ("traddr=10.9.0.8,trsvcid=4420,src_addr=10.9.0.2", {STORAGE}),
        ("traddr=fd00:9::8,trsvcid=4420", {STORAGE}),
        ("traddr=192.0.2.8,trsvcid=4420,host_iface=eth2,src_addr=198.51.100.2", {NODES, OTHER}),
        ("traddr=nn-0x200000109b579ef6:pn-0x100000109b579ef6", set()),
        ("", set()),
    ],
)
def test_the_adapter_to_an_nvme_controller_over_fabrics_is_in_use(
    tree: DeviceTree, address: str, used: set[str]
) -> None:
    tree.write("sys/class/nvme-fabrics/ctl/nvme3/address", address)
    tree.write("sys/class/nvme-fabrics/ctl/power/control", "auto")
    assert in_use(tree) == used


def test_what_is_below_the_interface_is_in_use(tree: DeviceTree) -> None:
    """A VLAN on a bond of two adapters."""
    tree.write("sys/class/net/bond0/bonding/slaves", "eth1 eth2")
    tree.write("sys/class/net/bond0.9/address", "02:00:00:00:00:01")
    (Path(tree.root) / "sys/class/net/bond0.9/lower_bond0").mkdir()
    tree.write("proc/1/net/route", "\n".join([HEAD, v4("eth0", "0.0.0.0/0"), v4("bond0.9", "10.9.0.0/16")]))
    mount(tree, "nfs4", "filer:/export", "rw,addr=10.9.0.5")
    assert in_use(tree) == {STORAGE, OTHER}


def test_an_address_that_no_route_of_the_main_table_leads_to_may_be_behind_any_of_them(tree: DeviceTree) -> None:
    """Policy routing has other tables, which /proc does not attribute to interfaces."""
    tree.write("proc/1/net/route", "\n".join([HEAD, v4("eth1", "10.8.0.0/16"), v4("eth2", "10.7.0.0/16")]))
    mount(tree, "nfs4", "filer:/export", "rw,addr=10.9.0.5")
    assert in_use(tree) == {STORAGE, OTHER}


@pytest.mark.parametrize("garbage", ["", "eth1", "eth1 zz 0 0 0 0 0 xx 0 0 0", "\0" * 40, "a b c d e f g h i j k l"])
def test_routes_that_make_no_sense_are_no_routes(tree: DeviceTree, garbage: str) -> None:
    for file in ("route", "ipv6_route"):
        text = Path(tree.root, f"proc/1/net/{file}").read_text()
        tree.write(f"proc/1/net/{file}", f"{text}\n{garbage}")
    mount(tree, "nfs4", "filer:/export", "rw,addr=10.9.0.5")
    assert in_use(tree) == {STORAGE}


NETWORKS = st.lists(
    st.tuples(st.sampled_from(["eth0", "eth1", "eth2", "lo"]), st.integers(0, 2**32 - 1), st.integers(0, 32)),
    max_size=8,
)


@given(NETWORKS, st.integers(0, 2**32 - 1))
def test_the_most_specific_routes_lead_to_a_peer(
    tmp_path_factory: pytest.TempPathFactory, routes: list[tuple[str, int, int]], peer: int
) -> None:
    """As the kernel looks them up; of several equal ones all."""
    known = [(name, ipaddress.IPv4Network((to, bits), strict=False)) for name, to, bits in routes]
    address = ipaddress.IPv4Address(peer)
    fit = [(network.prefixlen, name) for name, network in known if address in network]
    best = {name for length, name in fit if length == max(fit)[0]}
    tree = DeviceTree(tmp_path_factory.mktemp("routes"))
    tree.write("proc/1/net/route", "\n".join([HEAD, *(v4(name, str(network)) for name, network in known)]))
    found = storage_interfaces(Tolerant(SysFs(str(tree.root))), [str(address)])
    assert found == (best or {name for name, _ in known}) - {"lo"}
