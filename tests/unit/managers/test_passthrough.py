"""Devices bound to a VFIO driver and given back, on a double of the kernel, killed at any step."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from nodeagent.errors import HostError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import Functions, TimedPut
from nodeagent.managers.passthrough.binder import Binder
from nodeagent.managers.passthrough.journal import PassthroughJournal
from tests.builders.devices import DeviceTree
from tests.doubles.pci_drivers import PciKernel
from tests.support.long_form import share_of

GPU, AUDIO, NIC, BRIDGE, OTHER = "0000:41:00.0", "0000:41:00.1", "0000:42:00.0", "0000:40:01.0", "0000:43:00.0"
TABLES = {"nvidia": frozenset({GPU, OTHER}), "snd_hda_intel": frozenset({AUDIO}), "mlx5_core": frozenset({NIC})}
OWN = {GPU: "nvidia", AUDIO: "snd_hda_intel", NIC: "mlx5_core", OTHER: "nvidia"}
KNOWN = {GPU, AUDIO, NIC, OTHER}


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


def tree_of(root: Path) -> DeviceTree:
    """A GPU with its audio function and the port above in one group; an adapter and another GPU in groups of their
    own."""
    tree = DeviceTree(root)
    groups = {GPU: 7, AUDIO: 7, BRIDGE: 7, NIC: 8, OTHER: 9}
    classes = {GPU: "030000", AUDIO: "040300", BRIDGE: "060400", NIC: "020000", OTHER: "030200"}
    for address, group in groups.items():
        folder = tree.pci(address, pci_class=classes[address], vendor="10de", driver=OWN.get(address), group=group)
        tree.link(f"sys/kernel/iommu_groups/{group}/devices/{address}", folder)
    return tree


class DirectPut(TimedPut):
    """Writes in the thread of the caller, which is killed with it."""

    def __call__(self, path: str, text: str) -> None:
        try:
            self._put(path, text)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}") from None


class Node:
    """A machine with its kernel, and an agent's binder, which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.kernel = PciKernel(tree_of(folder / "root").root, TABLES)
        self.state = folder / "state"
        self.state.mkdir()
        self.boot = 0
        self.start()

    def start(self) -> None:
        journal = PassthroughJournal(self.state, f"boot-{self.boot}")
        self.binder = Binder(journal, Functions(SysFs(self.kernel.root), DirectPut(self.kernel.put)))

    def drivers(self) -> dict[str, str]:
        return {address: self.kernel.driver(address) for address in OWN}

    def is_untouched(self) -> bool:
        reserved = [address for address in self.kernel.functions() if self.kernel.override(address)]
        return self.drivers() == OWN and not reserved and not self.binder.records()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_gpu_is_bound_with_its_audio_function_and_given_back(node: Node) -> None:
    """The port above stays with its driver: bridges are no part of what a guest gets."""
    node.binder.bind("c", GPU, "vfio-pci", KNOWN)
    assert node.drivers() == {**OWN, GPU: "vfio-pci", AUDIO: "vfio-pci"}
    assert node.kernel.override(BRIDGE) == ""
    assert node.binder.give_back({"c"}) == {}
    assert node.is_untouched()


def test_binding_twice_writes_nothing_the_second_time(node: Node) -> None:
    node.binder.bind("c", GPU, "vfio-pci", KNOWN)
    before = list(node.kernel.written)
    node.binder.bind("c", GPU, "vfio-pci", KNOWN)
    assert node.kernel.written == before


def test_a_group_with_a_function_that_is_not_ours_is_left_alone(node: Node) -> None:
    with pytest.raises(HostError, match=rf"its IOMMU group has {AUDIO} as well"):
        node.binder.bind("c", GPU, "vfio-pci", {GPU})
    assert node.is_untouched()


def test_what_is_still_bound_for_one_claim_is_not_bound_for_another(node: Node) -> None:
    node.binder.bind("c", GPU, "vfio-pci", KNOWN)
    with pytest.raises(HostError, match="is not given back yet"):
        node.binder.bind("d", GPU, "vfio-pci", KNOWN)
    assert node.binder.give_back({"d"}) == {}
    assert node.drivers()[GPU] == "vfio-pci"


def test_a_driver_that_is_not_loaded_is_named_and_what_was_begun_can_be_given_back(node: Node) -> None:
    with pytest.raises(HostError, match=r"there is no driver mlx5_vfio_pci \(modprobe"):
        node.binder.bind("c", NIC, "mlx5_vfio_pci", KNOWN)
    assert node.binder.give_back({"c"}) == {}
    assert node.is_untouched()


def test_what_an_admin_had_bound_and_reserved_stays_so(node: Node) -> None:
    folder = node.kernel.root / "sys/bus/pci/devices"
    node.kernel.put(str(folder / OTHER / "driver_override"), "vfio-pci")
    node.kernel.put(str(folder / OTHER / "driver/unbind"), OTHER)
    node.kernel.put(str(node.kernel.root / "sys/bus/pci/drivers_probe"), OTHER)
    node.binder.bind("c", OTHER, "vfio-pci", KNOWN)
    assert node.binder.give_back({"c"}) == {}
    assert (node.kernel.driver(OTHER), node.kernel.override(OTHER)) == ("vfio-pci", "vfio-pci")


def test_a_function_without_a_driver_has_none_afterwards(node: Node) -> None:
    node.kernel.put(str(node.kernel.root / f"sys/bus/pci/devices/{NIC}/driver/unbind"), NIC)
    node.binder.bind("c", NIC, "vfio-pci", KNOWN)
    assert node.kernel.driver(NIC) == "vfio-pci"
    assert node.binder.give_back({"c"}) == {}
    assert node.kernel.driver(NIC) == ""


def test_after_a_reboot_nothing_is_given_back_and_a_claim_is_bound_anew(node: Node) -> None:
    node.binder.bind("c", GPU, "vfio-pci", KNOWN)
    node.kernel.reboot()
    node.boot += 1
    node.start()
    assert node.binder.records() == {}
    assert node.drivers() == OWN
    node.binder.bind("c", GPU, "vfio-pci", KNOWN)
    assert node.drivers()[AUDIO] == "vfio-pci"


def test_a_write_that_hangs_has_a_deadline_and_is_not_repeated_while_it_hangs(node: Node) -> None:
    """The driver waits for a program that uses the GPU; other functions can be bound meanwhile."""
    ends = threading.Event()

    def hang(path: str) -> None:
        if path == f"sys/bus/pci/devices/{GPU}/driver/unbind":
            ends.wait(60)

    node.kernel.before = hang
    functions = Functions(SysFs(node.kernel.root), TimedPut(node.kernel.put, deadline_s=0.1))
    binder = Binder(PassthroughJournal(node.state, "boot-0"), functions)
    with pytest.raises(HostError, match="did not end within"):
        binder.bind("c", GPU, "vfio-pci", KNOWN)
    with pytest.raises(HostError, match="an earlier write has not ended"):
        binder.bind("c", GPU, "vfio-pci", KNOWN)
    binder.bind("d", NIC, "vfio-pci", KNOWN)
    assert node.drivers()[NIC] == "vfio-pci"
    assert "has not ended" in binder.give_back({"c"})["c"]
    assert GPU in binder.records(), "the write that hangs may still take effect"
    ends.set()
    for thread in [one for one in threading.enumerate() if one.name == "vfio"]:
        thread.join(10)
    assert node.drivers()[GPU] == ""
    assert binder.give_back({"c", "d"}) == {}
    assert node.is_untouched()


@pytest.mark.parametrize("seed", range(share_of(2000, 0.1)))
def test_killed_at_any_step_everything_is_bound_as_the_ledger_says(tmp_path: Path, seed: int) -> None:
    """Claims come and go; the agent is killed before and after any write to the kernel and to the journal; now and then
    the machine is rebooted. At the end each function has the driver that its claim wants, or its own."""
    pick, node = random.Random(seed), Node(tmp_path)
    held: dict[str, str] = {}
    left = [0]

    def maybe_die(path: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    node.kernel.before = maybe_die
    for step in range(12):
        left[0] = pick.choice((0, *range(1, 9)))
        free = [one for one in (GPU, NIC, OTHER) if one not in held.values()]
        try:
            if free and pick.random() < 0.6:
                claim, address = f"c{step}", pick.choice(free)
                held[claim] = address  # the decision is durable first
                node.binder.bind(claim, address, "vfio-pci", KNOWN)
            elif held:
                claim = pick.choice(sorted(held))
                if not node.binder.give_back({claim}):
                    del held[claim]
        except Killed:
            node.start()
        if pick.random() < 0.1:
            node.kernel.before = lambda path: None
            node.kernel.reboot()
            node.boot += 1
            node.start()
            node.kernel.before = maybe_die
    node.kernel.before = lambda path: None
    node.start()
    assert node.binder.give_back(node.binder.orphans(held)) == {}
    for claim, address in held.items():
        node.binder.bind(claim, address, "vfio-pci", KNOWN)
    wanted = {*held.values(), *((AUDIO,) if GPU in held.values() else ())}
    assert node.drivers() == {one: "vfio-pci" if one in wanted else own for one, own in OWN.items()}
    assert node.binder.give_back(set(held)) == {}
    assert node.is_untouched()
