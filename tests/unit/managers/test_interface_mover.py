"""Interfaces moved into pods and given back, in real network namespaces, killed at any step."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.interface import Interface, Route
from nodeagent.errors import HostError
from nodeagent.host.netlink.connection import Netlink, NetlinkError
from nodeagent.host.netlink.interfaces import Interfaces, Link
from nodeagent.host.netlink.rdma import RdmaDevice
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.network import interface_mover
from nodeagent.managers.network.interface_journal import InterfaceJournal, Moved, as_on_host
from nodeagent.managers.network.interface_mover import Asked, InterfaceMover, Sandbox, has_driver
from nodeagent.managers.network.rdma_mover import RdmaMover
from tests.doubles.rdma_kernel import RdmaKernel
from tests.support import namespaces
from tests.support.long_form import share_of
from tests.support.namespaces import FIRST_GROUP, Namespace, adapters, device_of, needs_namespaces

GROUP = FIRST_GROUP + 1
DEVICE, OTHER, MAC = device_of(GROUP), device_of(GROUP + 1), "02:00:00:00:00:07"
WANTED = Interface(
    name="net1",
    addresses=("10.0.0.5/24", "fd00::5/64"),
    routes=(Route(destination="10.1.0.0/16", gateway="10.0.0.1"),),
    mtu=1400,
    hardware_address="02:00:00:00:00:99",
)
pytestmark = needs_namespaces
__all__ = ["adapters"]


class Killed(BaseException):
    """What kill -9 is: nothing of the process runs after it."""


class Node:
    """A host with an adapter whose interface is ens7, and an agent's mover, which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = Namespace()
        self.boot = "boot"
        (folder / "state").mkdir()
        namespaces.has_driver(folder / "root")
        self.kernel = RdmaKernel(Path(self.host.path), root=folder / "root")
        self.start()

    def start(self) -> None:
        journal, sysfs = InterfaceJournal(self.folder / "state", self.boot), SysFs(self.folder / "root")
        rdma = RdmaMover(sysfs, self.kernel.connect)
        self.mover = InterfaceMover(journal, has_driver(sysfs), rdma, self.host.path)

    def add(self, name: str = "ens7", *, group: int = GROUP, mac: str = MAC, up: bool = True) -> None:
        self.host.veth(name, mac=mac, mtu=1450, group=group, up=up)
        self.host.ip("address", "add", "192.0.2.7/24", "dev", name)
        self.host.ip("link", "set", name, "alias", "the admin's")

    def state(self, name: str = "ens7") -> dict[str, Any]:
        """What of an interface on the host is an admin's to set."""
        shown = self.host.link(name)
        return {
            "alias": shown.get("ifalias"),
            "mac": shown["address"],
            "mtu": shown["mtu"],
            "up": "UP" in shown["flags"],
            "addresses": self.host.addresses(name),
        }


AS_MADE = {"alias": "the admin's", "mac": MAC, "mtu": 1450, "up": True, "addresses": {"192.0.2.7/24"}}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    one = Node(tmp_path)
    one.add()
    yield one
    one.host.close()


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def asked(claim: str = "c", wanted: Interface = WANTED, device: str = DEVICE, name: str = "ens7") -> Asked:
    return Asked(device=device, claim=claim, host_name=name, wanted=wanted)


def sandbox(pod: Namespace, id: str = "s") -> Sandbox:
    return Sandbox(id=id, pod="uid", pod_name="default/web", namespaces=("/nowhere", pod.path))


def test_an_interface_is_in_the_pod_as_wanted_and_on_the_host_as_before(node: Node, pod: Namespace) -> None:
    assert node.mover.hand_over(asked(), sandbox(pod))
    shown = pod.link("net1")
    assert (shown["address"], shown["mtu"], "UP" in shown["flags"]) == (WANTED.hardware_address, 1400, True)
    assert pod.addresses("net1") == {*WANTED.addresses}
    assert ("10.1.0.0/16", "10.0.0.1") in pod.routes("net1")
    assert node.host.names() == {"ens7-far"}
    assert node.mover.give_back({DEVICE}) == {}
    assert node.state() == AS_MADE
    assert pod.names() == set()
    assert not (node.folder / "state" / "interfaces.json").exists()


def test_what_a_claim_does_not_say_stays(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(wanted=Interface()), sandbox(pod))
    shown = pod.link("ens7")
    assert (shown["address"], shown["mtu"], "UP" in shown["flags"]) == (MAC, 1450, True)
    assert pod.addresses("ens7") == set()


def test_an_interface_that_was_down_is_down_again(tmp_path: Path, pod: Namespace) -> None:
    node = Node(tmp_path)
    node.host.veth("ens7", group=GROUP)
    node.mover.hand_over(asked(), sandbox(pod))
    node.mover.give_back({DEVICE})
    assert not node.state()["up"]
    node.host.close()


def test_asked_again_nothing_changes_and_what_was_changed_is_repaired(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    assert not node.mover.hand_over(asked(), sandbox(pod))
    pod.ip("link", "set", "net1", "down")
    pod.ip("link", "set", "net1", "name", "other")
    pod.ip("address", "flush", "dev", "other")
    assert not node.mover.hand_over(asked(), sandbox(pod))
    assert pod.addresses("net1") == {*WANTED.addresses}
    node.mover.give_back({DEVICE})
    assert node.state() == AS_MADE


def test_a_new_sandbox_of_the_pod_gets_it_from_the_old_one(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    with Namespace() as second:
        assert node.mover.hand_over(asked(), sandbox(second, "s2"))
        assert (pod.names(), second.names()) == (set(), {"net1"})
        assert node.mover.records()[DEVICE].before.name == "ens7"
        node.mover.give_back({DEVICE})
    assert node.state() == AS_MADE


def test_a_new_sandbox_gets_it_also_while_the_driver_refuses_the_address_that_it_had(
    node: Node, pod: Namespace, adapters: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As drivers of virtual functions do as long as the physical one has given them another."""
    real, given = Interfaces.set_hardware_address, [True]

    def refusing(self: Interfaces, link: Link, address: str) -> None:
        if given and address == MAC:
            raise NetlinkError(f"cannot set the hardware address of interface {link.name} to {address}", errno.EPERM)
        real(self, link, address)

    monkeypatch.setattr(Interfaces, "set_hardware_address", refusing)
    node.mover.hand_over(asked(), sandbox(pod))
    assert "Operation not permitted" in node.mover.give_back({DEVICE})[DEVICE]
    assert "ens7" in node.host.names()
    with Namespace() as second:
        assert node.mover.hand_over(asked(), sandbox(second, "s2"))
        assert second.link("net1")["address"] == WANTED.hardware_address
        assert node.mover.records()[DEVICE].sandbox == "s2"
        assert "Operation not permitted" in node.mover.give_back({DEVICE})[DEVICE]
        assert second.names() == set()
    given.clear()  # the physical function is as before
    assert node.mover.give_back({DEVICE}) == {}
    assert node.state() == AS_MADE and not node.mover.records()


def test_a_second_pod_of_the_claim_gets_nothing_while_the_first_one_has_it(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    with Namespace() as second:
        other = Sandbox(id="s2", pod="uid-2", pod_name="default/db", namespaces=(second.path,))
        with pytest.raises(HostError, match=f"cannot move {DEVICE}: default/web, which uses the same claim, has it"):
            node.mover.hand_over(asked(), other)
        assert (pod.names(), second.names()) == ({"net1"}, set())
        node.mover.give_back({DEVICE})
        assert node.mover.hand_over(asked(), other)
        node.mover.give_back({DEVICE})
    assert node.state() == AS_MADE


def test_a_second_pod_of_the_claim_gets_it_if_the_first_one_has_ended(
    node: Node, pod: Namespace, adapters: None
) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    pod.end(node.host)
    with Namespace() as second:
        other = Sandbox(id="s2", pod="uid-2", pod_name="default/db", namespaces=(second.path,))
        assert node.mover.hand_over(asked(), other)
        assert second.names() == {"net1"}


def test_another_claim_gets_nothing_before_it_is_given_back(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    with pytest.raises(HostError, match="not given back by claim c yet"):
        node.mover.hand_over(asked("d"), sandbox(pod, "s2"))
    assert pod.names() == {"net1"}


def test_a_pod_on_the_hosts_network_is_refused(node: Node) -> None:
    with pytest.raises(HostError, match=r"cannot move interface ens7 into default/web: hostNetwork"):
        node.mover.hand_over(asked(), sandbox(node.host))
    assert node.state() == AS_MADE and not node.mover.records()


def test_a_name_that_the_pod_has_is_refused_before_anything_is_moved(node: Node, pod: Namespace) -> None:
    pod.veth("net1")
    with pytest.raises(HostError, match="cannot move interface ens7 as net1: the pod has one of that name"):
        node.mover.hand_over(asked(), sandbox(pod))
    assert node.state() == AS_MADE and not node.mover.records()


def test_part_of_a_bond_or_bridge_is_refused(node: Node, pod: Namespace) -> None:
    node.host.ip("link", "add", "br0", "type", "bridge")
    node.host.ip("link", "set", "ens7", "master", "br0")
    with pytest.raises(HostError, match="it belongs to a bond or bridge of the host"):
        node.mover.hand_over(asked(), sandbox(pod))
    assert not node.mover.records()


def test_what_other_interfaces_are_built_on_is_refused(node: Node, pod: Namespace) -> None:
    """The kernel would end them."""
    node.host.ip("link", "add", "upper", "link", "ens7", "type", "macvlan")
    with pytest.raises(HostError, match="cannot move interface ens7: upper of the host would end with it"):
        node.mover.hand_over(asked(), sandbox(pod))
    assert "upper" in node.host.names() and not node.mover.records()


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (replace(WANTED, hardware_address="00:00:00:00:00:00"), "cannot set the hardware address of interface net1"),
        (replace(WANTED, mtu=1000), "cannot add address fd00::5/64 to interface net1"),
        (replace(WANTED, routes=(Route(destination="10.9.0.0/16", gateway="198.51.100.1"),)), "invalid gateway"),
    ],
    ids=["hardware-address", "ipv6-in-a-small-mtu", "gateway"],
)
def test_what_the_kernel_refuses_is_said_and_undone(node: Node, pod: Namespace, wanted: Interface, why: str) -> None:
    with pytest.raises(HostError, match=why):
        node.mover.hand_over(asked(wanted=wanted), sandbox(pod))
    assert node.state() == AS_MADE and not node.mover.records() and pod.names() == set()


def test_an_interface_that_is_gone_from_the_host_is_named(node: Node, pod: Namespace) -> None:
    with pytest.raises(HostError, match="cannot move interface ens9: the host has none of that name"):
        node.mover.hand_over(asked(name="ens9"), sandbox(pod))


# ---------------------------------------------------------------- the end of namespaces


def test_what_the_kernel_returned_under_another_name_is_as_before(node: Node, pod: Namespace, adapters: None) -> None:
    """The pod's name of it was taken on the host, and so was its own, by an interface that is gone by now."""
    node.mover.hand_over(asked(), sandbox(pod))
    node.host.veth("net1")
    pod.end(node.host)
    assert "ens7" not in node.host.names()
    assert node.mover.give_back({DEVICE}) == {}
    assert node.state() == AS_MADE


def test_where_its_name_is_taken_it_keeps_another_and_everything_else_is_as_before(
    node: Node, pod: Namespace, adapters: None
) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    node.host.ip("link", "add", "ens7", "address", "02:00:00:00:00:33", "type", "bridge")
    assert node.mover.give_back({DEVICE}) == {}
    assert node.host.link("ens7")["address"] == "02:00:00:00:00:33"
    (name,) = [one["ifname"] for one in node.host.shown("link", "show") if one["address"] == MAC]
    assert name.startswith("dev") and node.state(name) == AS_MADE
    assert not node.mover.records()


def test_a_name_that_another_interface_has_as_an_alternative_one_is_taken(
    node: Node, pod: Namespace, adapters: None
) -> None:
    """The kernel gives it to no other; the interface is given back all the same, and so is one that the kernel
    returned."""
    node.host.veth("eth9")
    node.mover.hand_over(asked(), sandbox(pod))
    node.host.ip("link", "property", "add", "dev", "eth9", "altname", "ens7")
    assert node.mover.give_back({DEVICE}) == {}
    (name,) = [one["ifname"] for one in node.host.shown("link", "show") if one["address"] == MAC]
    assert name.startswith("dev") and node.state(name) == AS_MADE and not node.mover.records()
    node.host.ip("link", "set", name, "down")
    node.mover.hand_over(asked(name=name), sandbox(pod))
    node.host.ip("link", "property", "add", "dev", "eth9", "altname", name)
    pod.end(node.host)
    assert node.mover.give_back({DEVICE}) == {}
    assert not node.mover.records()
    assert [one for one in node.host.shown("link", "show") if one["address"] == MAC]


def test_a_pod_whose_interface_has_the_name_as_an_alternative_one_is_refused(node: Node, pod: Namespace) -> None:
    pod.veth("eth0")
    pod.ip("link", "property", "add", "dev", "eth0", "altname", "net1")
    with pytest.raises(HostError, match="cannot move interface ens7 as net1: the pod has one of that name"):
        node.mover.hand_over(asked(), sandbox(pod))
    assert node.state() == AS_MADE and not node.mover.records()


def test_a_virtual_interface_ends_with_its_namespace_and_is_forgotten(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    pod.close()
    assert node.mover.give_back({DEVICE}) == {}
    assert not node.mover.records()


def test_the_interface_of_a_device_is_awaited_until_the_kernel_returns_it(
    node: Node, pod: Namespace, adapters: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    monkeypatch.setattr(interface_mover, "RETURN_S", 0.2)
    with Namespace() as elsewhere:  # made by the pod, and unknown to the agent
        pod.ip("link", "set", "net1", "netns", elsewhere.path)
        assert "neither on the host nor in default/web" in node.mover.give_back({DEVICE})[DEVICE]
        assert DEVICE in node.mover.records()
        elsewhere.end(node.host)
    assert node.mover.give_back({DEVICE}) == {}
    assert node.state() == AS_MADE


def test_that_of_a_device_that_was_unplugged_is_forgotten(node: Node, pod: Namespace, adapters: None) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    (node.folder / "root/sys/bus/pci/devices" / DEVICE / "driver").rmdir()
    pod.close()
    assert node.mover.give_back({DEVICE}) == {}
    assert not node.mover.records()


def test_after_a_reboot_nothing_is_given_back(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    node.boot = "another"
    node.start()
    assert node.mover.records() == {}
    assert node.mover.give_back({DEVICE}) == {}


def test_records_that_cannot_be_read_leave_everything_where_it_is(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(asked(), sandbox(pod))
    (node.folder / "state" / "interfaces.json").write_text("{")
    assert node.mover.give_back({DEVICE}) == {}
    assert pod.names() == {"net1"}


# ---------------------------------------------------------------- whose interface it is


LINK = Link(index=4, name="ens7", hardware_address=MAC, parent=DEVICE, port="p0")
RECORD = Moved(
    device=DEVICE, claim="c", pod="u", pod_name="d/p", sandbox="s", namespaces=("/n",), name="net1", before=LINK
)


@pytest.mark.parametrize(
    ("before", "found", "is_it"),
    [
        (LINK, replace(LINK, name="x", hardware_address="", index=9, alias="y"), True),
        (LINK, replace(LINK, parent="0000:5e:00.2", alias=RECORD.mark), False),
        (LINK, replace(LINK, port="pf0vf1"), False),
        (LINK, replace(LINK, kind="macvlan"), False),
        (replace(LINK, parent=""), replace(LINK, parent="", alias=RECORD.mark, name="x"), True),
        (replace(LINK, parent=""), replace(LINK, parent="", alias=RECORD.mark, kind="veth"), False),
        (replace(LINK, parent=""), replace(LINK, parent=""), False),
    ],
    ids=["renamed", "forged-alias", "representor", "stacked", "by-mark", "forged-mark-of-a-veth", "unmarked"],
)
def test_a_pod_cannot_have_another_interface_taken_for_it(before: Link, found: Link, is_it: bool) -> None:
    """What a pod with CAP_NET_ADMIN can change says nothing; what it can make has a kind."""
    assert replace(RECORD, before=before).is_it(found) is is_it


def test_an_agent_that_starts_knows_what_the_interfaces_in_pods_are_on_the_host() -> None:
    """What it sees itself counts more; other devices are as they are."""
    seen = Device(kind="nic", id=OTHER, attributes=MappingProxyType({"netdevs": "ens8"}))
    unseen, third = Device(kind="nic", id=DEVICE), Device(kind="nic", id="0000:5e:00.3")
    rdma = (RdmaDevice(index=3, name="mlx5_7"), RdmaDevice(index=4, name="mlx5_8"))
    records = {DEVICE: replace(RECORD, before=replace(LINK, mtu=1450), rdma=rdma), OTHER: replace(RECORD, device=OTHER)}
    found = as_on_host(Inventory(devices=(unseen, seen, third)), records)
    known = {"rdma": "mlx5_7,mlx5_8", "netdevs": "ens7", "mac": MAC, "mtu": 1450}
    assert [dict(one.attributes) for one in found.devices] == [known, {"netdevs": "ens8"}, {}]


# ---------------------------------------------------------------- killed at any step


class Doom:
    """Kills at a step: the moment before or after a change in the kernel or in the journal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        for owner, name in ((Netlink, "change"), (InterfaceJournal, "change"), (RdmaKernel, "set")):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, real: Any) -> Any:
        def stepped(*args: Any) -> Any:
            self.step()
            answer = real(*args)
            self.step()
            return answer

        return stepped

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


WANTS = {
    DEVICE: WANTED,
    OTHER: Interface(name="net2", addresses=("10.0.1.5/24",)),
}
NAMES = {DEVICE: "ens7", OTHER: "ens8"}
RDMA = {DEVICE: "mlx5_7", OTHER: "mlx5_8"}
NODES = ("/dev/infiniband/uverbs0", "/dev/infiniband/uverbs1")


class History:
    """Pods with claims for two adapters come and go, at random, and agents die."""

    def __init__(self, node: Node, doom: Doom, pick: random.Random) -> None:
        self.node, self.doom, self.pick = node, doom, pick
        self.pods: dict[str, Namespace] = {}
        """By device: the pod whose claim holds it."""
        self.claims: dict[str, str] = {}
        self.count = 0
        self.deaths = 0

    def step(self) -> None:
        device = self.pick.choice([DEVICE, OTHER])
        self.doom.left = self.pick.choice((0, *range(1, 40)))
        act = self.pick.choice((self.end, self.end, self.vanish, self.again)) if device in self.pods else self.begin
        try:
            act(device)
        except Killed:
            self.deaths += 1
            self.node.start()
        self.doom.left = 0

    def begin(self, device: str) -> None:
        """A claim is granted, and the runtime starts its pod."""
        if device in self.node.mover.records() and self.node.mover.give_back({device}):
            return
        self.count += 1
        self.pods[device], self.claims[device] = Namespace(), f"c{self.count}"
        self.again(device)

    def again(self, device: str) -> None:
        one = asked(self.claims[device], WANTS[device], device, NAMES[device])
        one = one._replace(rdma=(RDMA[device],), nodes=NODES)
        self.node.mover.hand_over(one, sandbox(self.pods[device], f"s-{one.claim}"))

    def end(self, device: str) -> None:
        """The pod's containers have ended, then its namespace; the claim is released."""
        errors = self.node.mover.give_back({device})
        assert not errors
        self.vanish(device)

    def vanish(self, device: str) -> None:
        """The namespace ends while no agent is told."""
        pod = self.pods.pop(device)
        self.node.kernel.end(Path(pod.path))
        pod.end(self.node.host)

    def prove(self) -> None:
        """The next agent completes what is held and undoes what is not: the machine is as the ledger says."""
        self.doom.left = 0
        self.node.start()
        left = [one for one in self.node.mover.records() if one not in self.pods]
        assert self.node.mover.give_back(left) == {}
        for device, pod in self.pods.items():
            self.again(device)
            name = WANTS[device].name
            assert pod.names() == {name} and pod.addresses(name) == {*WANTS[device].addresses}
            assert self.node.kernel.where(RDMA[device], Path(pod.path))
        expected = {f"{name}-far" for name in NAMES.values()}
        expected |= {name for device, name in NAMES.items() if device not in self.pods}
        assert self.node.host.names() == expected
        assert self.node.mover.give_back([*self.pods]) == {}
        for device, name in NAMES.items():
            mac = MAC if device == DEVICE else "02:00:00:00:00:08"
            assert self.node.state(name) == {**AS_MADE, "mac": mac}
            assert self.node.kernel.where(RDMA[device], Path(self.node.host.path))
        assert not self.node.mover.records()
        for pod in self.pods.values():
            pod.close()


STEPS = 12


def test_killed_at_any_step_the_machine_ends_as_the_ledger_says(
    tmp_path: Path, adapters: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node, doom, deaths = Node(tmp_path), Doom(monkeypatch), 0
    node.add()
    node.add("ens8", group=GROUP + 1, mac="02:00:00:00:00:08")
    for device, name in RDMA.items():
        node.kernel.add(name, device)
    histories = share_of(180, 0.2)
    for seed in range(histories):
        history = History(node, doom, random.Random(seed))
        for _ in range(STEPS):
            history.step()
        history.prove()
        deaths += history.deaths
    with capsys.disabled():
        print(f"\ninterfaces: {deaths} agents killed in {histories * STEPS} steps")
    assert deaths > histories
    node.host.close()
