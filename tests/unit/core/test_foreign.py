"""What other device plugins gave to pods: whose device an id names, and when it is free again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from nodeagent.core.ledger.foreign import Foreign, devices_named, observed, with_checkpoint
from nodeagent.core.ledger.release import Patience
from nodeagent.core.ledger.witness import Sight, Sighting, Witnesses
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Holding
from nodeagent.core.model.inventory import Inventory
from tests.builders.inventories import even_rows, inventory_of

GPU_UUID, MIG_UUID = "GPU-8f6d0bd4-0b2e-4a3c-9d55-0123456789ab", "MIG-3f0cf1a8-5a7e-5b44-8f11-abcdefabcdef"
H100, PF, VF, ARC = "0000:41:00.0", "0000:81:00.0", "0000:81:02.1", "0000:03:00.0"
DISK = "nvme-eui.0025385"
MACHINE = inventory_of(
    even_rows(1, 1, 1, 2, 1),
    devices=[
        Device(kind="gpu", id=H100, pci_address=H100, paths=("/dev/nvidia0",), attributes={"uuid": GPU_UUID}),
        Device(
            kind="gpu",
            id=f"{H100}/mig-1-0",
            pci_address=H100,
            parent=H100,
            exclusive=("/dev/nvidia-caps/nvidia-cap12",),
            attributes={"uuid": MIG_UUID},
        ),
        Device(kind="nic", id=PF, pci_address=PF, attributes={"netdevs": "ens1f0", "rdma": "mlx5_0"}),
        Device(kind="nic", id=VF, pci_address=VF, parent=PF, attributes={"netdevs": "ens1f0v1", "rdma": "mlx5_2"}),
        Device(kind="gpu", id=ARC, pci_address=ARC, attributes={"drm_card": "card1", "drm_render": "renderD128"}),
        Device(kind="nvme", id=DISK, pci_address="0000:05:00.0", paths=("/dev/nvme0n1",)),
        Device(kind="char", id="/dev/ttyS0", paths=("/dev/ttyS0",)),
    ],
)


@pytest.mark.parametrize(
    ("id", "device"),
    [
        (GPU_UUID, H100),
        (f"{GPU_UUID}::3", H100),
        (f"{GPU_UUID}-3", H100),
        (MIG_UUID, f"{H100}/mig-1-0"),
        (f"{MIG_UUID}::0", f"{H100}/mig-1-0"),
        (H100, H100),
        (VF, VF),
        (VF.upper(), VF),
        ("0000-81-02-1", VF),
        ("mlx5_2", VF),
        ("ens1f0", PF),
        ("card1", ARC),
        ("card1-0", ARC),
        ("renderD128", ARC),
        ("0000:05:00.0", DISK),
        ("/dev/nvme0n1", DISK),
        ("nvme0n1", DISK),
        ("ttyS0", "/dev/ttyS0"),
    ],
)
def test_other_plugins_name_devices_in_their_own_ways(id: str, device: str) -> None:
    """By UUID, address, card, RDMA device, interface, path; with the number of a share behind it."""
    assert devices_named(MACHINE, [id]) == (device,)


@pytest.mark.parametrize("id", ["", "0", "17", "card", "card10", "GPU-8f6d0bd4", f"{GPU_UUID}0", "0000:41:00.1", "::0"])
def test_what_names_no_device_stands_for_none(id: str) -> None:
    assert devices_named(MACHINE, [id]) == ()


def uuid(number: int, what: str = "GPU") -> str:
    return f"{what}-{number:08x}-0000-0000-0000-{number:012x}"


def nvidia(number: int, **attributes: str | bool) -> Device:
    address = f"0000:{number}1:00.0"
    return Device(kind="gpu", vendor="10de", id=address, pci_address=address, attributes=attributes)


def test_a_uuid_that_nothing_shows_yet_may_be_that_of_any_gpu_without_one() -> None:
    """As before NVML has answered: silence is no proof that a GPU is free."""
    machine = inventory_of(
        even_rows(1, 1, 1, 2, 1), devices=[nvidia(1), nvidia(2, uuid=uuid(2)), nvidia(3), *MACHINE.devices]
    )
    assert devices_named(machine, [uuid(99)]) == ("0000:11:00.0", "0000:31:00.0")
    assert devices_named(machine, [uuid(2)]) == ("0000:21:00.0",)


@pytest.mark.parametrize("id", ["gpu-0", "GPU-1", "gpu-operator", "mig-1g.10gb", f"{uuid(1)}x"])
def test_a_name_that_only_looks_like_a_uuid_stands_for_no_gpu(id: str) -> None:
    machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[nvidia(1)])
    assert devices_named(machine, [id]) == ()


def test_an_instance_that_nothing_shows_may_be_of_any_gpu_whose_instances_are_not_known() -> None:
    machine = inventory_of(
        even_rows(1, 1, 1, 2, 1),
        devices=[nvidia(1), nvidia(2, uuid=uuid(2), mig=True), nvidia(3, uuid=uuid(3), mig=False), *MACHINE.devices],
    )
    assert devices_named(machine, [uuid(99, "MIG")]) == ("0000:11:00.0", "0000:21:00.0")
    before_470 = f"{uuid(99, 'MIG-GPU')}/1/0"
    assert devices_named(machine, [before_470]) == devices_named(machine, [f"{before_470}::2"])
    assert devices_named(machine, [before_470]) == ("0000:11:00.0", "0000:21:00.0")


@dataclass
class Node:
    """What kubelet lists and has on disk, and what there is to see of pods."""

    now_s: float = 0.0
    kubelet: int = 1
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By pod."""
    checkpoint: dict[str, tuple[str, ...]] | None = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    foreign: Foreign = field(default_factory=Foreign)
    ids: itertools.count[int] = field(default_factory=itertools.count)
    ours: frozenset[tuple[str, str]] = frozenset()
    machine: Inventory = MACHINE

    def admit(self, pod: str, *ids: str) -> None:
        self.lists[pod] = ids
        self.checkpoint = {**(self.checkpoint or {}), pod: ids}
        self.alive.add(pod)

    def round(self, after_s: float = 1.0, *, folders: bool = True) -> list[str]:
        """Kubelet is asked: the devices that others hold."""
        self.now_s += after_s
        holdings = [
            Holding(namespace="ns", pod=pod, container="main", resource="x.example/y", ids=ids)
            for pod, ids in self.lists.items()
        ]
        witnesses = Witnesses(
            kubelet=self.kubelet,
            knows_pods=bool(self.lists),
            given=self.given(),
            folders=frozenset(self.alive) if folders else None,
            sights=self.sights(),
        )
        self.foreign = observed(
            self.foreign, self.machine, holdings, self.is_ours, witnesses, self.now_s, Patience(), self.new_id
        )
        return self.held()

    def sights(self) -> Mapping[str, Sighting]:
        every = {*(self.checkpoint or {}), *(pod for one in self.foreign.ledger.grants.values() for pod in one.pods)}
        return {one: Sighting(Sight.LIVES if one in self.alive else Sight.ABSENT, "it runs") for one in every}

    def given(self) -> Mapping[tuple[str, str], frozenset[tuple[str, str]]] | None:
        if self.checkpoint is None:
            return None
        return {(pod, "main"): frozenset(("x.example/y", id) for id in ids) for pod, ids in self.checkpoint.items()}

    def begin(self) -> list[str]:
        self.foreign = with_checkpoint(Foreign(), self.machine, self.given() or {}, self.is_ours, self.new_id)
        return self.held()

    def is_ours(self, resource: str, id: str) -> bool:
        return (resource, id) in self.ours

    def new_id(self) -> str:
        return f"o-{next(self.ids)}"

    def held(self) -> list[str]:
        return sorted({device for one in self.foreign.ledger.grants.values() for device in one.devices})


def test_what_kubelet_lists_is_held_and_named_until_its_pod_ends() -> None:
    node = Node()
    node.admit("a", GPU_UUID)
    assert [node.round(), node.round()] == [[H100], [H100]]
    (grant,) = node.foreign.ledger.grants.values()
    assert (str(grant.holder), grant.holder.resource) == ("ns/a/main", "x.example/y")
    node.lists.clear()
    node.alive.clear()
    assert node.round() == []


def test_it_stays_held_while_kubelet_lists_nothing_and_the_pod_lives() -> None:
    """A kubelet that has just started lists nothing; another kubelet, a day later, neither."""
    node = Node()
    node.admit("a", VF)
    node.round()
    node.lists.clear()
    node.kubelet = 2
    assert [node.round(after_s) for after_s in (1, 60, 86_400)] == [[VF]] * 3


def test_an_agent_that_starts_knows_it_from_the_checkpoint_before_kubelet_answers() -> None:
    node = Node()
    node.admit("a", MIG_UUID)
    assert node.begin() == [f"{H100}/mig-1-0"]
    assert node.round() == [f"{H100}/mig-1-0"]
    assert len(node.foreign.ledger.grants) == 1, "listed and in the checkpoint: one holding"


def test_a_container_that_is_never_listed_holds_it_too() -> None:
    """An init container is in the checkpoint only."""
    node = Node()
    node.admit("other", VF)
    node.round()
    node.checkpoint = {**(node.checkpoint or {}), "init": (GPU_UUID,)}
    node.alive.add("init")
    assert [node.round(after_s) for after_s in (1, 3600)] == [[H100, VF]] * 2


def test_names_that_become_known_later_count_from_then_on() -> None:
    """Every GPU is as good as held until NVML has answered; a device that appears later is found by its name."""
    node = Node(machine=inventory_of(even_rows(1, 1, 1, 2, 1), devices=[nvidia(1), nvidia(2)]))
    node.admit("a", f"{uuid(2)}::1")
    node.admit("b", VF)
    assert node.begin() == ["0000:11:00.0", "0000:21:00.0"]
    known = [nvidia(1, uuid=uuid(1)), nvidia(2, uuid=uuid(2)), *(one for one in MACHINE.devices if one.id == VF)]
    node.machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=known)
    assert node.round() == ["0000:21:00.0", VF]
    node.machine = inventory_of(even_rows(1, 1, 1, 2, 1), devices=known[:1])
    assert node.round() == ["0000:21:00.0", VF], "what has left the inventory may still be in use"


def test_a_stale_entry_of_the_checkpoint_ends_and_does_not_come_back() -> None:
    """Kubelet keeps entries of ended pods until it admits another."""
    node = Node()
    node.checkpoint = {"gone": (GPU_UUID,)}
    assert node.begin() == [H100]
    node.admit("other", VF)
    assert node.round() == [H100, VF]
    assert node.round(Patience().unobserved_s) == [VF]
    assert [node.round(after_s) for after_s in (1, 60, 3600)] == [[VF]] * 3


def test_a_checkpoint_that_is_lost_frees_nothing() -> None:
    node = Node()
    node.admit("a", GPU_UUID)
    node.round()
    node.checkpoint = None
    assert node.round() == [H100]


def test_several_pods_may_have_the_same_device_and_it_is_free_when_the_last_ends() -> None:
    """Time slicing: how another plugin divides a device is its own affair."""
    node = Node()
    node.admit("a", f"{GPU_UUID}::0")
    node.admit("b", f"{GPU_UUID}::1")
    assert [node.round(), node.round()] == [[H100], [H100]]
    del node.lists["a"]
    node.alive.remove("a")
    assert node.round() == [H100]
    del node.lists["b"]
    node.alive.remove("b")
    assert node.round() == []


def test_what_the_agent_granted_itself_is_not_held_by_others() -> None:
    node = Node(ours=frozenset({("x.example/y", H100)}))
    node.admit("a", H100)
    assert node.round() == []


def test_what_turns_out_to_be_ours_is_no_longer_held_by_others() -> None:
    """As after a lost ledger: the ledger is rebuilt from the checkpoint, or a resource is served again."""
    node = Node()
    node.admit("a", H100)
    node.admit("b", VF)
    assert node.begin() == [H100, VF]
    node.ours = frozenset({("x.example/y", H100)})
    assert [node.round(), node.round()] == [[VF], [VF]]
