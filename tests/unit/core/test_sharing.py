"""What GPUs are shared, by whom and with which limits: pure functions of inventory and ledger, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.device_pool import DevicePool, label
from nodeagent.core.dra.prepare import Batch, Catalog, prepare, unprepare
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Claim, Result
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import UNHEALTHY
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.sharing.amounts import totals
from nodeagent.core.sharing.mps import mps_sets, set_name, uses_mps
from nodeagent.core.sharing.rules import time_slices
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pools import DRIVER, FORMS, NOBODY, NODE, claim, device, health_of, pool_of, result, stamp

GIB = 1 << 30
PART_1, PART_2 = label("m/mig-1"), label("m/mig-2")


def gpu(id: str, uuid: str, **more: Any) -> Device:
    attributes = {"uuid": uuid, "memory_bytes": 80 * GIB, **more.pop("attributes", {})}
    return device(id, "gpu", vendor="10de", paths=(f"/dev/nvidia-{id}",), attributes=attributes, **more)


def machine(*more: Device) -> Inventory:
    """Two GPUs, one whose parts are two MIG instances, one without a UUID, one for guests, one of AMD."""
    parts = (gpu(f"m/mig-{number}", f"MIG-{number}", parent="m") for number in (1, 2))
    devices = (
        gpu("a", "GPU-a"),
        gpu("b", "GPU-b"),
        gpu("m", "GPU-m", attributes={"mig": True}),
        *parts,
        device("n", "gpu", vendor="10de", paths=("/dev/nvidia9",)),
        device("v", "gpu", vendor="10de", driver="vfio-pci", paths=("/dev/vfio/3", "/dev/vfio/vfio")),
        device("amd", "gpu", vendor="1002", paths=("/dev/dri/renderD128",), attributes={"uuid": "x"}),
        *more,
    )
    return inventory_of(even_rows(1, 1, 1, 2, 1), devices=devices)


def catalog(replicas: int = 1) -> Catalog:
    every = DeviceResource(name="r/gpu", kind="gpu", replicas=replicas, match={"mig": "*"})
    return Catalog(driver=DRIVER, node_name=NODE, kinds={"gpu": DevicePool(kind="gpu", resources=(every,))})


def asked(*claims: Claim, ledger: Ledger = NOBODY, replicas: int = 1) -> Batch:
    return prepare(machine(), ledger, catalog(replicas), claims, stamp())


def of(name: str, *results: Result, **config: Any) -> Claim:
    return claim(name, *results, config={"kind": "GpuConfig", **config})


def granted(*claims: Claim, ledger: Ledger = NOBODY, replicas: int = 1) -> Ledger:
    batch = asked(*claims, ledger=ledger, replicas=replicas)
    assert not batch.errors
    return batch.ledger


def why(*claims: Claim, ledger: Ledger = NOBODY, replicas: int = 1) -> str:
    (error,) = asked(*claims, ledger=ledger, replicas=replicas).errors.values()
    return error


# Which daemons there are


def test_the_whole_gpus_of_a_claim_have_one_daemon_and_each_claim_its_own() -> None:
    ledger = granted(of("one", result("gpu", "b", "x"), result("gpu", "a", "y"), mps={}))
    (one,) = mps_sets(machine(), ledger).values()
    assert (one.devices, one.uuids, one.parents) == (("a", "b"), ("GPU-a", "GPU-b"), ("GPU-a", "GPU-b"))
    assert (one.holders, one.shared, one.threads_percent, dict(one.memory_mib)) == (("claim ns/one",), False, 100, {})
    assert [set_name(grant) for grant in ledger.grants.values()] == [one.name] * 2
    two = granted(of("two", result("gpu", PART_1), mps={}), ledger=ledger)
    assert len(mps_sets(machine(), two)) == 2


def test_all_claims_on_one_shared_device_have_one_daemon_with_the_largest_limits() -> None:
    first = granted(
        of("one", result("gpu", "a"), mps={"activeThreadPercentage": 20, "pinnedDeviceMemoryLimit": "4Gi"}), replicas=4
    )
    (one,) = mps_sets(machine(), first).values()
    assert (one.threads_percent, dict(one.memory_mib), one.shared) == (20, {0: 4096}, True)
    more = of("two", result("gpu", "a", memory=8 * GIB, cores=50), mps={"activeThreadPercentage": 40})
    second = granted(more, ledger=first, replicas=4)
    (two,) = mps_sets(machine(), second).values()
    assert (two.name, two.threads_percent, dict(two.memory_mib)) == (one.name, 40, {0: 8192})
    assert two.holders == ("claim ns/one", "claim ns/two")
    equal = granted(of("three", result("gpu", "a"), mps={}), ledger=second, replicas=4)
    (three,) = mps_sets(machine(), equal).values()
    assert (three.threads_percent, dict(three.memory_mib)) == (40, {0: 20 << 10})
    assert mps_sets(machine(), unprepare(second, ["uid-two"], "over").ledger)[one.name] == one


def test_a_claim_without_the_settings_or_with_admin_access_has_none() -> None:
    ledger = granted(claim("plain", result("gpu", "a")), of("look", result("gpu", "b", admin=True), mps={}))
    assert mps_sets(machine(), ledger) == {}
    assert not any(map(uses_mps, ledger.grants.values()))


def test_a_mig_instance_is_served_and_the_compute_mode_is_that_of_its_gpu() -> None:
    (one,) = mps_sets(machine(), granted(of("c", result("gpu", PART_1), mps={}))).values()
    assert (one.uuids, one.parents, one.fault) == (("MIG-1",), ("GPU-m",), "")


@pytest.mark.parametrize(
    ("name", "fault"), [("n", "the UUID of n is not known"), ("a", "a is not there at this moment")]
)
def test_a_daemon_whose_device_cannot_be_named_is_wanted_and_says_why_it_cannot_start(name: str, fault: str) -> None:
    """So that one that runs is not stopped while a driver is loaded again."""
    ledger = granted(of("c", result("gpu", name), mps={}))
    there = machine()
    left = replace(there, devices=tuple(one for one in there.devices if one.id != "a"))
    (one,) = mps_sets(left, ledger).values()
    assert (one.fault, one.uuids) == (fault, ())


def test_a_set_of_gpus_is_shared_as_its_members() -> None:
    attributes = {"group": 2, "members": "a,b", "memory_bytes": 160 * GIB}
    pair = device("gpus-2", "gpu", vendor="10de", paths=("/dev/nvidia-a", "/dev/nvidia-b"), attributes=attributes)
    there, sets = machine(pair), DeviceResource(name="r/sets", kind="gpu", match={"group": "*"})
    kinds = {"gpu": DevicePool(kind="gpu", resources=(sets,))}
    served = Catalog(driver=DRIVER, node_name=NODE, kinds=kinds)
    for config in ({"mps": {"pinnedDeviceMemoryLimit": "1Gi"}}, {"timeSlicing": {"interval": "Long"}}):
        batch = prepare(there, NOBODY, served, [of("c", result("gpu", "gpus-2"), **config)], stamp())
        assert not batch.errors
        if "mps" in config:
            (one,) = mps_sets(there, batch.ledger).values()
            assert (one.uuids, dict(one.memory_mib)) == (("GPU-a", "GPU-b"), {0: 1024, 1: 1024})
        else:
            assert time_slices(there, batch.ledger) == {"a": "Long", "b": "Long"}
    assert totals(pair, 4) == {}


# What is refused


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("m", "m is in MIG mode and computes only through its instances"),
        ("v", "v is passed through to a guest (driver vfio-pci), not used by CUDA here"),
        ("amd", "only NVIDIA's GPUs have it, amd is none"),
    ],
)
@pytest.mark.parametrize(
    ("config", "what"), [({"mps": {}}, "MPS"), ({"timeSlicing": {"interval": "Long"}}, "time slice Long")]
)
def test_gpus_that_cannot_be_shared_are_refused_with_the_reason(
    name: str, cause: str, config: dict[str, Any], what: str
) -> None:
    error = why(of("c", result("gpu", name), **config))
    assert error == f"cannot prepare claim ns/c: request r, device {NODE}/gpu/{name}: {what}: {cause}"


def test_a_time_slice_is_not_set_for_a_part() -> None:
    error = why(of("c", result("gpu", PART_1), timeSlicing={"interval": "Short"}))
    assert error.endswith("time slice Short: it is set for a whole GPU, m/mig-1 is a part of m")


def test_one_container_can_reach_one_daemon() -> None:
    """It has one pipe folder."""
    two_parts = of("c", result("gpu", PART_1, "x"), result("gpu", PART_2, "y"), mps={})
    assert why(two_parts) == (
        "cannot prepare claim ns/c: MPS on m/mig-1, m/mig-2: its daemon serves one MIG instance, and no other device "
        "besides"
    )
    two_shares = of("c", result("gpu", "a", "x"), result("gpu", "b", "y"), mps={})
    assert why(two_shares, replicas=2) == (
        "cannot prepare claim ns/c: MPS on a, b: a claim can use it on one shared device, and on no other device "
        "besides"
    )
    mixed = of("c", result("gpu", "a", "x"), result("gpu", PART_1, "y"), mps={})
    assert "its daemon serves one MIG instance" in why(mixed)


def test_a_shared_gpu_is_shared_in_one_way() -> None:
    """Through MPS or in turns of one length."""
    long, mps = {"timeSlicing": {"interval": "Long"}}, {"mps": {}}
    by_mps = granted(of("mps", result("gpu", "a"), **mps), replicas=4)
    assert why(of("c", result("gpu", "a"), **long), ledger=by_mps, replicas=4).endswith(
        "cannot set the time slice of a: claim ns/mps shares it through MPS"
    )
    in_turns = granted(of("turns", result("gpu", "a"), **long), replicas=4)
    assert why(of("c", result("gpu", "a"), **mps), ledger=in_turns, replicas=4).endswith(
        "cannot share a through MPS: claim ns/turns has set its time slice to Long"
    )
    short = of("c", result("gpu", "a"), timeSlicing={"interval": "Short"})
    assert why(short, ledger=in_turns, replicas=4).endswith(
        "cannot set the time slice of a to Short: claim ns/turns has set it to Long"
    )
    both = granted(of("c", result("gpu", "a"), **long), ledger=in_turns, replicas=4)
    assert time_slices(machine(), both) == {"a": "Long"}
    assert granted(claim("any", result("gpu", "a")), ledger=both, replicas=4)


# Health


def test_one_gpu_is_the_unit_of_health_for_all_its_shares() -> None:
    """And for the parts of a GPU: each holder of some of it learns the same, under both APIs."""
    resource = DeviceResource(name="r/gpu", kind="gpu", replicas=3, match={"mig": "*"})
    pool = DevicePool(kind="gpu", resources=(resource,))
    for ill, names in (("a", {"a"}), ("m", {"m", PART_1, PART_2})):
        health = health_of(**{ill: UNHEALTHY})
        shown = {one.id: one.healthy for one in resource.advertised(machine(), NOBODY, health)}
        ids = {id for id, healthy in shown.items() if not healthy}
        assert {label(id.rpartition("::")[0]) for id in ids} == names
        assert len(ids) == 3 * len(names)
        for features in FORMS:
            whole = {_device_of(one.name) for one in pool_of(pool, machine(), features=features).devices}
            devices = pool_of(pool, machine(), health=health, features=features).devices
            tainted = {_device_of(one.name) for one in devices if one.taints}
            assert tainted == (names & whole if features.taints else set())
            assert {_device_of(one.name) for one in devices} == whole - (set() if features.taints else names)


def _device_of(name: str) -> str:
    return name.partition("-share")[0]
