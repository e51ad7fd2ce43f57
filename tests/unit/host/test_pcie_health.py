"""PCIe links with fewer lanes than both ends have, and the errors that devices report."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from tests.builders.devices import BRIDGE, DeviceTree
from tests.support.health_node import HealthNode, health_node

ROOT, GPU = "0000:15:01.0", "0000:16:00.0"
FATAL = "Undefined 0\nDLP {dlp}\nSDES 0\nTLP 0\nMalfTLP 0\nTOTAL_ERR_FATAL {dlp}"


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


def link(lanes: int, most: int, speed: str = "16.0 GT/s PCIe", fastest: str = "16.0 GT/s PCIe") -> dict[str, object]:
    return {
        "current_link_width": lanes,
        "max_link_width": most,
        "current_link_speed": speed,
        "max_link_speed": fastest,
    }


def port(tree: DeviceTree, address: str, files: dict[str, object], *, under: str | None = None) -> None:
    tree.pci(address, under=under, pci_class=BRIDGE, driver="pcieport", files=files)


def gpu(tree: DeviceTree, address: str, files: dict[str, object], *, under: str, driver: str = "nvidia") -> None:
    tree.pci(address, under=under, pci_class="030200", vendor="10de", driver=driver, files=files)


def rewrite(tree: DeviceTree, address: str, **files: object) -> None:
    for file, value in files.items():
        tree.write(f"sys/bus/pci/devices/{address}/{file}", value)


def ill(node: HealthNode, device: str) -> tuple[str, str]:
    found = illness(node.agent.inventory.device_by_id[device], node.agent.health)
    return (found.state, found.reason) if found is not None else (HEALTHY, "")


async def pcie(tree: DeviceTree, device: str = GPU) -> tuple[str, str]:
    """What is known of a device after one look."""
    async with health_node(tree) as node:
        await node.look()
        return node.known(device)


async def test_a_card_that_lost_lanes_is_unhealthy_with_both_numbers_until_it_has_them_again(tree: DeviceTree) -> None:
    port(tree, ROOT, link(8, 16))
    gpu(tree, GPU, link(8, 16), under=ROOT)
    async with health_node(tree) as node:
        await node.look()
        assert node.known(GPU) == (UNHEALTHY, "the PCIe link has 8 of 16 lanes")
        assert node.health.readings()[GPU, "pcie"]["lanes"] == 8
        for address in (ROOT, GPU):
            rewrite(tree, address, current_link_width=16)
        await node.look()
        await node.look(30)
        assert node.known(GPU) == (HEALTHY, "")


@pytest.mark.parametrize(("slot", "card"), [(8, 16), (16, 8), (4, 16)])
async def test_a_card_has_no_more_lanes_than_its_slot_and_the_other_way_round(
    tree: DeviceTree, slot: int, card: int
) -> None:
    lanes = min(slot, card)
    port(tree, ROOT, link(lanes, slot))
    gpu(tree, GPU, link(lanes, card), under=ROOT)
    assert await pcie(tree) == (HEALTHY, "")


async def test_an_idle_gpu_that_has_lowered_its_speed_is_healthy_and_the_speed_can_be_seen(tree: DeviceTree) -> None:
    port(tree, ROOT, link(16, 16, speed="2.5 GT/s PCIe"))
    gpu(tree, GPU, link(16, 16, speed="2.5 GT/s PCIe"), under=ROOT)
    async with health_node(tree) as node:
        await node.look()
        assert node.known(GPU) == (HEALTHY, "")
        assert node.health.readings()[GPU, "pcie"] == {
            "lanes": 16,
            "lanes_possible": 16,
            "speed_mts": 2500,
            "speed_max_mts": 16000,
        }


async def test_a_switch_that_lost_lanes_makes_what_is_below_it_unhealthy(tree: DeviceTree) -> None:
    """The ports inside a switch are no link, whatever they say."""
    port(tree, ROOT, link(4, 16))
    port(tree, "0000:16:00.0", link(4, 16), under=ROOT)
    port(tree, "0000:17:00.0", link(16, 16), under="0000:16:00.0")
    gpu(tree, "0000:18:00.0", link(16, 16), under="0000:17:00.0")
    assert await pcie(tree, "0000:18:00.0") == (
        UNHEALTHY,
        "the PCIe link of 0000:16:00.0 above has 4 of 16 lanes",
    )


@pytest.mark.parametrize(
    ("above", "below"),
    [
        ({}, {}),
        (link(8, 16), {}),
        (link(16, 16), link(8, 16)),
        (link(0, 16), link(0, 16)),
        (link(255, 255), link(255, 255)),
        ({"vendor": "0x1b36", **link(8, 32)}, link(8, 16)),
    ],
    ids=["no-link", "one-end", "in-training", "no-lanes", "inside-the-processor", "qemu"],
)
async def test_what_is_no_link_or_not_the_whole_link_says_nothing(
    tree: DeviceTree, above: dict[str, object], below: dict[str, object]
) -> None:
    port(tree, ROOT, above)
    gpu(tree, GPU, below, under=ROOT)
    assert await pcie(tree) == (HEALTHY, "")


async def test_lanes_do_not_count_in_a_virtual_machine_or_where_the_driver_lowers_them(tree: DeviceTree) -> None:
    port(tree, ROOT, link(8, 16))
    gpu(tree, GPU, link(8, 16), under=ROOT, driver="amdgpu")
    gpu(tree, "0000:16:00.1", link(8, 16), under=ROOT)
    async with health_node(tree) as node:
        await node.look()
        assert (node.known(GPU)[0], node.known("0000:16:00.1")[0]) == (HEALTHY, UNHEALTHY)
    tree.write("proc/cpuinfo", "processor : 0\nflags\t\t: fpu vme hypervisor lahf_lm")
    assert await pcie(tree, "0000:16:00.1") == (HEALTHY, "")


async def test_a_device_that_sleeps_is_not_woken_and_keeps_what_is_known(tree: DeviceTree) -> None:
    port(tree, ROOT, link(8, 16))
    gpu(tree, GPU, link(8, 16), under=ROOT)
    async with health_node(tree) as node:
        await node.look()
        rewrite(tree, GPU, **{"power/runtime_status": "suspended", "current_link_width": 16})
        rewrite(tree, ROOT, current_link_width=16)
        await node.look(100)
        await node.look(100)
        assert node.known(GPU) == (UNHEALTHY, "the PCIe link has 8 of 16 lanes")


async def test_a_fatal_error_makes_a_device_and_its_functions_unhealthy_as_long_as_it_is_counted(
    tree: DeviceTree,
) -> None:
    """Others are only counted."""
    counts = {
        "aer_dev_fatal": FATAL.format(dlp=0),
        "aer_dev_nonfatal": "Undefined 0\nTLP 3\nTOTAL_ERR_NONFATAL 3",
        "aer_dev_correctable": "RxErr 9\nTOTAL_ERR_COR 9",
    }
    tree.pci("0000:3b:00.0", driver="ice", files=counts)
    tree.vf("0000:3b:00.0", 0, "0000:3b:01.0")
    rewrite(tree, "0000:3b:01.0", aer_dev_fatal=FATAL.format(dlp=7))
    async with health_node(tree) as node:
        await node.look()
        assert node.known("0000:3b:00.0") == (HEALTHY, "")
        assert node.health.readings()["0000:3b:00.0", "aer"] == {"fatal": 0, "nonfatal": 3, "correctable": 9}
        assert ill(node, "0000:3b:01.0") == (HEALTHY, ""), "a virtual function reports through its physical one"
        rewrite(tree, "0000:3b:00.0", aer_dev_fatal=FATAL.format(dlp=2))
        for after_s in (0, 1000):
            await node.look(after_s)
            for one in ("0000:3b:00.0", "0000:3b:01.0"):
                assert ill(node, one) == (UNHEALTHY, "2 fatal PCIe errors (DLP)")


@pytest.mark.parametrize("text", ["TOTAL_ERR_FATAL many", "garbage"])
async def test_counts_that_cannot_be_understood_are_unknown(tree: DeviceTree, text: str) -> None:
    tree.pci("0000:3b:00.0", files={"aer_dev_fatal": text})
    assert await pcie(tree, "0000:3b:00.0") == (
        UNKNOWN,
        f"cannot read {tree.root}/sys/bus/pci/devices/0000:3b:00.0/aer_dev_fatal: there is no TOTAL_ERR_FATAL",
    )
