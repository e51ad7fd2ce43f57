"""GPUs: what NVML, DRM and KFD tell becomes devices, links and what a container gets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.ledger.exclusion import most_together
from nodeagent.core.ledger.foreign import devices_named
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import LINK_WEIGHTS, NVLINK_STEP, Link
from nodeagent.core.model.inventory import ABSENT, DEGRADED, PRESENT, Inventory, KindState
from nodeagent.host.devices.all_kinds import CharSelector, Devices
from nodeagent.host.nvml.client import Failure, Mig, NvGpu, Snapshot
from nodeagent.host.nvml.values import Condition, Fabric, GpuInstance, for_scans
from tests.builders import tables
from tests.builders.devices import DeviceTree
from tests.support.looking import by_id, edits, kinds_of, look, paths, state

NVIDIA_GPU = {"pci_class": "030200", "vendor": "10de", "device": "2330", "driver": "nvidia"}
LIBRARY_GONE = Failure(absent=True, reason="there is no library libnvidia-ml.so.1")
HANGS = Failure(absent=False, reason="NVML did not answer within 5 s")


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path)


def nvidia(address: str, minor: int, **options: object) -> NvGpu:
    """A GPU as NVML would tell it."""
    facts = {"uuid": f"GPU-{minor}", "name": "NVIDIA H100", "memory_bytes": 80 << 30, "minor": minor, **options}
    return NvGpu(pci_address=address, **facts)  # type: ignore[arg-type]


def snapshot(*gpus: NvGpu, errors: tuple[str, ...] = ()) -> Snapshot:
    return Snapshot(driver_version="580.95", gpus=gpus, errors=errors)


def _four_gpus(tree: DeviceTree) -> list[str]:
    addresses = [f"0000:{bus}:00.0" for bus in ("1b", "3b", "9b", "bb")]
    for address in addresses:
        tree.pci(address, **NVIDIA_GPU)  # type: ignore[arg-type]
    return addresses


def test_a_gpu_that_nvml_tells_of_has_its_facts_and_nodes(tree: DeviceTree) -> None:
    """Its id is the PCI address; the UUID is an attribute."""
    address = _four_gpus(tree)[0]
    for node in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
        tree.node(f"/dev/{node}")
    found = by_id(look(tree, nvml=snapshot(nvidia(address, 0, ecc_uncorrected=0))))[address]
    assert found.attributes == {
        "uuid": "GPU-0",
        "product": "NVIDIA H100",
        "driver_version": "580.95",
        "memory_bytes": 80 << 30,
        "minor": 0,
        "mig": False,
        "ecc_uncorrected": 0,
    }
    given = edits(found)
    assert paths(given) == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]
    assert given.env == {"NVIDIA_VISIBLE_DEVICES": "GPU-0", "PCIDEVICE_NODEAGENT_GPU": address}


MIG = Mig(uuid="MIG-1", profile="1g.10gb", memory_bytes=10 << 30, gpu_instance=7, compute_instance=0)
CONDITIONS: dict[str, object] = {
    "mig_pending": True,
    "processes": 3,
    "nvlinks_active": (1,),
    "nvlinks_inactive": (2,),
    "rows_pending": True,
    "rows_failed": True,
    "condition": Condition(ecc_lifetime=4, recovery=1),
}
"""What only says how a GPU is."""
FACTS: dict[str, object] = {
    "pci_address": "0000:3b:00.0",
    "uuid": "GPU-9",
    "name": "NVIDIA H200",
    "minor": 9,
    "memory_bytes": 141 << 30,
    "mig_enabled": True,
    "migs": (MIG,),
    "profiles": ((1, "1g.10gb"),),
    "instances": (GpuInstance(id=7, profile=0, start=0, size=1),),
    "nvlinks": {"0000:3b:00.0": 4},
    "fabric": Fabric(cluster="c", clique=1),
    "ecc_uncorrected": 2,
}


@pytest.mark.parametrize("field", CONDITIONS)
def test_what_only_says_how_a_gpu_is_changes_nothing_of_the_inventory(tree: DeviceTree, field: str) -> None:
    """Two answers of NVML that are equal for scans give the same inventory."""
    address = _four_gpus(tree)[0]
    before, after = snapshot(nvidia(address, 0)), snapshot(nvidia(address, 0, **{field: CONDITIONS[field]}))
    assert before != after and for_scans(before) == for_scans(after)
    assert look(tree, nvml=before) == look(tree, nvml=after)


def test_errors_of_an_instance_change_nothing_of_the_inventory(tree: DeviceTree) -> None:
    address = _four_gpus(tree)[0]
    before, after = (
        snapshot(nvidia(address, 0, mig_enabled=True, migs=(msgspec.structs.replace(MIG, ecc_uncorrected=count),)))
        for count in (0, 3)
    )
    assert before != after and for_scans(before) == for_scans(after)
    assert look(tree, nvml=before) == look(tree, nvml=after)


@pytest.mark.parametrize("field", FACTS)
def test_all_else_that_nvml_says_of_a_gpu_is_looked_at(field: str) -> None:
    before, after = nvidia("0000:1b:00.0", 0), nvidia("0000:1b:00.0", 0)
    assert for_scans(snapshot(before)) == for_scans(snapshot(after))
    changed = msgspec.structs.replace(after, **{field: FACTS[field]})
    assert for_scans(snapshot(before)) != for_scans(snapshot(changed))


def test_each_field_is_one_of_both() -> None:
    assert {*CONDITIONS, *FACTS} == {*NvGpu.__struct_fields__}
    assert for_scans(HANGS) is HANGS and for_scans(None) is None
    assert for_scans(snapshot(errors=("a",))) != for_scans(snapshot())


def test_two_gpus_for_one_container_are_in_one_variable_and_share_their_common_nodes(tree: DeviceTree) -> None:
    first, second, *_ = _four_gpus(tree)
    tree.node("/dev/nvidiactl")
    found = by_id(look(tree, nvml=snapshot(nvidia(first, 0), nvidia(second, 1))))
    given = edits(found[first], found[second])
    assert given.env["NVIDIA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert paths(given) == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia1"]


def test_mig_instances_are_parts_of_their_gpu_with_their_capability_nodes(tree: DeviceTree) -> None:
    address = _four_gpus(tree)[3]
    tree.write("proc/driver/nvidia-caps/mig-minors", "config 1\ngpu3/gi2/access 57\ngpu3/gi2/ci0/access 58")
    mig = Mig(uuid="MIG-1", profile="3g.40gb", memory_bytes=40 << 30, gpu_instance=2, compute_instance=0)
    found = by_id(look(tree, nvml=snapshot(nvidia(address, 3, mig_enabled=True, migs=(mig,)))))
    part = found[f"{address}/mig-2-0"]
    assert (part.kind, part.parent, part.pci_address) == ("gpu", address, address)
    assert (part.attributes["mig_profile"], part.attributes["memory_bytes"]) == ("3g.40gb", 40 << 30)
    given = edits(part)
    assert given.env["NVIDIA_VISIBLE_DEVICES"] == "MIG-1"
    assert paths(given) == ["/dev/nvidia3", "/dev/nvidia-caps/nvidia-cap57", "/dev/nvidia-caps/nvidia-cap58"]


def test_nvlinks_become_links_that_weigh_by_their_number(tree: DeviceTree) -> None:
    """Four direct ones; two and three to one switch count as two; a switch that only one reaches is none."""
    a, b, c, d = _four_gpus(tree)
    switch = "0000:d1:00.0"
    gpus = (
        nvidia(a, 0, nvlinks={b: 4}),
        nvidia(b, 1, nvlinks={a: 4, "0000:d2:00.0": 6}),
        nvidia(c, 2, nvlinks={switch: 2}),
        nvidia(d, 3, nvlinks={switch: 3}),
    )
    weight = LINK_WEIGHTS["nvlink"]
    assert look(tree, nvml=snapshot(*gpus)).links == (
        Link(a=a, b=b, type="nvlink", weight=weight + 3 * NVLINK_STEP),
        Link(a=c, b=d, type="nvlink", weight=weight + NVLINK_STEP),
    )


def test_gpus_that_are_linked_each_with_each_are_in_one_domain(tree: DeviceTree) -> None:
    """In a chain of three the first two are: the last has no link to the first."""
    a, b, c, d = _four_gpus(tree)
    chain = nvidia(a, 0, nvlinks={b: 1}), nvidia(b, 1, nvlinks={a: 1, c: 1}), nvidia(c, 2), nvidia(d, 3)
    found = by_id(look(tree, nvml=snapshot(*chain)))
    assert [found[one].attributes.get("nvlink_domain") for one in (a, b, c, d)] == [a, a, None, None]
    switch = {"0000:d1:00.0": 18}
    every = by_id(look(tree, nvml=snapshot(*(nvidia(one, i, nvlinks=switch) for i, one in enumerate((a, b, c, d))))))
    assert {every[one].attributes["nvlink_domain"] for one in (a, b, c, d)} == {a}


def test_the_fabric_of_a_gpu_is_an_attribute(tree: DeviceTree) -> None:
    first, second, *_ = _four_gpus(tree)
    fabric = Fabric(cluster="abababab-abab-abab-abab-abababababab", clique=7)
    found = by_id(look(tree, nvml=snapshot(nvidia(first, 0, fabric=fabric), nvidia(second, 1))))
    assert found[first].attributes["fabric_cluster"] == fabric.cluster
    assert found[first].attributes["fabric_clique"] == 7
    assert "fabric_cluster" not in found[second].attributes


@pytest.mark.parametrize(
    ("nvml", "reasons"),
    [
        (LIBRARY_GONE, ["there is no library libnvidia-ml.so.1", "LD_LIBRARY_PATH", "nvidia-modprobe"]),
        (HANGS, ["NVML did not answer within 5 s", "nvidia-modprobe"]),
        (None, ["nvidia-modprobe"]),
    ],
)
def test_without_nvml_and_nodes_the_gpus_keep_their_identity_and_are_not_healthy(
    tree: DeviceTree, nvml: Failure | None, reasons: list[str]
) -> None:
    """The kind names the GPUs, the cause and the remedy. The nodes of the display driver are no substitute."""
    addresses = _four_gpus(tree)
    tree.drm(addresses[0], 0)
    found = look(tree, nvml=nvml)
    kind = state(found, "gpu")
    assert kind.state == DEGRADED
    assert all(reason in kind.reason for reason in (*reasons, *addresses))
    assert kinds_of(found) == dict.fromkeys(addresses, "gpu")
    assert _healthy(found) == set()


def _healthy(found: Devices) -> set[str]:
    """The ids of GPUs that a resource advertises as healthy while nothing is known against them."""
    shown = DeviceResource(name="r/gpu", kind="gpu").advertised(Inventory(devices=found.devices), Ledger(), {})
    assert all(one.healthy or one.reason for one in shown)
    return {one.id for one in shown if one.healthy}


def _driver_shows(tree: DeviceTree, address: str, minor: int, *, uuid: str = "", excluded: str = "No") -> None:
    lines = (
        "Model: \t\t NVIDIA H100 80GB HBM3",
        f"GPU UUID: \t {uuid or f'GPU-{minor}'}",
        f"Bus Location: \t {address}",
        f"Device Minor: \t {minor}",
        f"GPU Excluded:\t {excluded}",
    )
    tree.write(f"proc/driver/nvidia/gpus/{address}/information", "\n".join(lines))


@pytest.mark.parametrize("nvml", [LIBRARY_GONE, HANGS, None])
def test_without_nvml_the_kernel_driver_shows_what_a_container_needs(tree: DeviceTree, nvml: Failure | None) -> None:
    first, second, unopened, excluded = _four_gpus(tree)
    _driver_shows(tree, first, 0)
    _driver_shows(tree, second, 1)
    _driver_shows(tree, unopened, 2, uuid="GPU-????????-????-????-????-????????????")
    _driver_shows(tree, excluded, 3, excluded="Yes")
    tree.write("sys/module/nvidia/version", "580.95")
    for node in ("nvidia0", "nvidia2", "nvidia3", "nvidiactl"):
        tree.node(f"/dev/{node}")
    found = look(tree, nvml=nvml)
    gpu = by_id(found)[first]
    assert gpu.attributes == {
        "uuid": "GPU-0",
        "product": "NVIDIA H100 80GB HBM3",
        "driver_version": "580.95",
        "minor": 0,
    }
    assert paths(edits(gpu)) == ["/dev/nvidia0", "/dev/nvidiactl"]
    assert edits(gpu).env["NVIDIA_VISIBLE_DEVICES"] == "GPU-0"
    assert "uuid" not in by_id(found)[unopened].attributes
    assert _healthy(found) == {first, unopened}
    assert state(found, "gpu").state == DEGRADED
    assert f"{second}, {excluded}: " in state(found, "gpu").reason


def test_a_missing_library_is_a_fault_also_where_every_node_exists(tree: DeviceTree) -> None:
    """Health and MIG instances are unknown; on a machine whose GPUs NVIDIA's driver does not hold it is none."""
    address = "0000:1b:00.0"
    tree.pci(address, **NVIDIA_GPU)  # type: ignore[arg-type]
    _driver_shows(tree, address, 0)
    tree.node("/dev/nvidia0")
    assert state(look(tree, nvml=LIBRARY_GONE), "gpu").state == DEGRADED
    assert state(look(tree), "gpu") == KindState(kind="gpu", state=PRESENT)
    (tree.folders[address] / "driver").unlink()
    gone = KindState(kind="gpu", state=ABSENT, reason="there is no library libnvidia-ml.so.1")
    assert state(look(tree, nvml=LIBRARY_GONE), "gpu") == gone


def test_without_nvml_a_gpu_with_mig_instances_is_not_offered_as_a_whole(tree: DeviceTree) -> None:
    """The driver has a folder of capabilities for each instance."""
    first, second, *_ = _four_gpus(tree)
    for minor, address in enumerate((first, second)):
        _driver_shows(tree, address, minor)
        tree.node(f"/dev/nvidia{minor}")
    tree.write("proc/driver/nvidia/capabilities/gpu1/mig/gi2/access", "DeviceFileMinor: 57")
    found = look(tree, nvml=LIBRARY_GONE)
    assert by_id(found)[second].attributes["mig"] is True
    assert _healthy(found) == {first}


@pytest.mark.parametrize("instances", [0, 1])
def test_a_gpu_in_mig_mode_is_not_offered_as_a_whole(tree: DeviceTree, instances: int) -> None:
    """Without instances it computes nothing; with some only these do."""
    address = _four_gpus(tree)[0]
    tree.write("proc/driver/nvidia-caps/mig-minors", "gpu0/gi2/access 57\ngpu0/gi2/ci0/access 58")
    mig = Mig(uuid="MIG-1", profile="3g.40gb", memory_bytes=40 << 30, gpu_instance=2, compute_instance=0)
    found = look(tree, nvml=snapshot(nvidia(address, 0, mig_enabled=True, migs=(mig,) * instances)))
    assert _healthy(found) == {f"{address}/mig-2-0" for _ in range(instances)}


@pytest.mark.parametrize("table", ["", "config 1", "gpu1/gi2/access 57\ngpu1/gi2/ci0/access 58"])
def test_a_mig_instance_without_its_capability_nodes_is_not_healthy(tree: DeviceTree, table: str) -> None:
    """The node of its GPU alone does not open it, and is not handed over."""
    address = _four_gpus(tree)[0]
    tree.write("proc/driver/nvidia-caps/mig-minors", table)
    mig = Mig(uuid="MIG-1", profile="3g.40gb", memory_bytes=40 << 30, gpu_instance=2, compute_instance=0)
    found = look(tree, nvml=snapshot(nvidia(address, 0, mig_enabled=True, migs=(mig,))))
    assert by_id(found)[f"{address}/mig-2-0"].paths == ()
    assert _healthy(found) == set()


def test_a_malformed_minor_number_costs_its_gpu_and_no_other(tree: DeviceTree) -> None:
    first, second, *_ = _four_gpus(tree)
    _driver_shows(tree, first, 0)
    tree.node("/dev/nvidia0")
    tree.write(f"proc/driver/nvidia/gpus/{second}/information", "Model: X\nDevice Minor: ten")
    found = look(tree)
    assert _healthy(found) == {first}
    assert any("'ten'" in warning for warning in found.warnings)


def test_a_missing_library_does_not_make_the_gpus_of_others_absent(tree: DeviceTree) -> None:
    tree.pci("0000:c1:00.0", pci_class="038000", vendor="1002", driver="amdgpu")
    assert state(look(tree, nvml=LIBRARY_GONE), "gpu").state == PRESENT


def test_a_gpu_that_fell_off_the_bus_says_so_and_the_others_are_whole(tree: DeviceTree) -> None:
    first, lost, *_ = _four_gpus(tree)
    said = "cannot read GPU number 1 through NVML: GPU is lost"
    found = look(tree, nvml=snapshot(nvidia(first, 0), errors=(said,)))
    assert by_id(found)[lost].attributes == {"nvml": "does not show this GPU"}
    assert by_id(found)[first].attributes["uuid"] == "GPU-0"
    assert said in found.warnings


def test_amd_gpus_are_found_through_kfd_with_their_links(tree: DeviceTree) -> None:
    """Two accelerators of class 12 with XGMI between them, and a CPU node that is none."""
    tree.kfd(0, None)
    for number, address in ((1, "0000:0c:00.0"), (2, "0001:22:00.0")):
        tree.pci(address, pci_class="120000", vendor="1002", device="74a1", driver="amdgpu")
        tree.drm(address, number)
        tree.kfd(number, address, xgmi=[3 - number])
    found = look(tree)
    gpu = by_id(found)["0001:22:00.0"]
    assert gpu.kind == "gpu"
    assert gpu.attributes == {
        "drm_card": "card2",
        "drm_render": "renderD130",
        "kfd_node": 2,
        "memory_bytes": 192 << 30,
        "uuid": "0000000000001234",
        "xgmi_hive": "0000:0c:00.0",
    }
    assert paths(edits(gpu)) == ["/dev/kfd", "/dev/dri/card2", "/dev/dri/renderD130"]
    assert "NVIDIA_VISIBLE_DEVICES" not in edits(gpu).env
    assert found.links == (Link(a="0000:0c:00.0", b="0001:22:00.0", type="xgmi", weight=LINK_WEIGHTS["xgmi"]),)


GIB = 1 << 30


def _partitioned(tree: DeviceTree, address: str, count: int, *, shift: int = 0, first: int = 1) -> None:
    """A GPU of `count` nodes, numbered from `first`, with render nodes from 128 + first. shift: where location_id has
    the number of a partition."""
    tree.pci(address, pci_class="120000", vendor="1002", device="74a1", driver="amdgpu", numa_node=0)
    tree.drm(address, first)
    for number in range(count):
        partition, render = number << shift, 128 + first + number
        tree.kfd(first + number, address, partition=partition, render=render, memory_bytes=24 * GIB)


@pytest.mark.parametrize("shift", [0, 28])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_the_partitions_of_an_amd_gpu_are_parts_with_their_own_render_node_and_memory(
    tree: DeviceTree, count: int, shift: int
) -> None:
    """Whether the kernel adds the number of the partition to the function or has it in the highest bits."""
    address = "0000:05:00.0"
    _partitioned(tree, address, count, shift=shift)
    found = by_id(look(tree))
    assert list(found) == [address, *(f"{address}/xcp-{number}" for number in range(count))]
    whole, *parts = found.values()
    assert whole.attributes == {
        "drm_card": "card1",
        "drm_render": "renderD129",
        "partitions": count,
        "memory_bytes": count * 24 * GIB,
        "uuid": "0000000000001234",
    }
    assert whole.paths == ("/dev/kfd", "/dev/dri/card1", *(f"/dev/dri/renderD{129 + n}" for n in range(count)))
    for number, part in enumerate(parts):
        node = f"renderD{129 + number}"
        assert (part.parent, part.numa_node, part.pci_address) == (address, 0, address)
        assert part.attributes == {"kfd_node": 1 + number, "memory_bytes": 24 * GIB, "drm_render": node}
        assert part.paths == ("/dev/kfd", f"/dev/dri/{node}")
        assert part.exclusive_parts == (f"/dev/dri/{node}",)


def test_partitions_exclude_their_whole_and_not_each_other(tree: DeviceTree) -> None:
    _partitioned(tree, "0000:05:00.0", 8)
    found = look(tree)
    inventory = Inventory(devices=found.devices)
    parts = [one.id for one in found.devices if one.parent is not None]
    assert all(inventory.excluded_by[part] == {"0000:05:00.0"} for part in parts)
    assert most_together(inventory, by_id(found)) == parts
    assert _healthy(found) == set(by_id(found))


def test_the_audio_function_of_a_gpu_is_not_taken_for_its_partition(tree: DeviceTree) -> None:
    """A second function that is a GPU, however, is one."""
    _partitioned(tree, "0000:05:00.0", 2)
    tree.pci("0000:05:00.1", pci_class="040300", vendor="1002", driver="snd_hda_intel")
    assert "0000:05:00.0/xcp-1" in by_id(look(tree))
    tree.pci("0000:06:00.0", pci_class="120000", vendor="1002", driver="amdgpu")
    tree.pci("0000:06:00.1", pci_class="120000", vendor="1002", driver="amdgpu")
    tree.kfd(8, "0000:06:00.0")
    tree.kfd(9, "0000:06:00.1")
    found = by_id(look(tree))
    assert (found["0000:06:00.0"].attributes["kfd_node"], found["0000:06:00.1"].attributes["kfd_node"]) == (8, 9)


def test_partitions_that_the_kernel_does_not_number_are_numbered_by_position(tree: DeviceTree) -> None:
    address = "0000:05:00.0"
    tree.pci(address, pci_class="120000", vendor="1002", driver="amdgpu")
    for number in (4, 5):
        tree.kfd(number, address, render=124 + number, unique_id=number)
    found = by_id(look(tree))
    assert [found[f"{address}/xcp-{n}"].attributes["kfd_node"] for n in (0, 1)] == [4, 5]
    assert [found[f"{address}/xcp-{n}"].attributes["uuid"] for n in (0, 1)] == [f"{4:016x}", f"{5:016x}"]
    assert "uuid" not in found[address].attributes


def test_a_partition_without_a_render_node_is_not_healthy(tree: DeviceTree) -> None:
    address = "0000:05:00.0"
    tree.pci(address, pci_class="120000", vendor="1002", driver="amdgpu")
    tree.drm(address, 0)
    tree.kfd(1, address, render=128)
    tree.kfd(2, address, partition=1)
    assert _healthy(look(tree)) == {address, f"{address}/xcp-0"}


def test_partitioned_gpus_have_one_link(tree: DeviceTree) -> None:
    """Links between partitions of one GPU are none."""
    a, b = "0000:05:00.0", "0000:06:00.0"
    for first, address in ((1, a), (3, b)):
        tree.pci(address, pci_class="120000", vendor="1002", driver="amdgpu")
        for number in (0, 1):
            xgmi = [one for one in range(1, 5) if one != first + number]
            tree.kfd(first + number, address, xgmi, partition=number, render=127 + first + number)
    assert look(tree).links == (Link(a=a, b=b, type="xgmi", weight=LINK_WEIGHTS["xgmi"]),)


def test_a_node_that_belongs_to_another_device_is_not_served_twice(tree: DeviceTree) -> None:
    """A configured /dev/nvidia0 is part of a GPU; /dev/nvidiactl is everyone's."""
    address = _four_gpus(tree)[0]
    tree.node("/dev/nvidia0")
    tree.node("/dev/nvidiactl")
    selector = CharSelector(name="all", globs=("/dev/nvidia0", "/dev/nvidiactl"))
    found = look(tree, char=(selector,), nvml=snapshot(nvidia(address, 0)))
    assert [device.id for device in found.devices if device.kind == "char"] == ["/dev/nvidiactl"]
    assert f"cannot serve /dev/nvidia0 as char: it is part of gpu {address}" in found.warnings


# ---------------------------------------------------------------- recorded machines


def _recorded(tmp_path: Path, name: str) -> DeviceTree:
    return DeviceTree(tables.build(tmp_path, tables.load(name, tables.TREES)))


def test_the_gpus_of_a_recorded_machine_without_the_library_are_complete(tmp_path: Path) -> None:
    found = look(_recorded(tmp_path, "nvidia-no-library"), nvml=LIBRARY_GONE)
    assert _healthy(found) == {"0000:41:00.0", "0000:42:00.0"}
    assert {paths(edits(one))[0] for one in found.devices if one.kind == "gpu"} == {"/dev/nvidia0", "/dev/nvidia1"}


def test_a_recorded_gpu_in_cpx_mode_has_eight_partitions(tmp_path: Path) -> None:
    found = look(_recorded(tmp_path, "amd-cpx"))
    parts = [one for one in found.devices if one.kind == "gpu" and one.parent is not None]
    assert {one.parent for one in parts} == {"0000:05:00.0"}
    assert [one.exclusive_parts for one in parts] == [(f"/dev/dri/renderD{128 + number}",) for number in range(8)]
    assert {one.attributes["memory_bytes"] for one in parts} == {24 * GIB}
    assert by_id(found)["0000:05:00.0"].attributes["memory_bytes"] == 192 * GIB


def test_a_partition_is_named_as_amds_plugin_names_it(tmp_path: Path) -> None:
    """By the platform device of its render node; the first one has the render node of the PCI function."""
    inventory = Inventory(devices=look(_recorded(tmp_path, "amd-cpx")).devices)
    assert devices_named(inventory, ["amdgpu_xcp.0", "amdgpu_xcp.6"]) == ("0000:05:00.0/xcp-1", "0000:05:00.0/xcp-7")
    assert devices_named(inventory, ["amdgpu_xcp.7"]) == ()
    assert "platform" not in inventory.device_by_id["0000:05:00.0/xcp-0"].attributes
