"""vDPA devices on synthetic trees: what they are a part of, what a container gets, and that nothing is given twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.prepare import Catalog, prepare
from nodeagent.core.model.inventory import ABSENT, PRESENT
from nodeagent.errors import Refused
from nodeagent.host.devices import all_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.builders.pools import DRIVER, NOBODY, NODE, claim, result, stamp
from tests.support.looking import by_id, edits, look, paths, state

PF, VF, SECOND = "0000:5e:00.0", "0000:5e:01.0", "0000:5e:01.1"
SF = "mlx5_core.sf.4"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """An adapter with two virtual functions and one scalable one."""
    tree = DeviceTree(machine(tmp_path / "root", "1s2n4c"))
    tree.pci(PF, vendor="15b3", driver="mlx5_core", numa_node=1)
    tree.net(PF, "ens1np0", phys_port_name="p0")
    tree.net(PF, "ens1npf0vf0", phys_port_name="pf0vf0")
    for index, address in enumerate((VF, SECOND)):
        tree.vf(PF, index, address, driver="mlx5_core")
    (tree.folders[PF] / SF).mkdir()
    tree.link(f"sys/bus/auxiliary/devices/{SF}", tree.folders[PF] / SF)
    return tree


def test_one_for_user_space_is_a_part_of_its_virtual_function(tree: DeviceTree) -> None:
    tree.vdpa(VF, "vdpa0", node=3)
    found = look(tree)
    one = by_id(found)[f"{VF}/vdpa0"]
    assert (one.kind, one.parent, one.driver, one.numa_node) == ("vdpa", VF, "vhost_vdpa", 0)
    assert one.attributes == {"name": "vdpa0", "pf_name": "ens1np0"}
    assert one.bridges[-1] == VF and not one.lacks_node
    tree.vdpa(SECOND, "blue", node=0)
    other = by_id(look(tree))[f"{SECOND}/blue"]
    given = edits(one, other)
    assert paths(given) == ["/dev/vhost-vdpa-3", "/dev/vhost-vdpa-0"]
    assert given.env == {"NODEAGENT_VDPA_DEVICES": "/dev/vhost-vdpa-3,/dev/vhost-vdpa-0"}
    assert state(found, "vdpa").state == PRESENT and found.warnings == ()


def test_one_of_a_scalable_function_is_a_part_of_that(tree: DeviceTree) -> None:
    tree.vdpa(PF, "vdpa0", below=SF)
    found = by_id(look(tree))
    one = found[f"{PF}/{SF}/vdpa0"]
    assert one.parent == f"{PF}/{SF}" and one.parent in found
    assert one.attributes == {"name": "vdpa0", "pf_name": "ens1np0"}


def test_one_of_another_part_of_a_function_and_one_in_software(tree: DeviceTree) -> None:
    """An auxiliary device of the driver's own is no device here; a simulator belongs to no function."""
    tree.vdpa(VF, "vdpa0", below="pds_core.vDPA.2", node=1)
    tree.vdpa("", "sim0", node=2)
    found = by_id(look(tree))
    assert (found[f"{VF}/vdpa0"].parent, found["vdpa/sim0"].parent) == (VF, None)
    assert found["vdpa/sim0"].attributes == {"name": "sim0"}
    assert found["vdpa/sim0"].paths == ("/dev/vhost-vdpa-2",)


def test_one_that_the_hosts_kernel_uses_or_nobody_has_no_node(tree: DeviceTree) -> None:
    tree.vdpa(VF, "vdpa0", driver="virtio_vdpa", node=7)
    tree.vdpa(SECOND, "vdpa1", driver=None)
    found = by_id(look(tree))
    one, other = found[f"{VF}/vdpa0"], found[f"{SECOND}/vdpa1"]
    assert (one.driver, one.paths, one.attributes["netdevs"]) == ("virtio_vdpa", (), "eth7")
    assert (other.driver, other.paths, other.attributes.get("netdevs")) == (None, (), None)
    assert one.lacks_node and other.lacks_node
    assert found[VF].attributes["netdevs"] == "eth7"


def test_interfaces_are_left_out_where_it_is_not_known_whose_they_are(tree: DeviceTree) -> None:
    """What does the DMA of scalable functions is their physical one."""
    for number in (4, 5):
        tree.vdpa(PF, f"vdpa{number}", below=f"mlx5_core.sf.{number}", driver="virtio_vdpa", node=number)
    found = by_id(look(tree))
    assert [found[f"{PF}/mlx5_core.sf.{number}/vdpa{number}"].attributes.get("netdevs") for number in (4, 5)] == [
        None
    ] * 2
    folder = tree.vdpa(VF, "new", driver="virtio_vdpa", node=6)
    (folder / "virtio8/net/eth8").mkdir(parents=True)  # where newer kernels have it
    assert by_id(look(tree))[f"{VF}/new"].attributes["netdevs"] == "eth6,eth8"


def test_without_any_the_kind_says_so(tree: DeviceTree) -> None:
    assert state(look(tree), "vdpa").state == ABSENT


VDPA = DeviceResource(name="d/vdpa", kind="vdpa")
NIC = DeviceResource(name="d/vf", kind="nic", match={"sriov": "vf"})


def test_a_device_and_its_functions_are_never_in_two_grants_over_both_apis(tree: DeviceTree) -> None:
    tree.vdpa(VF, "vdpa0", node=0)
    tree.vdpa(SECOND, "vdpa1", node=1)
    found = scan(SysFs(tree.root), all_kinds.builtin_kinds())
    kinds = {"vdpa": DevicePool(kind="vdpa", resources=(VDPA,)), "nic": DevicePool(kind="nic", resources=(NIC,))}
    catalog = Catalog(driver=DRIVER, node_name=NODE, kinds=kinds)
    held = allocate(found, NOBODY, VDPA, [[f"{VF}/vdpa0"]], stamp())
    with pytest.raises(Refused, match=VF):
        allocate(found, held.ledger, NIC, [[VF]], stamp())
    wanted = claim("vf", result("nic", VF.replace(":", "-").replace(".", "-")))
    (why,) = prepare(found, held.ledger, catalog, [wanted], stamp()).errors.values()
    assert VF in why
    done = prepare(found, held.ledger, catalog, [claim("x", result("nic", "0000-5e-01-1"))], stamp())
    assert not done.errors
    with pytest.raises(Refused, match=f"{SECOND}/vdpa1"):
        allocate(found, done.ledger, VDPA, [[f"{SECOND}/vdpa1"]], stamp())
    assert allocate(found, NOBODY, NIC, [[SECOND]], stamp()).grants
