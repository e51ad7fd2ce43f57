"""RDMA devices of network namespaces: real namespaces, and the double of RDMA netlink."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.errors import HostError
from nodeagent.host.netlink import rdma
from nodeagent.host.netlink.namespaces import OWN, NetNamespace
from nodeagent.host.netlink.rdma import RdmaDevice, RdmaDevices, connected, rdma_nodes
from nodeagent.host.sysfs.sysfs import SysFs
from tests.doubles.rdma_kernel import RdmaKernel
from tests.support.namespaces import Namespace, needs_namespaces

pytestmark = needs_namespaces
GUID = 0x0002C90300A1B2C3


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.fixture
def kernel(host: Namespace, tmp_path: Path) -> RdmaKernel:
    made = RdmaKernel(Path(host.path), root=tmp_path)
    made.add("mlx5_0", guid=7)
    made.add("mlx5_1", guid=GUID)
    return made


def devices(kernel: RdmaKernel, namespace: Namespace) -> RdmaDevices:
    return RdmaDevices(NetNamespace(namespace.path), kernel.connect)


def names(kernel: RdmaKernel, namespace: Namespace) -> list[str]:
    return [one.name for one in devices(kernel, namespace).devices()]


def test_a_device_is_in_the_namespace_that_it_was_moved_to_and_back(
    kernel: RdmaKernel, host: Namespace, pod: Namespace
) -> None:
    outside, inside = devices(kernel, host), devices(kernel, pod)
    assert outside.are_exclusive() and inside.are_exclusive()
    device = RdmaDevice(index=2, name="mlx5_1", node_guid="0002c90300a1b2c3")
    assert outside.devices()[1] == device
    with NetNamespace(pod.path) as target:
        outside.move(device, target)
    assert (names(kernel, host), names(kernel, pod)) == (["mlx5_0"], ["mlx5_1"])
    with NetNamespace(host.path) as target:
        inside.move(device, target)
    assert (names(kernel, host), names(kernel, pod)) == (["mlx5_0", "mlx5_1"], [])
    assert kernel.opened == 0


def test_in_the_shared_mode_every_namespace_has_every_device_and_none_is_moved(
    kernel: RdmaKernel, host: Namespace, pod: Namespace
) -> None:
    kernel.exclusive = False
    outside = devices(kernel, host)
    assert not outside.are_exclusive()
    assert names(kernel, pod) == ["mlx5_0", "mlx5_1"]
    with NetNamespace(pod.path) as target, pytest.raises(HostError, match="Operation not supported"):
        outside.move(outside.devices()[0], target)


def test_what_the_kernel_refuses_is_said_in_its_words(kernel: RdmaKernel, host: Namespace, pod: Namespace) -> None:
    outside = devices(kernel, host)
    device = kernel.add("soft0", disassociates=False)
    soft = outside.devices()[-1]
    with NetNamespace(pod.path) as target:
        what = f"cannot move RDMA device soft0 to {target.path}"
        with pytest.raises(HostError, match=re.escape(f"{what}: Operation not supported")):
            outside.move(soft, target)
        device.disassociates, kernel.may = True, False
        with pytest.raises(HostError, match=re.escape(f"{what}: Operation not permitted")):
            outside.move(soft, target)
        kernel.may = True
        kernel.remove("soft0")
        with pytest.raises(HostError, match=re.escape(f"{what}: Invalid argument")):
            outside.move(soft, target)
        with pytest.raises(HostError, match="No such device"):  # it is on the host: a thread there has to ask
            devices(kernel, pod).move(outside.devices()[0], target)
    assert names(kernel, pod) == [] and not kernel.moves


def test_a_device_is_known_after_a_rename_and_after_its_driver_came_back() -> None:
    device = RdmaDevice(index=2, name="mlx5_1", node_guid="c3")
    assert device.is_it(RdmaDevice(index=2, name="ibdev0", node_guid="c3"))
    assert device.is_it(RdmaDevice(index=9, name="mlx5_1", node_guid="c3"))
    assert not device.is_it(RdmaDevice(index=2, name="mlx5_1", node_guid="c4"))
    assert not device.is_it(RdmaDevice(index=9, name="mlx5_9", node_guid="c3"))


def test_a_kernel_that_does_not_tell_the_mode_is_an_error(
    kernel: RdmaKernel, host: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RdmaKernel, "sys_get", lambda self, body: b"")
    with pytest.raises(HostError, match="cannot read the mode of `rdma system`: the kernel does not report it"):
        devices(kernel, host).are_exclusive()


def test_the_nodes_of_a_device_are_found_wherever_it_is(
    kernel: RdmaKernel, host: Namespace, pod: Namespace, tmp_path: Path
) -> None:
    """The kernel gives them other numbers when it is moved: the lowest that is free."""
    sysfs, outside = SysFs(tmp_path), devices(kernel, host)
    mad = tmp_path / "sys/class/infiniband_mad/umad1"
    mad.mkdir(parents=True)
    (mad / "ibdev").write_text("mlx5_1\n")
    (tmp_path / "sys/class/infiniband_mad/abi_version").write_text("5\n")
    assert rdma_nodes(sysfs, "mlx5_1") == ("/dev/infiniband/umad1", "/dev/infiniband/uverbs1")
    kernel.remove("mlx5_0")
    with NetNamespace(pod.path) as target:
        outside.move(outside.devices()[0], target)
    assert rdma_nodes(sysfs, "mlx5_1") == ("/dev/infiniband/umad1", "/dev/infiniband/uverbs0")
    assert rdma_nodes(sysfs, "mlx5_0") == ()


def test_work_in_a_namespace_is_done_there_and_its_errors_are_its_own(host: Namespace) -> None:
    with NetNamespace(host.path) as namespace, NetNamespace(OWN) as own:
        here = os.stat("/proc/thread-self/ns/net").st_ino
        assert namespace.run(lambda: os.stat("/proc/thread-self/ns/net").st_ino) != here
        assert own.run(lambda: os.stat("/proc/thread-self/ns/net").st_ino) == here
        with pytest.raises(ZeroDivisionError):
            namespace.run(lambda: 1 // 0)
    assert os.stat("/proc/thread-self/ns/net").st_ino == here


def test_a_kernel_without_rdma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "_NETLINK_RDMA", 31)  # a protocol that no kernel has
    with pytest.raises(HostError, match="cannot talk to the kernel through RDMA netlink: Protocol not supported"):
        connected()
