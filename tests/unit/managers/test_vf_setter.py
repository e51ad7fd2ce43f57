"""Properties of virtual functions set and set back, on a double of the kernel, killed at any step."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.errors import HostError
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal
from nodeagent.managers.network.vf_setter import VfSetter
from tests.doubles.vf_kernel import Vf, VfKernel
from tests.support.long_form import share_of

PF = "0000:3b:00.0"
VFS = [f"0000:3b:02.{index}" for index in range(4)]
WANTED = VfProperties(
    mac="02:00:00:00:00:0a", vlan=100, max_tx_rate_mbps=1000, spoof_check=False, link_state="enable", trust=True
)
STEPS = ("mac", "vlan", "rate", "spoofchk", "link_state", "trust")


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


class Mortal(VfPropertyJournal):
    """Calls before and after each write to the file."""

    before: Callable[[str], None] = staticmethod(lambda step: None)

    def change(self, *args: Any) -> None:
        self.before("journal")
        super().change(*args)
        self.before("journal")


class Node:
    """An adapter with its kernel, and an agent's setter, which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.kernel = VfKernel()
        self.pf = self.kernel.add("ens1f0", PF, len(VFS))
        self.state = folder / "state"
        self.state.mkdir()
        self.boot = 0
        self.there = list(VFS)
        self.interface = "ens1f0"
        self.start()

    def start(self) -> None:
        self.journal = Mortal(self.state, f"boot-{self.boot}")
        self.setter = VfSetter(self.journal, self.inventory, self.kernel.open)

    def inventory(self) -> Inventory:
        pf = Device(kind="nic", id=PF, pci_address=PF, attributes=MappingProxyType({"netdevs": self.interface}))
        vfs = [
            Device(
                kind="nic",
                id=id,
                pci_address=id,
                parent=PF,
                attributes=MappingProxyType({"sriov": "vf", "vf_index": VFS.index(id)}),
            )
            for id in self.there
        ]
        return Inventory(devices=(pf, *vfs))

    def die_at(self, step: Callable[[str], None]) -> None:
        self.kernel.before = self.journal.before = step  # type: ignore[method-assign]

    def has(self, vf: str) -> Vf:
        return self.pf.vfs[VFS.index(vf)]

    def is_untouched(self) -> bool:
        return all(one == Vf() for one in self.pf.vfs) and not self.setter.records() and not self.kernel.opened


AS_WANTED = Vf(mac="02000000000a", vlan=100, max_rate=1000, spoofchk=0, link_state=1, trust=1)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_function_is_set_and_set_back(node: Node) -> None:
    before = node.pf.vfs[1] = Vf(mac="020000000099", vlan=7, qos=2, proto=0x88A8, min_rate=5, max_rate=50)
    node.setter.set("c", VFS[1], WANTED)
    assert node.has(VFS[1]) == AS_WANTED
    assert [one for _, _, one in node.kernel.changes] == list(STEPS)
    assert {index for _, index, _ in node.kernel.changes} == {1}
    assert node.setter.give_back([VFS[1]]) == {}
    assert node.has(VFS[1]) == before
    assert not node.setter.records() and not node.journal.path.exists()


def test_what_is_not_asked_for_is_left_alone(node: Node) -> None:
    node.setter.set("c", VFS[0], VfProperties(vlan=5))
    node.pf.vfs[0].trust = 1  # an admin's, meanwhile
    assert node.setter.give_back(VFS) == {}
    assert node.has(VFS[0]) == Vf(trust=1)


def test_setting_twice_changes_nothing_the_second_time(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    done = len(node.kernel.changes)
    node.setter.set("c", VFS[0], WANTED)
    assert len(node.kernel.changes) == done
    assert node.setter.records()[VFS[0]].before.vlan == 0


@pytest.mark.parametrize("lacks", STEPS)
def test_what_the_driver_cannot_do_fails_the_claim_and_leaves_nothing(node: Node, lacks: str) -> None:
    node.pf.can -= {lacks}
    with pytest.raises(HostError, match="of VF 2 of ens1f0: Operation not supported"):
        node.setter.set("c", VFS[2], WANTED)
    assert node.is_untouched()


def test_what_the_driver_does_not_report_is_not_set_since_it_could_not_be_set_back(node: Node) -> None:
    node.pf.vfs[2].trust = -1
    with pytest.raises(HostError, match="cannot set trust on of VF 2 of ens1f0: its driver does not report what it is"):
        node.setter.set("c", VFS[2], WANTED)
    assert node.kernel.changes == [] and not node.setter.records()


def test_what_the_driver_takes_and_does_not_do_is_noticed(node: Node) -> None:
    def forget(step: str) -> None:
        node.pf.vfs[0].vlan = 0

    node.kernel.before = forget
    with pytest.raises(HostError, match=r"cannot set VLAN 100 of VF 0 of ens1f0: the kernel took it, .* VLAN 0"):
        node.setter.set("c", VFS[0], VfProperties(vlan=100))
    node.kernel.before = lambda step: None
    assert node.is_untouched()


def test_another_claim_has_to_wait_until_it_is_set_back(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    with pytest.raises(HostError, match="what it had before claim c is not set back yet"):
        node.setter.set("d", VFS[0], VfProperties(vlan=5))
    assert node.has(VFS[0]) == AS_WANTED
    assert node.setter.give_back([VFS[0]]) == {}
    node.setter.set("d", VFS[0], VfProperties(vlan=5))
    assert node.has(VFS[0]) == Vf(vlan=5)


def test_a_claim_that_was_allocated_again_has_what_it_says_now(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    node.setter.set("c", VFS[0], VfProperties(vlan=5))
    assert node.has(VFS[0]) == Vf(vlan=5)
    assert node.setter.give_back(VFS) == {}
    assert node.is_untouched()


def test_a_driver_that_takes_no_address_away_holds_up_nothing(node: Node) -> None:
    node.pf.takes_no_zero_mac = True
    node.setter.set("c", VFS[0], WANTED)
    assert node.setter.give_back(VFS) == {}
    assert node.has(VFS[0]) == Vf(mac="02000000000a")
    node.setter.set("d", VFS[0], VfProperties(mac="02:00:00:00:00:0b"))
    assert node.setter.give_back(VFS) == {}
    assert node.has(VFS[0]).mac == "02000000000a"


def test_what_cannot_be_set_back_stays_recorded_and_is_tried_again(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    node.kernel.may = False
    assert "Operation not permitted" in node.setter.give_back(VFS)[VFS[0]]
    assert node.has(VFS[0]).trust == 1 and node.setter.records()
    node.kernel.may = True
    assert node.setter.give_back(VFS) == {}
    assert node.is_untouched()


def test_a_function_that_a_scan_has_missed_is_set_back_all_the_same(node: Node) -> None:
    """Or its next holder would have what was not meant for it."""
    node.setter.set("c", VFS[3], WANTED)
    node.there.remove(VFS[3])
    assert node.setter.give_back(VFS) == {}
    assert node.is_untouched()


def test_a_function_that_is_gone_is_forgotten(node: Node) -> None:
    node.setter.set("c", VFS[3], WANTED)
    node.there.remove(VFS[3])
    node.pf.vfs.pop()
    assert node.setter.give_back(VFS) == {}
    assert not node.setter.records() and not node.kernel.opened


def test_with_its_physical_function_it_is_forgotten_too(node: Node) -> None:
    node.setter.set("c", VFS[3], WANTED)
    node.there, node.interface = [], ""
    assert node.setter.give_back(VFS) == {}
    assert not node.setter.records()


def test_an_interface_that_was_renamed_meanwhile_is_found(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    node.kernel.pfs = {"ens9": node.pf}
    node.pf.name = node.interface = "ens9"
    assert node.setter.give_back(VFS) == {}
    assert node.is_untouched()


def test_without_an_interface_of_the_physical_function_it_waits(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    node.interface = ""
    assert "has 0 interfaces" in node.setter.give_back(VFS)[VFS[0]]
    assert node.setter.records()


def test_after_a_reboot_nothing_is_set_back_and_a_claim_is_set_anew(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    node.kernel.reboot()
    node.boot += 1
    node.start()
    assert not node.setter.records()
    node.setter.set("c", VFS[0], WANTED)
    assert node.has(VFS[0]) == AS_WANTED


def test_an_unreadable_record_counts_as_none(node: Node) -> None:
    node.journal.path.write_text("{")
    assert node.setter.records() == {}
    assert node.setter.give_back(VFS) == {}


def test_orphans_are_those_that_their_claim_does_not_hold(node: Node) -> None:
    node.setter.set("c", VFS[0], WANTED)
    node.setter.set("d", VFS[1], WANTED)
    assert node.setter.orphans({"c": {VFS[0]}, "d": {VFS[1]}}) == []
    assert node.setter.orphans({"c": {VFS[1]}}) == [VFS[0], VFS[1]]


PIECES: list[dict[str, Any]] = [
    {"mac": "02:00:00:00:00:0b"},
    {"vlan": 100, "vlan_qos": 3, "vlan_protocol": "802.1ad"},
    {"vlan": 7},
    {"min_tx_rate_mbps": 10, "max_tx_rate_mbps": 100},
    {"spoof_check": False},
    {"trust": True},
    {"link_state": "disable"},
]


@pytest.mark.parametrize("seed", range(share_of(2000, 0.15)))
def test_killed_at_any_step_every_function_is_as_the_ledger_says(tmp_path: Path, seed: int) -> None:
    """Claims come and go; the agent is killed before and after any change in the kernel and any write to the record;
    now and then the driver refuses something, or the machine is rebooted. At the end each function has what its claim
    wants, and what it had before otherwise."""
    pick, node = random.Random(seed), Node(tmp_path)
    for vf in node.pf.vfs:
        vf.vlan, vf.trust, vf.min_rate, vf.max_rate = pick.choice((0, 9)), pick.randrange(2), 0, pick.choice((0, 500))
    at_boot = copy.deepcopy(node.pf.vfs)
    held: dict[str, tuple[str, VfProperties]] = {}
    left = [0]

    def maybe_die(step: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    for number in range(12):
        node.die_at(maybe_die)
        left[0] = pick.choice((0, *range(1, 18)))
        node.pf.can = frozenset(one for one in STEPS if pick.random() > 0.03)
        free = [one for one in VFS if one not in {vf for vf, _ in held.values()}]
        try:
            if free and pick.random() < 0.6:
                claim, vf = f"c{number}", pick.choice(free)
                wanted = VfProperties()
                for piece in pick.sample(PIECES, pick.randrange(1, 5)):
                    wanted = VfProperties(
                        **{**{name: getattr(wanted, name) for name in wanted.__struct_fields__}, **piece}
                    )
                held[claim] = vf, wanted  # the decision is durable first
                node.setter.set(claim, vf, wanted)
            elif held:
                claim = pick.choice(sorted(held))
                if not node.setter.give_back([held[claim][0]]):
                    del held[claim]
        except HostError:
            pass
        except Killed:
            node.start()
        if pick.random() < 0.1:
            node.die_at(lambda step: None)
            node.pf.vfs[:] = copy.deepcopy(at_boot)
            node.boot += 1
            node.start()
    node.die_at(lambda step: None)
    node.pf.can = frozenset(STEPS)
    node.start()
    node.die_at(lambda step: None)
    assert node.setter.give_back(node.setter.orphans({claim: {vf} for claim, (vf, _) in held.items()})) == {}
    for claim, (vf, wanted) in held.items():
        node.setter.set(claim, vf, wanted)
    for index, vf in enumerate(VFS):
        mine = next((wanted for one, wanted in held.values() if one == vf), VfProperties())
        assert node.has(vf) == expected(at_boot[index], mine), seed
    assert node.setter.give_back(VFS) == {}
    assert node.pf.vfs == at_boot and not node.setter.records() and node.kernel.opened == 0


def expected(before: Vf, wanted: VfProperties) -> Vf:
    found = copy.deepcopy(before)
    if wanted.mac:
        found.mac = wanted.mac.replace(":", "")
    if wanted.vlan is not None:
        proto = {"802.1Q": 0x8100, "802.1ad": 0x88A8}[wanted.vlan_protocol]
        found.vlan, found.qos, found.proto = wanted.vlan, wanted.vlan_qos, proto
    if wanted.max_tx_rate_mbps is not None:
        found.min_rate, found.max_rate = wanted.min_tx_rate_mbps, wanted.max_tx_rate_mbps
    if wanted.spoof_check is not None:
        found.spoofchk = int(wanted.spoof_check)
    if wanted.trust is not None:
        found.trust = int(wanted.trust)
    if wanted.link_state:
        found.link_state = ("auto", "enable", "disable").index(wanted.link_state)
    return found
