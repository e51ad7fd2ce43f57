"""RDMA devices that go along with interfaces into pods, in real network namespaces; RDMA netlink is the double's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.errors import HostError
from nodeagent.managers.network import rdma_mover
from nodeagent.managers.network.interface_mover import Asked
from tests.support.namespaces import Namespace, adapters, needs_namespaces
from tests.unit.managers.test_interface_mover import AS_MADE, DEVICE, OTHER, Node, asked, sandbox

NAME, NODE = "mlx5_7", "/dev/infiniband/uverbs0"
COMMON = "/dev/infiniband/rdma_cm"
pytestmark = needs_namespaces
__all__ = ["adapters"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    one = Node(tmp_path)
    one.add()
    one.kernel.add(NAME, DEVICE)
    yield one
    one.host.close()


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def wanted(*nodes: str) -> Asked:
    return asked()._replace(rdma=(NAME,), nodes=(*(nodes or (NODE,)), COMMON))


def is_in(node: Node, namespace: Namespace) -> bool:
    return node.kernel.where(NAME, Path(namespace.path))


def as_before(node: Node) -> bool:
    return node.state() == AS_MADE and is_in(node, node.host) and not node.mover.records()


def test_it_goes_along_and_comes_back(node: Node, pod: Namespace) -> None:
    assert node.mover.hand_over(wanted(), sandbox(pod))
    assert is_in(node, pod)
    (device,) = node.mover.records()[DEVICE].rdma
    assert (device.name, device.index) == (NAME, 1)
    assert not node.mover.hand_over(wanted(), sandbox(pod))
    assert node.kernel.moves == [NAME]
    assert node.mover.give_back({DEVICE}) == {}
    assert as_before(node) and node.kernel.moves == [NAME, NAME]


def test_in_the_shared_mode_it_stays_where_it_is(node: Node, pod: Namespace) -> None:
    node.kernel.exclusive = False
    node.mover.hand_over(wanted(), sandbox(pod))
    assert pod.names() == {"net1"} and node.mover.records()[DEVICE].rdma == ()
    node.mover.give_back({DEVICE})
    assert as_before(node) and not node.kernel.moves


def test_that_of_an_adapter_without_one_or_of_a_claim_that_wants_none_is_not_asked_for(
    node: Node, pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without RDMA is not even asked."""
    monkeypatch.setattr(node.mover._rdma, "_connect", None)
    node.mover.hand_over(asked(), sandbox(pod))
    assert pod.names() == {"net1"}
    node.mover.give_back({DEVICE})
    assert as_before(node)


def test_a_driver_that_cannot_move_it_is_named_and_everything_is_undone(node: Node, pod: Namespace) -> None:
    node.kernel.devices[NAME].disassociates = False
    with pytest.raises(HostError, match=f"cannot move RDMA device {NAME} to .*: Operation not supported"):
        node.mover.hand_over(wanted(), sandbox(pod))
    assert as_before(node) and pod.names() == set()


def test_one_that_the_host_does_not_have_is_named_before_anything_is_moved(node: Node, pod: Namespace) -> None:
    node.kernel.remove(NAME)
    with pytest.raises(HostError, match=f"cannot move RDMA device {NAME}: the host has none of that name"):
        node.mover.hand_over(wanted(), sandbox(pod))
    assert node.state() == AS_MADE and not node.mover.records()


def test_nodes_that_were_numbered_anew_are_not_handed_over_under_their_old_names(node: Node, pod: Namespace) -> None:
    """The next try, after the files of the claim have followed, finds them as they are."""
    node.kernel.remove(NAME)
    node.kernel.add("gone", OTHER)
    node.kernel.add(NAME, DEVICE)
    node.kernel.remove("gone")
    with pytest.raises(HostError, match=f"cannot hand over RDMA device {NAME}: its nodes became {NODE}"):
        node.mover.hand_over(wanted("/dev/infiniband/uverbs1"), sandbox(pod))
    assert as_before(node)
    node.mover.hand_over(wanted(NODE), sandbox(pod))
    assert is_in(node, pod)


def test_a_new_sandbox_of_the_pod_gets_it_from_the_old_one(node: Node, pod: Namespace) -> None:
    node.mover.hand_over(wanted(), sandbox(pod))
    with Namespace() as second:
        node.mover.hand_over(wanted(), sandbox(second, "s2"))
        assert is_in(node, second)
        node.mover.give_back({DEVICE})
    assert as_before(node)


def test_the_kernel_returns_it_with_the_end_of_the_pods_namespace(
    node: Node, pod: Namespace, adapters: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background: it is awaited."""
    monkeypatch.setattr(rdma_mover, "RETURN_S", 0.2)
    node.mover.hand_over(wanted(), sandbox(pod))
    pod.end(node.host)
    why = node.mover.give_back({DEVICE})[DEVICE]
    assert why == f"cannot give back RDMA device {NAME}: it is neither on the host nor in the pod"
    assert DEVICE in node.mover.records()
    node.kernel.returned(NAME)
    assert node.mover.give_back({DEVICE}) == {}
    assert as_before(node)


def test_one_that_its_driver_has_unregistered_is_forgotten(
    node: Node, pod: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rdma_mover, "RETURN_S", 0.1)
    node.mover.hand_over(wanted(), sandbox(pod))
    node.kernel.remove(NAME)
    assert node.mover.give_back({DEVICE}) == {}
    assert node.state() == AS_MADE and not node.mover.records()


def test_one_that_its_driver_has_registered_anew_is_taken_for_it(node: Node, pod: Namespace) -> None:
    """With another index, on the host: the pod gets that one."""
    guid = node.kernel.devices[NAME].guid
    node.mover.hand_over(wanted(), sandbox(pod))
    node.kernel.remove(NAME)
    node.kernel.add("other", OTHER)
    node.kernel.add(NAME, DEVICE, guid=guid)
    nodes = ("/dev/infiniband/uverbs0", "/dev/infiniband/uverbs1")
    assert not node.mover.hand_over(wanted(*nodes), sandbox(pod))
    assert is_in(node, pod)
    assert node.mover.give_back({DEVICE}) == {}
    assert as_before(node)
