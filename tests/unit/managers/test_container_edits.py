"""What the containers of a claim get: variables by request, device nodes, mounts, and what they can read of it all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from nodeagent.config.schema import Config
from nodeagent.core.dra.prepare import prepare
from nodeagent.core.model.claim import Claim, Result
from nodeagent.core.model.container import Container
from nodeagent.core.model.device import ContainerEdits, DeviceNode, Mount
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.pinning.plan import GRANT_VARIABLE, named_by
from nodeagent.errors import HostError, InputError
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.managers.dra import container_edits as handover
from nodeagent.resources.catalog import Dra, dra_of
from tests.builders.inventories import GIB, even_rows, inventory_of
from tests.builders.pools import DRIVER, NOBODY, NODE, claim, device, result, stamp

MIB = 1 << 20
METADATA = Mount(host_path="/run/x", container_path="/var/run/nodeagent/claims/c")
RESOURCES: list[dict[str, Any]] = [
    {"name": "cpu", "kind": "cpu", "serve": "dra"},
    {"name": "pages", "kind": "hugepages", "pageSize": "2Mi", "serve": "dra"},
    {"name": "memory", "kind": "memory", "serve": "dra"},
    {"name": "nic", "kind": "nic", "serve": "both", "env": {"OWN": "1"}},
    {"name": "gpu", "kind": "gpu", "serve": "dra", "cdi": {"kind": "x.example/gpu", "name": "uuid"}},
    {"name": "null", "kind": "char", "paths": ["/dev/null"], "replicas": 4, "serve": "dra"},
    {"name": "tty", "kind": "char", "paths": ["/dev/tty"], "serve": "device-plugin"},
]


def config(*resources: dict[str, Any]) -> Config:
    return msgspec.convert({"resources": list(resources or RESOURCES)}, Config)


def served(*resources: dict[str, Any]) -> Dra:
    return dra_of(config(*resources), builtin_kinds(), NODE)


def machine(nodes: int = 2) -> Inventory:
    """4 CPUs a NUMA node; one adapter with RDMA; two GPUs."""
    rows = even_rows(1, nodes, 1, 4, 1) if nodes else [(cpu, 0, -1, -1, cpu) for cpu in range(4)]
    return inventory_of(
        rows,
        pages={(node, 2 * MIB): 8 for node in range(nodes)},
        devices=(
            device("/dev/null", "char", paths=("/dev/null",), attributes={"selector": "null"}),
            device("g0", "gpu", vendor="10de", numa_node=0, paths=("/dev/nvidia0",), attributes={"uuid": "GPU-0"}),
            device("g1", "gpu", vendor="10de", numa_node=0, paths=("/dev/nvidia1",), attributes={"uuid": "GPU-1"}),
            device("n0", numa_node=1, pci_address="0000:41:00.0", paths=("/dev/infiniband/uverbs0", "/dev/vfio/7")),
        ),
    )


def granted(one: Claim, inventory: Inventory | None = None) -> tuple[Grant, ...]:
    batch = prepare(inventory or machine(), NOBODY, served().catalog, [one], stamp())
    assert not batch.errors
    return batch.grants[one.ref.uid]


def edited(*results: Result, config: dict[str, Any] | None = None, nodes: int = 2) -> list[ContainerEdits]:
    one = claim("c", *results, config=config)
    return handover.edits(served(), machine(nodes), granted(one, machine(nodes)), METADATA)


def read(*results: Result) -> dict[str, Any]:
    return handover.metadata(served(), machine(), granted(claim("c", *results)))


# What is served


def test_kinds_that_are_served_through_dra_have_pools_and_others_have_none() -> None:
    """A kind that the node refuses to serve is left out."""
    dra = served()
    assert (list(dra.catalog.kinds), dra.catalog.driver, dra.catalog.node_name) == (
        ["cpu", "hugepages", "memory", "nic", "gpu", "char"],
        DRIVER,
        NODE,
    )
    assert "nodeagent.dev/tty" not in [one.name for one in dra.offers]
    assert dra.served
    less = dra_of(config(), builtin_kinds(), NODE, refused=["cpu", "nic"])
    assert list(less.catalog.kinds) == ["hugepages", "memory", "gpu", "char"]
    assert {one.resource.kind for one in less.offers}.isdisjoint({"cpu", "nic"})
    assert not served({"name": "cpu", "kind": "cpu"}).served


# Variables


def test_variables_say_what_a_request_was_given_under_its_own_name_too() -> None:
    """Over all devices of the request; those of another request are not mixed in."""
    found = edited(
        result("cpu", "numa0", "near-0", cpus=2),
        result("cpu", "numa1", "near-0", cpus=1),
        result("cpu", "numa1", "far", cpus=2),
        result("hugepages", "numa0-2mi", "p", size=4 * MIB),
        result("hugepages", "numa1-2mi", "p", size=2 * MIB),
        result("memory", "numa1", "m", size=GIB),
    )
    usual = {"NODEAGENT_CPUS": "0-1,4", "NODEAGENT_NUMA_NODES": "0,1"}
    own = {"NODEAGENT_CPUS_NEAR_0": "0-1,4", "NODEAGENT_NUMA_NODES_NEAR_0": "0,1"}
    assert said(found[0].env) == said(found[1].env)
    assert said(found[0].env).keys() == usual.keys() | own.keys()
    assert found[0].env["NODEAGENT_CPUS"] == found[0].env["NODEAGENT_CPUS_NEAR_0"]
    assert found[0].env["NODEAGENT_NUMA_NODES"] == "0,1"
    assert found[2].env["NODEAGENT_NUMA_NODES_FAR"] == "1"
    assert said(found[3].env) == said(found[4].env)
    assert found[3].env["NODEAGENT_HUGEPAGES_2MI"] == found[3].env["NODEAGENT_HUGEPAGES_2MI_P"] == "3"
    assert found[3].env["NODEAGENT_HUGEPAGES_2MI_NUMA_NODES"] == "0,1"
    assert (found[5].env["NODEAGENT_MEMORY_BYTES"], found[5].env["NODEAGENT_MEMORY_NUMA_NODES"]) == (str(GIB), "1")


def said(env: Mapping[str, str]) -> dict[str, str]:
    """Without the variable that names the grant."""
    return {name: value for name, value in env.items() if not name.startswith(GRANT_VARIABLE)}


def test_a_container_is_told_each_grant_by_a_variable_of_its_own() -> None:
    """So that it is known which of a pod's containers use which claims: the names never meet."""
    found = edited(result("cpu", "numa0", "near", cpus=2), result("cpu", "numa1", "near", cpus=1))
    env = {**found[0].env, **found[1].env}
    named = named_by(Container(id="c", pod_id="s", name="main", env=env))
    assert named == ("uid-c-0", "uid-c-1")


def test_an_alternative_is_named_by_the_request_that_it_is_for() -> None:
    """Containers ask by that; "a-b" and the alternative b of a are two variables."""
    first, second = edited(result("cpu", "numa0", "a/b", cpus=1), result("cpu", "numa1", "a-b", cpus=1))
    assert (first.env["NODEAGENT_NUMA_NODES_A"], second.env["NODEAGENT_NUMA_NODES_A_B"]) == ("0", "1")
    assert "NODEAGENT_NUMA_NODES_A_B" not in first.env


def test_no_name_of_a_request_hides_a_usual_variable() -> None:
    (found,) = edited(result("hugepages", "numa1-2mi", "numa-nodes", size=6 * MIB))
    assert found.env["NODEAGENT_HUGEPAGES_2MI_NUMA_NODES"] == "1"
    assert found.env["NODEAGENT_HUGEPAGES_2MI"] == "3"


def test_a_machine_without_numa_names_no_node() -> None:
    (found,) = edited(result("cpu", "no-numa", cpus=2), nodes=0)
    assert (found.env["NODEAGENT_CPUS"], found.env["NODEAGENT_NUMA_NODES"]) == ("0-1", "")


# Devices


def test_a_device_brings_its_nodes_and_variables_and_those_of_its_request() -> None:
    """Each GPU's CDI device its own node; the variable names both. Names in other people's specs go in the answer."""
    grants = granted(
        claim("c", result("gpu", "g0", "gpus"), result("gpu", "g1", "gpus"), result("gpu", "g0", "look", admin=True))
    )
    first, second, seen = handover.edits(served(), machine(), grants, METADATA)
    assert (
        first.device_nodes
        == seen.device_nodes
        == (DeviceNode(host_path="/dev/nvidia0", container_path="/dev/nvidia0"),)
    )
    assert second.device_nodes[0].host_path == "/dev/nvidia1"
    assert first.env["NVIDIA_VISIBLE_DEVICES"] == second.env["NVIDIA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert seen.env["NVIDIA_VISIBLE_DEVICES"] == "GPU-0"
    assert [handover.cdi_names(served(), machine(), one) for one in grants] == [
        ("x.example/gpu=GPU-0",),
        ("x.example/gpu=GPU-1",),
        ("x.example/gpu=GPU-0",),
    ]


@pytest.mark.parametrize(("rdma", "nodes"), [(None, 2), (True, 2), (False, 1)])
def test_rdma_nodes_are_given_unless_the_claim_says_no(rdma: bool | None, nodes: int) -> None:
    config = {"kind": "NicConfig", "rdma": rdma} if rdma is not None else None
    (found,) = edited(result("nic", "n0"), config=config)
    assert len(found.device_nodes) == nodes
    assert found.env["OWN"] == "1"


@pytest.mark.parametrize(
    "one",
    [
        result("cpu", "numa0", cpus=1),
        result("cpu", "numa0", admin=True),
        result("hugepages", "numa0-2mi", size=2 * MIB),
        result("memory", "numa0", size=4096),
        result("nic", "n0"),
        result("char", "dev-null", shares=1),
    ],
)
def test_no_device_of_a_claim_gives_nothing_at_all(one: Result) -> None:
    """The runtime refuses a CDI device without edits: what can be read about the claim is always there, and last."""
    (found,) = edited(one)
    assert found.mounts[-1] == METADATA


@pytest.mark.parametrize("admin", [False, True])
def test_a_device_that_is_gone_or_not_served_any_more_is_said(admin: bool) -> None:
    """Held or only looked at."""
    grants = granted(claim("c", result("nic", "n0", admin=admin)))
    gone = replace(machine(), devices=())
    with pytest.raises((HostError, InputError), match="n0"):
        handover.edits(served(), gone, grants, METADATA)
    with pytest.raises((HostError, InputError), match="n0"):
        handover.metadata(served(), gone, grants)
    with pytest.raises((HostError, InputError), match=r"n0|no pool"):
        handover.edits(served(RESOURCES[0]), machine(), grants, METADATA)


# Settings


def test_hugepages_are_mounted_where_the_claim_says() -> None:
    """With the size of the pages."""
    (found,) = edited(
        result("hugepages", "numa0-2mi", size=2 * MIB), config={"kind": "HugepageConfig", "mountPath": "/pages"}
    )
    mount, _ = found.mounts
    assert (mount.type, mount.container_path, mount.read_only) == ("hugetlbfs", "/pages", False)
    assert "pagesize=2048K" in mount.options


def test_mps_is_a_mount_and_its_limits_are_variables() -> None:
    """The limit in whole mebibytes, rounded up."""
    mps = {"activeThreadPercentage": 30, "pinnedDeviceMemoryLimit": str(MIB + 1)}
    (found,) = edited(result("gpu", "g0"), config={"kind": "GpuConfig", "mps": mps})
    assert found.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "30"
    assert found.env["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=2M"
    assert found.env["CUDA_MPS_PIPE_DIRECTORY"] in [mount.container_path for mount in found.mounts]


def test_a_gpu_of_which_programs_share_the_daemon_brings_its_folder_and_the_hosts_shared_memory() -> None:
    """With several GPUs the limits of memory are the daemon's alone: CUDA numbers the GPUs that a container sees."""
    mps = {"activeThreadPercentage": 30, "pinnedDeviceMemoryLimit": "1Gi"}
    found = edited(result("gpu", "g0", "a"), result("gpu", "g1", "b"), config={"kind": "GpuConfig", "mps": mps})
    folders = {
        (mount.host_path, mount.container_path, mount.read_only)
        for one in found
        for mount in one.mounts
        if mount != METADATA
    }
    ((pipe, *_), shared) = sorted(folders, key=lambda one: one[1] == "/dev/shm")
    assert shared == ("/dev/shm", "/dev/shm", False)
    assert re.fullmatch("/run/nodeagent/mps/[0-9a-f]{12}/pipe", pipe)
    assert len(folders) == 2
    assert all("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" not in one.env for one in found)


@pytest.mark.parametrize(("mps", "by"), [(True, "MPS"), (False, "advisory")])
def test_a_share_of_a_gpu_says_what_it_has_and_what_enforces_it(mps: bool, by: str) -> None:
    gpu = device("g0", "gpu", vendor="10de", paths=("/dev/nvidia0",), attributes={"uuid": "x", "memory_bytes": 8 * GIB})
    there = inventory_of(even_rows(1, 1, 1, 4, 1), devices=(gpu,))
    dra = served({"name": "gpu", "kind": "gpu", "serve": "dra", "replicas": 4})
    config = {"kind": "GpuConfig", "mps": {}} if mps else None
    wanted = claim("c", result("gpu", "g0", "r", memory=GIB, cores=30), config=config)
    grants = prepare(there, NOBODY, dra.catalog, [wanted], stamp()).grants["uid-c"]
    (found,) = handover.edits(dra, there, grants, METADATA)
    names = ("NODEAGENT_DEVICE_MEMORY_BYTES", "NODEAGENT_DEVICE_CORES_PERCENT", "NODEAGENT_DEVICE_LIMITS")
    assert [found.env[name] for name in names] == [str(GIB), "30", by]
    assert found.env.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "") == ("0=1024M" if mps else "")
    (said,) = handover.metadata(dra, there, grants)["devices"]
    assert said["limits"] == {"memoryBytes": GIB, "coresPercent": 30, "enforcedBy": by}
    (plugin,) = handover.edits(dra, there, [replace(grants[0], amounts=())], METADATA)
    assert not any(name in plugin.env for name in names)


def test_own_variables_win_over_those_of_the_claim_and_the_claims_over_the_devices() -> None:
    (found,) = edited(result("char", "dev-null"), config={"kind": "DeviceConfig", "env": {"MORE": "2"}})
    assert found.env["MORE"] == "2"


# What can be read


def test_a_container_can_read_all_that_its_claim_holds() -> None:
    """By request and device, in the order of the allocation; what does not apply is not there."""
    found = read(
        result("cpu", "numa1", "a/b", share="s1", cpus=2),
        result("hugepages", "numa0-2mi", "p", size=4 * MIB),
        result("memory", "numa1", "m", size=4096),
        result("nic", "n0", "n"),
        result("nic", "n0", "look", admin=True),
    )
    assert found["claim"] == {"namespace": "ns", "name": "c", "uid": "uid-c"}
    cpu, pages, memory, nic, look = found["devices"]
    assert cpu == {
        "request": "a/b",
        "pool": "node-a/cpu",
        "device": "numa1",
        "shareID": "s1",
        "kind": "cpu",
        "cpus": "4-5",
        "numaNodes": [1],
    }
    assert pages["hugepages"] == [{"size": "2Mi", "pages": 2, "numaNode": 0}]
    assert (memory["memory"], memory["numaNodes"]) == ([{"bytes": 4096, "numaNode": 1}], [1])
    assert (nic["id"], nic["pciAddress"], nic["paths"], nic["kind"]) == (
        "n0",
        "0000:41:00.0",
        ["/dev/infiniband/uverbs0", "/dev/vfio/7"],
        "nic",
    )
    assert look == {**nic, "request": "look", "adminAccess": True}
