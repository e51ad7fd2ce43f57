"""Network adapters without a link: which are unhealthy, and which say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from tests.builders.devices import DeviceTree
from tests.support.health_node import HealthNode, health_node

NIC, VF = "0000:3b:00.0", "0000:3b:01.0"
UNPLUGGED = {"carrier": 0, "operstate": "down"}
SET_DOWN = {"flags": "0x1002", "operstate": "down"}


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


def ill(node: HealthNode, device: str) -> tuple[str, str]:
    """State and reason as every API shows them."""
    found = illness(node.agent.inventory.device_by_id[device], node.agent.health)
    return (found.state, found.reason) if found is not None else (HEALTHY, "")


def rewrite(tree: DeviceTree, name: str, **files: object) -> None:
    for file, value in files.items():
        tree.write(f"sys/class/net/{name}/{file}", value)


async def test_an_unplugged_cable_makes_the_adapter_unhealthy_until_it_is_back_for_a_while(tree: DeviceTree) -> None:
    tree.pci(NIC)
    tree.net(NIC, "eth1")
    async with health_node(tree) as node:
        await node.look()
        assert ill(node, NIC) == (HEALTHY, "")
        rewrite(tree, "eth1", **UNPLUGGED)
        await node.look()
        assert ill(node, NIC) == (UNHEALTHY, "no carrier on eth1")
        rewrite(tree, "eth1", carrier=1, operstate="up")
        await node.look(1)
        assert ill(node, NIC) == (UNHEALTHY, "no carrier on eth1")
        await node.look(30)
        assert ill(node, NIC) == (HEALTHY, "")


async def test_an_adapter_that_an_admin_has_set_down_is_not_ill(tree: DeviceTree) -> None:
    """Its carrier cannot be read; what was said before it was set down no longer counts."""
    tree.pci(NIC)
    folder = tree.net(NIC, "eth1", **SET_DOWN)
    (folder / "carrier").unlink()
    async with health_node(tree) as node:
        await node.look()
        assert (ill(node, NIC), node.sources(NIC) & {"carrier"}) == ((HEALTHY, ""), set())
        rewrite(tree, "eth1", flags="0x1003", **UNPLUGGED)
        await node.look()
        assert ill(node, NIC) == (UNHEALTHY, "no carrier on eth1")
        rewrite(tree, "eth1", **SET_DOWN)
        await node.look()
        await node.look(30)
        assert (ill(node, NIC), node.sources(NIC) & {"carrier"}) == ((HEALTHY, ""), set())


async def test_an_adapter_without_an_interface_here_says_nothing(tree: DeviceTree) -> None:
    """Bound to vfio, or its interface was moved into a pod's namespace, though it had no link before."""
    tree.pci(NIC, driver="vfio-pci", group=7)
    tree.pci("0000:5e:00.0")
    tree.net("0000:5e:00.0", "eth2", **UNPLUGGED)
    async with health_node(tree) as node:
        await node.look()
        assert node.sources(NIC) & {"carrier"} == set()
        assert ill(node, "0000:5e:00.0") == (UNHEALTHY, "no carrier on eth2")
        (tree.root / "sys/class/net/eth2").unlink()
        await node.look()
        await node.look(30)
        assert ill(node, "0000:5e:00.0") == (HEALTHY, "")


async def test_virtual_functions_are_as_ill_as_their_port_and_may_be_ill_alone(tree: DeviceTree) -> None:
    """One function with an interface, one under vfio."""
    tree.pci(NIC, driver="ice")
    tree.net(NIC, "ens1f0")
    for index, driver in enumerate(("iavf", "vfio-pci")):
        tree.vf(NIC, index, f"0000:3b:01.{index}", driver=driver, group=50 + index)
    tree.net(VF, "ens1f0v0", **UNPLUGGED)
    async with health_node(tree) as node:
        await node.look()
        shown = {one: ill(node, one) for one in (NIC, VF, "0000:3b:01.1")}
        assert shown == {
            NIC: (HEALTHY, ""),
            VF: (UNHEALTHY, "no carrier on ens1f0v0"),
            "0000:3b:01.1": (HEALTHY, ""),
        }
        rewrite(tree, "ens1f0v0", carrier=1, operstate="up")
        rewrite(tree, "ens1f0", **UNPLUGGED)
        await node.look()
        await node.look(30)
        assert {ill(node, one) for one in shown} == {(UNHEALTHY, "no carrier on ens1f0")}


async def test_of_several_ports_of_a_function_each_that_is_up_needs_a_link(tree: DeviceTree) -> None:
    """Representors of other functions are not its ports."""
    tree.pci(NIC)
    tree.net(NIC, "eth1")
    tree.net(NIC, "eth2", **UNPLUGGED)
    tree.net(NIC, "eth3", **SET_DOWN)
    tree.net(NIC, "pf0vf0", phys_port_name="pf0vf0", **UNPLUGGED)
    async with health_node(tree) as node:
        await node.look()
        assert ill(node, NIC) == (UNHEALTHY, "no carrier on eth2")
        rewrite(tree, "eth1", **UNPLUGGED)
        await node.look()
        assert ill(node, NIC) == (UNHEALTHY, "no carrier on eth1; no carrier on eth2")


@pytest.mark.parametrize("state", ["dormant", "testing", "notpresent"])
async def test_an_interface_with_a_carrier_that_passes_no_packets_is_unknown(tree: DeviceTree, state: str) -> None:
    tree.pci(NIC)
    tree.net(NIC, "eth1", operstate=state)
    async with health_node(tree) as node:
        await node.look()
        assert ill(node, NIC) == (UNKNOWN, f"eth1 is {state}")


async def test_a_driver_that_does_not_say_its_state_is_believed_its_carrier(tree: DeviceTree) -> None:
    """Virtual adapters have the state "unknown"."""
    tree.pci(NIC)
    tree.net(NIC, "eth1", operstate="unknown")
    async with health_node(tree) as node:
        await node.look()
        assert ill(node, NIC) == (HEALTHY, "")
        assert "carrier" in node.sources(NIC)


async def test_a_carrier_that_is_no_number_is_unknown_with_file_and_value(tree: DeviceTree) -> None:
    tree.pci(NIC)
    tree.net(NIC, "eth1", carrier="maybe")
    async with health_node(tree) as node:
        await node.look()
        state, reason = ill(node, NIC)
        assert state == UNKNOWN
        assert reason == f"cannot read {tree.root}/sys/class/net/eth1/carrier: 'maybe' is not a number"
