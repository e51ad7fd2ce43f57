"""MIG as devices: what others made, and what could be made of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.ledger.exclusion import excluded_with
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import from_document, to_document
from nodeagent.errors import HostError
from nodeagent.host.devices.all_kinds import PartitionSelector
from nodeagent.host.nvml.mig_devices import capabilities, capability_table, with_instance
from nodeagent.host.nvml.values import GpuInstance, Mig, NvGpu, Snapshot
from nodeagent.host.sysfs.lenient import Tolerant
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.resources.offer import _refuse_unmade
from tests.builders.devices import DeviceTree
from tests.support.looking import by_id, look
from tests.support.mig_driver import NVIDIA_GPU, profiles_of

ADDRESS, UUID = "0000:1b:00.0", "GPU-0"
DYNAMIC = PartitionSelector()
H100 = profiles_of("h100-80")


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    made = DeviceTree(tmp_path)
    made.pci(ADDRESS, **NVIDIA_GPU)  # type: ignore[arg-type]
    made.write("proc/driver/nvidia-caps/mig-minors", "gpu0/gi2/access 57\ngpu0/gi2/ci0/access 58")
    return made


def gpu(*instances: GpuInstance, migs: tuple[Mig, ...] = (), **options: object) -> Snapshot:
    facts = {"mig_enabled": True, "profiles": H100, "instances": instances, "migs": migs, **options}
    one = NvGpu(pci_address=ADDRESS, uuid=UUID, name="NVIDIA H100", minor=0, memory_bytes=80 << 30, **facts)  # type: ignore[arg-type]
    return Snapshot(driver_version="580.95", gpus=(one,))


def mig(gi: int, profile: str = "3g.40gb") -> Mig:
    return Mig(uuid=f"MIG-{gi}", profile=profile, memory_bytes=40 << 30, gpu_instance=gi, compute_instance=0)


def parts(tree: DeviceTree, nvml: Snapshot, selector: PartitionSelector | None = DYNAMIC) -> dict[str, Device]:
    """What is below the GPU, by the end of its id."""
    found = by_id(look(tree, nvml=nvml, partitions=selector))
    return {id.removeprefix(f"{ADDRESS}/"): one for id, one in found.items() if one.parent == ADDRESS}


def test_every_profile_at_every_placement_is_a_device_that_need_not_exist(tree: DeviceTree) -> None:
    found = parts(tree, gpu())
    assert len(found) == sum(len(one.starts) for one in H100) == 25
    one = found["mig-3g.40gb-4"]
    assert one.exclusive == tuple(f"mig-memory:{ADDRESS}/{slice}" for slice in (4, 5, 6, 7))
    assert one.attributes == {
        "parent_uuid": UUID,
        "product": "NVIDIA H100",
        "driver_version": "580.95",
        "mig_profile": "3g.40gb",
        "memory_bytes": 40448 << 20,
        "multiprocessors": 60,
    }
    assert one.partition is not None
    assert (one.partition.profile, one.partition.start, one.partition.size) == (9, 4, 4)
    assert not one.lacks_node


def test_nothing_can_be_made_where_it_is_not_configured_or_the_gpu_is_not_in_mig_mode(tree: DeviceTree) -> None:
    assert parts(tree, gpu(), None) == {}
    assert parts(tree, gpu(mig_enabled=False)) == {}


def test_where_instances_cannot_be_listed_nothing_is_known_to_be_free(tree: DeviceTree) -> None:
    assert parts(tree, replace(gpu(), gpus=(replace(gpu().gpus[0], instances=None),))) == {}


def test_an_instance_of_somebody_else_keeps_its_form_and_nothing_can_be_made_where_it_lies(tree: DeviceTree) -> None:
    """Whether it has a compute instance or not."""
    lying = GpuInstance(id=2, profile=9, start=4, size=4)
    found = parts(tree, gpu(lying, migs=(mig(2),)))
    assert found["mig-2-0"].paths[-2:] == ("/dev/nvidia-caps/nvidia-cap57", "/dev/nvidia-caps/nvidia-cap58")
    assert {one for one in found if one.endswith(("-4", "-5", "-6"))} == set()
    assert "mig-7g.80gb-0" not in found
    assert "mig-4g.40gb-0" in found
    bare = parts(tree, gpu(lying))
    assert bare.keys() == found.keys() - {"mig-2-0"}


def test_a_media_engine_that_somebody_else_has_cannot_be_had(tree: DeviceTree) -> None:
    found = parts(tree, gpu(GpuInstance(id=7, profile=20, start=0, size=1)))
    assert not [one for one in found if "+me" in one]
    assert "mig-1g.10gb-1" in found


def test_an_instance_of_our_own_is_that_of_its_place(tree: DeviceTree) -> None:
    """The devices are the same whether it exists or not, so nothing is published again when it is made."""
    made = gpu(GpuInstance(id=2, profile=9, start=4, size=4), migs=(mig(2),))
    assert parts(tree, made, PartitionSelector(own=frozenset({(UUID, 9, 4)}))) == parts(tree, gpu())


def test_a_static_resource_serves_no_possible_instance_and_a_dynamic_one_nothing_else(tree: DeviceTree) -> None:
    lying = GpuInstance(id=2, profile=9, start=4, size=4)
    inventory = Inventory(devices=look(tree, nvml=gpu(lying, migs=(mig(2),)), partitions=DYNAMIC).devices)
    match = {"mig_profile": "3g.40gb"}
    static = DeviceResource(name="r/static", kind="gpu", match=match).devices(inventory)
    dynamic = DeviceResource(name="r/dynamic", kind="gpu", match=match, partitions=True).devices(inventory)
    assert [one.id for one in static] == [f"{ADDRESS}/mig-2-0"]
    assert [one.id for one in dynamic] == [f"{ADDRESS}/mig-3g.40gb-0"]


def test_the_whole_gpu_and_overlapping_parts_exclude_each_other_by_the_rule_for_all_devices(tree: DeviceTree) -> None:
    inventory = Inventory(devices=look(tree, nvml=gpu(), partitions=DYNAMIC).devices)
    excluded = excluded_with(inventory, Ledger(), [f"{ADDRESS}/mig-3g.40gb-4"])
    assert {ADDRESS, f"{ADDRESS}/mig-1g.10gb-6", f"{ADDRESS}/mig-7g.80gb-0"} <= excluded
    assert f"{ADDRESS}/mig-4g.40gb-0" not in excluded


def test_a_made_instance_has_the_nodes_of_its_gpu_and_its_capabilities(tree: DeviceTree) -> None:
    one = parts(tree, gpu())["mig-3g.40gb-4"]
    nodes = capabilities(capability_table(Tolerant(SysFs(str(tree.root)))), 0, 2, 0)
    made = with_instance(one, "MIG-2", nodes)
    assert made.paths == (*one.paths, "/dev/nvidia-caps/nvidia-cap57", "/dev/nvidia-caps/nvidia-cap58")
    assert made.partition is not None and made.partition.made
    assert (made.attributes["uuid"], made.id) == ("MIG-2", one.id)
    assert with_instance(one, "MIG-2", ()).lacks_node


def test_possible_instances_survive_the_documented_form_of_an_inventory(tree: DeviceTree) -> None:
    """As in a capture, which a replay places requests on."""
    document = json.dumps(to_document(Inventory(devices=look(tree, nvml=gpu(), partitions=DYNAMIC).devices)))
    found = {one.id: one for one in from_document(document, source="here").devices}
    one, known = found[f"{ADDRESS}/mig-3g.40gb-4"], parts(tree, gpu())["mig-3g.40gb-4"]
    assert one.partition is not None and known.partition is not None
    assert (one.partition.start, dict(one.partition.draws)) == (4, dict(known.partition.draws))
    assert one.exclusive == known.exclusive


def test_an_instance_that_does_not_exist_is_not_handed_over(tree: DeviceTree) -> None:
    with pytest.raises(HostError, match=r"mig-3g.40gb-4: its instance does not exist at this moment"):
        _refuse_unmade([parts(tree, gpu())["mig-3g.40gb-4"]])
