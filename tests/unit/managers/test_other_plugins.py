"""What other device plugins offer is not offered again, for as long as it may still be theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from nodeagent.config.schema import Config
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.errors import PeerError
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.managers.deviceplugin.others import FORGET_S, OtherOffers
from nodeagent.managers.dra.other_drivers import OtherDrivers, published
from nodeagent.resources.offer import Offer, offers
from tests.builders.inventories import even_rows, inventory_of

FIRST, SECOND, PF, VF = "0000:41:00.0", "0000:61:00.0", "0000:81:00.0", "0000:81:02.1"
FIRST_UUID, SECOND_UUID = "GPU-11111111-2222-3333-4444-555555555555", "GPU-99999999-2222-3333-4444-555555555555"


def gpu(address: str, uuid: str, number: int, **more: str) -> Device:
    attributes = MappingProxyType({"uuid": uuid, **more})
    return Device(kind="gpu", id=address, pci_address=address, paths=(f"/dev/nvidia{number}",), attributes=attributes)


MACHINE = inventory_of(
    even_rows(1, 1, 1, 2, 1),
    devices=[
        gpu(FIRST, FIRST_UUID, 0, product="A"),
        gpu(SECOND, SECOND_UUID, 1, product="B"),
        Device(kind="nic", id=PF, pci_address=PF, attributes=MappingProxyType({"sriov": "pf"})),
        Device(kind="nic", id=VF, pci_address=VF, parent=PF, attributes=MappingProxyType({"sriov": "vf"})),
    ],
)


def served(*resources: Mapping[str, object]) -> tuple[Offer, ...]:
    return offers(msgspec.convert({"resources": resources}, Config), builtin_kinds())


GPUS, VFS = {"name": "gpu", "kind": "gpu"}, {"name": "vf", "kind": "nic", "match": {"sriov": "vf"}}
CPUS = {"name": "cpu", "kind": "cpu"}


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def others(tmp_path: Path, clock: Clock) -> OtherOffers:
    found = OtherOffers(tmp_path, clock)
    found.serve(["nodeagent.dev/gpu", "nodeagent.dev/vf"], "nodeagent.dev")
    return found


def test_a_resource_whose_devices_another_plugin_offers_is_refused_with_the_way_out(others: OtherOffers) -> None:
    others.learn({"nvidia.com/gpu": [FIRST_UUID, SECOND_UUID], "nodeagent.dev/gpu": [FIRST]})
    assert others.refusals(MACHINE, served(GPUS, VFS, CPUS)) == {
        "gpu": f"another device plugin offers {FIRST}, {SECOND} as nvidia.com/gpu; set match so that the two have no "
        "device in common, or remove that plugin"
    }


def test_a_resource_that_shares_no_device_with_it_is_served(others: OtherOffers) -> None:
    """By match, as with kubelet's static CPU manager."""
    others.learn({"nvidia.com/gpu": [FIRST_UUID]})
    every = served({**GPUS, "match": {"product": "B"}}, {**GPUS, "name": "a", "match": {"product": "A"}})
    assert list(others.refusals(MACHINE, every)) == ["a"]


def test_a_whole_excludes_its_parts_and_the_reverse(others: OtherOffers) -> None:
    others.learn({"intel.com/sriov": [VF]})
    assert list(others.refusals(MACHINE, served({"name": "pf", "kind": "nic", "match": {"sriov": "pf"}}))) == ["pf"]
    others.learn({"intel.com/whole": [PF]})
    assert list(others.refusals(MACHINE, served(VFS))) == ["vf"]


def test_ids_that_name_no_device_refuse_nothing(others: OtherOffers) -> None:
    others.learn({"example.com/dongle": ["0", "1"], "example.com/none": []})
    assert others.refusals(MACHINE, served(GPUS, VFS)) == {}


def test_our_own_names_are_not_of_others_even_when_they_are_served_no_longer(others: OtherOffers) -> None:
    """Kubelet may still name a resource that a reload has removed, or the ones of an earlier domain."""
    others.serve(["example.org/old"], "example.org")
    others.learn({"nodeagent.dev/removed": [FIRST], "example.org/old": [FIRST], "example.org/x": [VF]})
    assert others.refusals(MACHINE, served(GPUS, VFS)) == {}


def test_a_name_that_becomes_ours_is_no_longer_of_others(others: OtherOffers) -> None:
    """The agent takes the name of a plugin over that was removed."""
    others.learn({"nvidia.com/gpu": [FIRST_UUID]})
    others.serve(["nvidia.com/gpu"], "nodeagent.dev")
    assert others.refusals(MACHINE, served(GPUS)) == {}


def test_what_was_offered_counts_until_one_kubelet_has_answered_without_it_for_long(
    others: OtherOffers, clock: Clock
) -> None:
    """A kubelet that starts has forgotten all plugins, and one that is away says nothing."""
    others.learn({"nvidia.com/gpu": [FIRST_UUID]})
    others.learn(None)
    clock.now_s = 10 * FORGET_S
    others.learn({})
    clock.now_s += FORGET_S - 1
    others.learn({"nvidia.com/gpu": []})
    others.learn(None)
    clock.now_s += FORGET_S - 1
    others.learn({})
    assert others.refusals(MACHINE, served(GPUS))
    clock.now_s += FORGET_S
    others.learn({})
    assert others.refusals(MACHINE, served(GPUS)) == {}


def test_what_was_registered_is_read_from_the_checkpoint_before_kubelet_answers(
    tmp_path: Path, others: OtherOffers
) -> None:
    data = {"PodDeviceEntries": None, "RegisteredDevices": {"nvidia.com/gpu": [SECOND_UUID], "x/y": None}}
    (tmp_path / "kubelet_internal_checkpoint").write_text(json.dumps({"Data": data, "Checksum": 1}))
    others.read_checkpoint()
    assert list(others.refusals(MACHINE, served(GPUS))) == ["gpu"]


@pytest.mark.parametrize("text", ["", "{", '{"Data": 7}', '{"Data": {"RegisteredDevices": [1]}}'])
def test_a_checkpoint_that_cannot_be_read_changes_nothing(tmp_path: Path, others: OtherOffers, text: str) -> None:
    others.learn({"nvidia.com/gpu": [FIRST_UUID]})
    (tmp_path / "kubelet_internal_checkpoint").write_text(text)
    others.read_checkpoint()
    assert list(others.refusals(MACHINE, served(GPUS))) == ["gpu"]


SLICE = {
    "spec": {
        "driver": "gpu.nvidia.com",
        "devices": [
            {"name": "gpu-0", "attributes": {"uuid": {"string": FIRST_UUID}, "index": {"int": 0}, "odd": None}},
            {"name": "gpu-1", "attributes": {"resource.kubernetes.io/pciBusID": {"string": SECOND}}},
        ],
    }
}
OWN = {
    "spec": {"driver": "nodeagent.dev", "devices": [{"name": "gpu-0", "attributes": {"uuid": {"string": FIRST_UUID}}}]}
}


def test_what_another_driver_publishes_is_refused_too(others: OtherOffers) -> None:
    """By the text attributes of its devices, or by their names, as of adapters."""
    odd = {"spec": None}
    by_name = {"spec": {"driver": "dra.net", "devices": [{"name": "0000-81-02-1"}]}}
    others.learn_slices(published([SLICE, OWN, odd, by_name], "nodeagent.dev"))
    assert others.refusals(MACHINE, served(GPUS, VFS, CPUS)) == {
        "gpu": f"another DRA driver offers {FIRST}, {SECOND} as gpu.nvidia.com; set match so that the two have no "
        "device in common, or remove that driver",
        "vf": f"another DRA driver offers {VF} as dra.net; set match so that the two have no device in common, or "
        "remove that driver",
    }


def test_what_another_driver_published_counts_until_two_looks_have_missed_it(others: OtherOffers) -> None:
    """Kubelet deletes all slices of its node when it starts."""
    for _ in range(2):
        others.learn_slices(published([SLICE], "nodeagent.dev"))
        others.learn_slices({})
        assert list(others.refusals(MACHINE, served(GPUS))) == ["gpu"]
    others.learn_slices({})
    assert others.refusals(MACHINE, served(GPUS)) == {}


# ---------------------------------------------------------------- CPUs

BIG = inventory_of(even_rows(2, 1, 1, 4, 1))
"""Eight CPUs: 0-3 on node 0, 4-7 on node 1."""


def cpu_slice(*devices: Mapping[str, object], driver: str = "dra.cpu") -> dict[str, Any]:
    return {"spec": {"driver": driver, "nodeName": "node-a", "devices": list(devices)}}


def one_cpu(cpu: int) -> dict[str, object]:
    """A CPU as dra-driver-cpu publishes it in its mode `individual`; its name is not the CPU's number."""
    numbers = {"numaNodeID": cpu // 4, "socketID": cpu // 4, "cacheL3ID": 0, "coreID": cpu % 4, "cpuID": cpu}
    return {
        "name": f"cpudev{cpu + 1:03d}",
        "attributes": {
            **{f"dra.cpu/{name}": {"int": number} for name, number in numbers.items()},
            "dra.cpu/smtEnabled": {"bool": False},
            "dra.cpu/coreType": {"string": "standard"},
            "resource.kubernetes.io/numaNode": {"int": cpu // 4},
        },
    }


def group(name: str, **numbers: int) -> dict[str, object]:
    """CPUs as it publishes them in its mode `grouped`: those that it reserves itself are not told."""
    attributes = {one.replace("__", "/"): {"int": number} for one, number in numbers.items()}
    return {"name": name, "allowMultipleAllocations": True, "capacity": {"dra.cpu/cpu": {"value": "4"}}} | {
        "attributes": {"dra.cpu/smtEnabled": {"bool": False}, **attributes}
    }


OF_NODE_0 = group("cpudevnuma000", **{"dra.cpu__numCPUs": 4, "resource.kubernetes.io__numaNode": 0})
OF_SOCKET_0 = group("cpudevsocket000", **{"dra.cpu__numCPUs": 4, "dra.cpu__socketID": 0})
REMOVE = "too; remove that driver"
APART = ", or set reservedCpus so that the two sets of CPUs have none in common"


@pytest.mark.parametrize(
    ("devices", "reserved", "why"),
    [
        ([one_cpu(2), one_cpu(3)], "0", f"2-3 {REMOVE}{APART}"),
        ([one_cpu(2), one_cpu(3)], "2-4", ""),
        ([one_cpu(one) for one in range(8)], "0", f"1-7 {REMOVE}"),
        ([OF_NODE_0], "0-1", f"2-3 {REMOVE}{APART}"),
        ([OF_NODE_0], "0-3", ""),
        ([OF_SOCKET_0], "0-3", f"4-7 {REMOVE}"),
        ([group("cpudevmachine", **{"dra.cpu__numCPUs": 8})], "0", f"1-7 {REMOVE}"),
        ([group("unnamed")], "0", f"1-7 {REMOVE}"),
        ([], "0", ""),
    ],
)
def test_cpus_that_another_driver_hands_out_are_not_served(
    others: OtherOffers, devices: list[Mapping[str, object]], reserved: str, why: str
) -> None:
    """Unless the two sets of CPUs have none in common, as with kubelet's static CPU manager."""
    others.learn_slices(published([cpu_slice(*devices)], "nodeagent.dev"))
    expected = {"cpu": f"another DRA driver, dra.cpu, hands out CPUs {why}"} if why else {}
    assert others.refusals(BIG, served(CPUS, GPUS), CpuSet.parse(reserved)) == expected


def test_cpus_are_recognized_whatever_the_driver_is_called_and_no_other_device_is_taken_for_cpus(
    others: OtherOffers,
) -> None:
    attributes = {"numaNode": {"int": 0}, "cpus": {"string": "0-3"}, "cpuID": {"string": "1"}, "odd": None}
    near = {"name": "gpu-0", "attributes": attributes}
    others.learn_slices(published([cpu_slice(near, driver="gpu.example")], "nodeagent.dev"))
    assert others.refusals(BIG, served(CPUS)) == {}
    others.learn_slices(published([cpu_slice(one_cpu(5), driver="cpu.example")], "nodeagent.dev"))
    assert list(others.refusals(BIG, served(CPUS))) == ["cpu"]


def test_cpus_that_were_published_count_until_two_looks_have_missed_them(others: OtherOffers) -> None:
    others.learn_slices(published([cpu_slice(one_cpu(5))], "nodeagent.dev"))
    others.learn_slices({})
    assert list(others.refusals(BIG, served(CPUS))) == ["cpu"]
    others.learn_slices({})
    assert others.refusals(BIG, served(CPUS)) == {}


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.booleans())
def test_no_cpu_is_served_that_another_driver_may_hand_out(theirs: set[int], reserved: set[int], grouped: bool) -> None:
    """Individually or by NUMA node: refused just if a CPU could be given away by both."""
    nodes = {one // 4 for one in theirs}
    groups = [group(f"n{one}", **{"dra.cpu__numCPUs": 1, "dra.cpu__numaNodeID": one}) for one in nodes]
    others = OtherOffers(Path("/none"), Clock())
    devices = groups if grouped else [one_cpu(one) for one in theirs]
    others.learn_slices(published([cpu_slice(*devices)], "nodeagent.dev"))
    may = {one for one in range(8) if one // 4 in nodes} if grouped else theirs
    refused = others.refusals(BIG, served(CPUS), CpuSet(reserved))
    assert bool(refused) == bool(may & ({*range(8)} - reserved))


async def test_an_api_server_that_does_not_answer_changes_nothing(others: OtherOffers) -> None:
    answers: list[object] = [[SLICE], PeerError("cannot list resourceslices: timeout")]

    async def slices() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, PeerError):
            raise answer
        return answer

    drivers = OtherDrivers(slices, "nodeagent.dev", others.learn_slices, configured=True)
    with capture_logs() as said:
        assert [await drivers.look(), await drivers.look()] == [True, False]
    assert [one["event"] for one in said] == ["slices-of-other-drivers-unknown"]
    assert list(others.refusals(MACHINE, served(GPUS))) == ["gpu"]


def test_a_device_that_two_plugins_gave_stays_healthy_for_the_pod_that_has_it() -> None:
    """Given before the other plugin was seen. Kubelet would fail a pod with an unhealthy device; others get nothing."""
    (gpu,), (any_gpu,) = served(GPUS), served({**GPUS, "name": "any"})
    ours = Grant(
        id="g", holder=Holder(api=DEVICE_PLUGIN, resource=gpu.name), ids=(FIRST,), devices=(FIRST,), confirmed=True
    )
    theirs = Grant(id="o", holder=Holder(api=DEVICE_PLUGIN, resource="nvidia.com/gpu"), devices=(FIRST, SECOND))
    ledger = Ledger(grants={"g": ours}, foreign={"o": theirs})
    for offer, healthy in ((gpu, [FIRST]), (any_gpu, [])):
        shown = offer.resource.advertised(MACHINE, ledger, NO_HEALTH)
        assert [one.id for one in shown if one.healthy] == healthy
