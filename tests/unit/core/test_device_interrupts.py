"""Where the interrupts of held devices belong: which CPUs are their holder's, and what forbids asking."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import Cpu
from nodeagent.core.opaque.settings import OpaqueConfig, to_json
from nodeagent.core.pinning.device_interrupts import (
    AVOID,
    FOLLOW,
    LEAVE,
    DeviceInterrupts,
    check_interrupts,
    device_interrupts,
)
from nodeagent.errors import InputError

NIC, DISK, GPUS = "0000:3b:00.0", "0000:5e:00.0", ("0000:05:00.0", "0000:06:00.0")
ONLINE = CpuSet(range(8))


def whole(kind: str, id: str) -> Device:
    return Device(kind=kind, id=id, pci_address=id)


MACHINE = Inventory(
    cpus_online=ONLINE,
    devices=(
        whole("nic", NIC),
        whole("nvme", DISK),
        *(whole("gpu", one) for one in GPUS),
        Device(kind="gpu", id="gpus-2-a", attributes={"group": "2", "members": ",".join(GPUS)}),
        Device(kind="gpu", id=f"{GPUS[0]}/mig-1-0", parent=GPUS[0]),
        Device(kind="char", id="ttyS0"),
    ),
)


def claim(
    uid: str, index: int = 0, *, pods: tuple[str, ...] = (), interrupts: str = "", pool: str = "", **held: Any
) -> Grant:
    holder = Holder(api=CLAIM, namespace="default", claim=uid, uid=uid)
    settings = to_json(OpaqueConfig(interrupts=interrupts, named_pool=pool))
    return Grant(id=f"{uid}-{index}", holder=holder, pods=pods, settings=settings, **held)


def container(id: str, name: str, *, pods: tuple[str, ...] = (), pod: str = "a", **held: Any) -> Grant:
    holder = Holder(api=DEVICE_PLUGIN, resource="r", namespace="default", pod=pod, container=name)
    return Grant(id=id, holder=holder, pods=pods, **held)


def cpus(text: str) -> CpuSet:
    return CpuSet.parse(text)


def found(*grants: Grant, default: str = "", machine: Inventory = MACHINE) -> list[tuple[str, str, str]]:
    return [(one.device, one.wanted, str(one.cpus)) for one in device_interrupts(grants, machine, default)]


def test_they_follow_the_cpus_of_the_same_claim() -> None:
    """Those of another claim of the pod are for something else; all grants of the claim count."""
    grants = (
        claim("c1", 0, devices=(NIC,), interrupts=FOLLOW, pods=("p1",)),
        claim("c1", 1, cpus=cpus("2-3"), pods=("p1",)),
        claim("c1", 2, cpus=cpus("6"), pods=("p1",)),
        claim("c2", 0, cpus=cpus("4-5"), pods=("p1",)),
    )
    assert found(*grants) == [(NIC, FOLLOW, "2-3,6")]
    (one,) = device_interrupts(grants, MACHINE, "")
    wanted = cpus("2-3,6")
    assert one == DeviceInterrupts(device=NIC, addresses=(NIC,), wanted=FOLLOW, cpus=wanted, holder="claim default/c1")


def test_a_claim_without_cpus_has_those_of_its_pods() -> None:
    """Through whichever API, of kubelet's own manager too; not those of other pods."""
    grants = (
        claim("c1", devices=(NIC,), interrupts=FOLLOW, pods=("p1", "p2")),
        claim("c2", cpus=cpus("4-5"), pods=("p1",)),
        container("g1", "x", cpus=cpus("6"), pods=("p2",)),
        Grant(id="g2", holder=Holder(api=KUBELET, uid="p1", container="y"), cpus=cpus("7")),
        claim("c3", cpus=cpus("2"), pods=("p3",)),
    )
    assert found(*grants) == [(NIC, FOLLOW, "4-7")]
    assert found(grants[0], grants[4]) == [(NIC, FOLLOW, "")]
    assert found(claim("c1", devices=(NIC,), interrupts=FOLLOW), claim("c3", cpus=cpus("2"))) == [(NIC, FOLLOW, "")]


def test_a_container_of_the_device_plugin_has_its_own_and_then_its_pods() -> None:
    """One that kubelet has not listed yet has none that are known to be its own."""
    nic = container("g1", "x", devices=(NIC,), pods=("p1",))
    mine, sibling = (container(f"g{i}", name, cpus=cpus(f"{i}"), pods=("p1",)) for i, name in ((2, "x"), (3, "y")))
    assert found(nic, mine, sibling, default=FOLLOW) == [(NIC, FOLLOW, "2")]
    assert found(nic, sibling, default=FOLLOW) == [(NIC, FOLLOW, "3")]
    unlisted = (container("g1", "", pod="", devices=(NIC,)), container("g2", "", pod="", cpus=cpus("2")))
    assert found(*unlisted, default=FOLLOW) == [(NIC, FOLLOW, "")]


def test_what_a_claim_says_comes_before_the_nodes_default() -> None:
    said, silent = claim("c1", devices=(NIC,), interrupts=LEAVE), claim("c2", devices=(DISK,))
    assert found(said, silent, default=AVOID) == [(NIC, LEAVE, ""), (DISK, AVOID, "")]
    assert found(said, silent) == [(NIC, LEAVE, "")]
    newer = Grant(id="g", holder=said.holder, devices=(NIC,), settings='{"interrupts":"follow","later":1}')
    assert found(newer) == [], "a newer build wrote it"


def test_cpus_that_cannot_be_used_are_left_out() -> None:
    grants = (claim("c1", devices=(NIC,), interrupts=FOLLOW), claim("c1", 1, cpus=cpus("6-9")))
    assert found(*grants) == [(NIC, FOLLOW, "6-7")]


def test_cpus_of_a_named_pool_are_not_exclusive() -> None:
    nic = claim("c1", devices=(NIC,), interrupts=FOLLOW, pods=("p1",))
    pooled = claim("c1", 1, cpus=cpus("2-3"), pool="batch", pods=("p1",))
    assert found(nic, pooled) == [(NIC, FOLLOW, "")]
    assert found(nic, pooled, claim("c2", cpus=cpus("4"), pods=("p1",))) == [(NIC, FOLLOW, "4")]


def test_hidden_hyperthreads_are_left_out() -> None:
    """Nothing runs on them: an interrupt there would slow down the thread that is used."""
    threads = Inventory(
        cpus_online=ONLINE,
        devices=MACHINE.devices,
        cpus=tuple(Cpu(id=cpu, package=0, die=0, core=cpu % 4, numa_node=0) for cpu in ONLINE),
    )
    settings = to_json(OpaqueConfig(hide_hyperthreads=True))
    holder = claim("c1").holder
    hiding = Grant(id="c1-1", holder=holder, cpus=cpus("1-2,5-6"), settings=settings)
    assert found(claim("c1", devices=(NIC,), interrupts=FOLLOW), hiding, machine=threads) == [(NIC, FOLLOW, "1-2")]


def test_a_set_of_devices_has_the_functions_of_its_members_and_a_part_has_none() -> None:
    (one,) = device_interrupts([claim("c1", devices=("gpus-2-a",), interrupts=FOLLOW)], MACHINE, "")
    assert one.addresses == GPUS
    for id in (f"{GPUS[0]}/mig-1-0", "ttyS0", "gone"):
        assert found(claim("c1", devices=(id,), interrupts=FOLLOW)) == []
    assert found(claim("c1", shares=(NIC,), interrupts=FOLLOW), default=FOLLOW) == []


def test_only_the_holder_of_a_whole_function_may_ask() -> None:
    for id in (NIC, "gpus-2-a"):
        check_interrupts(MACHINE, id, FOLLOW, shared=False)
    check_interrupts(MACHINE, "ttyS0", "", shared=True)
    with pytest.raises(InputError, match=f"interrupts: {NIC} is shared, and its interrupts are those of all who have"):
        check_interrupts(MACHINE, NIC, AVOID, shared=True)
    for id in (f"{GPUS[0]}/mig-1-0", "ttyS0", "gone"):
        with pytest.raises(InputError, match=f"interrupts: {id} is not a whole PCI function"):
            check_interrupts(MACHINE, id, LEAVE, shared=False)
