"""NVMe controllers that are dead, or that report a fault of their own."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN
from nodeagent.host.health.nvme import NvmeState, Smart, judged
from nodeagent.host.health.source import Sight
from tests.builders.devices import DeviceTree
from tests.support.health_node import health_node

ONE, TWO = "0000:01:00.0", "0000:02:00.0"
WAIT_S = 30.0


def page(warning: int = 0, *, spare: int = 100, used: int = 3, media_errors: int = 0) -> bytes:
    """A SMART log page: the bytes that the specification gives these values."""
    content = bytearray(512)
    content[0], content[3], content[5] = warning, spare, used
    content[160:176] = media_errors.to_bytes(16, "little")
    return bytes(content)


class Controllers:
    """What the kernel does with an admin command on an open node, as strict as it is."""

    def __init__(self, answer: Callable[[str], bytes | int]) -> None:
        """answer: for the name of a controller its log page, or the status with which it refuses."""
        self.answer = answer
        self.asked: list[str] = []

    def ioctl(self, handle: int, request: int, command: bytearray) -> int:
        if request != 0xC0484E41 or len(command) != 72:
            raise OSError(errno.ENOTTY, "not a command of NVMe")
        opcode, _, _, nsid, _, _, _, address, _, length, cdw10 = struct.unpack_from("<BBHIIIQQIII", command)
        assert (opcode, nsid, length, cdw10) == (2, 0xFFFFFFFF, 512, 127 << 16 | 2)
        assert struct.unpack_from("<I", command, 64) == (0,), "a timeout resets a controller that is slow"
        name = os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2]
        self.asked.append(name)
        found = self.answer(name)
        if isinstance(found, int):
            return found
        ctypes.memmove(address, found, length)
        return 0

    def source(self) -> Smart:
        return Smart(self.ioctl, lambda _: True)


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    tree = DeviceTree(tmp_path)
    for number, address in enumerate((ONE, TWO)):
        tree.pci(address, pci_class="010802", driver="nvme")
        tree.nvme(address, number, {1: 1 << 40})
        tree.node(f"/dev/nvme{number}")
    return tree


def set_state(tree: DeviceTree, state: str) -> None:
    tree.write("sys/class/nvme/nvme0/state", state)


@pytest.mark.parametrize(
    ("state", "health"),
    [
        ("live", HEALTHY),
        ("dead", UNHEALTHY),
        *((one, UNKNOWN) for one in ("new", "resetting", "connecting", "deleting", "deleting (no IO)")),
    ],
)
async def test_a_controller_is_judged_by_its_state(tree: DeviceTree, state: str, health: str) -> None:
    set_state(tree, state)
    async with health_node(tree, every=[NvmeState()]) as node:
        await node.look()
        assert node.known(ONE) == (health, "" if state == "live" else f"controller nvme0 is {state}")
        assert node.known(TWO) == (HEALTHY, "")


async def test_a_controller_that_is_live_again_must_stay_so_and_one_that_is_unbound_says_nothing(
    tree: DeviceTree,
) -> None:
    set_state(tree, "dead")
    async with health_node(tree, every=[NvmeState()]) as node:
        await node.look()
        set_state(tree, "live")
        await node.look(1)
        assert node.known(ONE)[0] == UNHEALTHY
        await node.look(30)
        assert node.known(ONE)[0] == HEALTHY
        (tree.root / "sys/class/nvme/nvme0").unlink()
        await node.look()
        assert node.sources(ONE) == set()


TEXTS = (
    "its spare capacity has fallen below the threshold",
    "its temperature is beyond a threshold",
    "its reliability is degraded",
    "its media are read only",
    "the backup of its volatile memory has failed",
    "its persistent memory region is read only or unreliable",
)


@given(st.integers(0, 255))
def test_every_bit_of_the_critical_warning_has_its_reason(warning: int) -> None:
    """Heat alone is unknown: it passes. Bits that the specification reserves mean nothing."""
    seen = judged(page(warning))
    bits = [bit for bit in range(6) if warning & 1 << bit]
    assert seen.state == (UNHEALTHY if set(bits) - {1} else UNKNOWN if bits else HEALTHY)
    assert seen.reason == "; ".join(f"the drive reports that {TEXTS[bit]}" for bit in bits)


def test_wear_and_errors_are_read_but_do_not_count() -> None:
    readings = {"spare_percent": 7, "used_percent": 120, "media_errors": 1 << 70}
    assert judged(page(spare=7, used=120, media_errors=1 << 70)) == Sight(HEALTHY, "", readings)


async def test_a_drive_is_asked_for_its_log_page_once_in_a_while(tree: DeviceTree) -> None:
    drives = Controllers(lambda name: page(0b1000 if name == "nvme0" else 0))
    async with health_node(tree, every=[drives.source()]) as node:
        for _ in range(3):
            await node.look()
        assert drives.asked == ["nvme0", "nvme1"]
        assert node.known(ONE) == (UNHEALTHY, "the drive reports that its media are read only")
        assert node.known(TWO) == (HEALTHY, "")
        assert node.health.readings()[TWO, "smart"]["spare_percent"] == 100


async def test_a_dead_controller_that_never_answers_hides_no_other(tree: DeviceTree) -> None:
    goes_on = threading.Event()

    def answer(name: str) -> bytes:
        assert name != "nvme0" or goes_on.wait(WAIT_S)
        return page(0b100)

    drives = Controllers(answer)
    try:
        async with health_node(tree, every=[drives.source()], deadline_s=0.05) as node:
            for _ in range(2):
                await node.look()
                assert node.known(ONE) == (UNKNOWN, "the kernel did not answer within 0.05 s")
                assert node.known(TWO) == (UNHEALTHY, "the drive reports that its reliability is degraded")
        assert drives.asked == ["nvme0", "nvme1"]
    finally:
        goes_on.set()


@pytest.mark.parametrize("cause", [errno.EACCES, errno.EPERM, errno.ENOTTY])
async def test_an_agent_that_may_not_ask_observes_nothing(tree: DeviceTree, cause: int) -> None:
    """As with the shipped unit and DaemonSet."""

    def refuse(name: str) -> bytes:
        raise OSError(cause, os.strerror(cause))

    async with health_node(tree, every=[Controllers(refuse).source()]) as node:
        await node.look()
        assert node.sources(ONE) == set()


@pytest.mark.parametrize("fault", [0x4002, OSError(errno.EIO, "I/O error"), OSError(errno.ENODEV, "gone")])
async def test_a_drive_that_refuses_or_fails_the_command_keeps_what_was_known(
    tree: DeviceTree, fault: int | OSError
) -> None:
    answers: list[bytes | int | OSError] = [page(0b100), fault]

    def answer(name: str) -> bytes | int:
        found = answers[0]
        if isinstance(found, OSError):
            raise found
        return found

    source = Controllers(answer).source()
    source.period_s = 0.0
    async with health_node(tree, every=[source]) as node:
        await node.look()
        del answers[0]
        await node.look(100)
        await node.look(100)
        assert node.known(ONE) == (UNHEALTHY, "the drive reports that its reliability is degraded")


async def test_a_file_in_place_of_a_node_is_not_asked(tree: DeviceTree) -> None:
    """As in a captured tree."""
    drives = Controllers(lambda _: page(0xFF))
    async with health_node(tree, every=[Smart(drives.ioctl)]) as node:
        await node.look()
        assert (drives.asked, node.sources(ONE)) == ([], set())
