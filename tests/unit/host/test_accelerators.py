"""Intel's work queues and enclaves on synthetic trees: what is found, as what, how ill it is, what a container gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.core.deviceplugin.allocate import allocate
from nodeagent.core.deviceplugin.devices import SHARES, DeviceResource, illness
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.prepare import Catalog, prepare
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence, observe
from nodeagent.core.model.inventory import ABSENT, PRESENT, Inventory
from nodeagent.core.sharing.amounts import MEMORY
from nodeagent.errors import Refused
from nodeagent.host.devices import all_kinds
from nodeagent.host.health.kinds import KindHealth
from nodeagent.host.health.source import Sight, looked
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.resources.offer import held_variables
from tests.builders.devices import DeviceTree
from tests.builders.machines import machine
from tests.builders.pools import DRIVER, NOBODY, NODE, amounts, claim, pool_of, result, shown, stamp, wrong_with
from tests.support.looking import by_id, edits, look, paths, state

DSA, IAX = "0000:6a:01.0", "0000:6a:02.0"
PF, VF, KERNEL_VF = "0000:6b:00.0", "0000:6b:00.1", "0000:6b:00.2"
MIB = 1 << 20


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(machine(tmp_path / "root", "1s2n4c"))


def accelerator(tree: DeviceTree, address: str, name: str, **files: object) -> None:
    """A DSA or IAA device without queues."""
    tree.pci(address, pci_class="088000", driver="idxd", numa_node=1)
    folder = tree.folders[address] / name
    for file, value in {"state": "enabled", "max_work_queues": 8, **files}.items():
        tree.write(f"{folder.relative_to(tree.root)}/{file}", value)
    tree.link(f"sys/bus/dsa/devices/{name}", folder)
    for other in ("engine0.0", "group0.0"):
        (folder / other).mkdir()
        tree.link(f"sys/bus/dsa/devices/{name}-{other}", folder / other)


def sight(tree: DeviceTree, id: str) -> Sight:
    """What the kind of a device says of its health."""
    kinds, sysfs = all_kinds.builtin_kinds(), SysFs(tree.root)
    found = all_kinds.discover(sysfs, kinds, all_kinds.read_context(sysfs))
    seen = looked(KindHealth(kinds), sysfs, by_id(found)[id])
    assert isinstance(seen, Sight)
    return seen


# ---------------------------------------------------------------- DSA and IAA


def test_each_queue_for_user_space_is_a_device_with_its_place_and_its_settings(tree: DeviceTree) -> None:
    """Named by its accelerator's address: numbers of accelerators depend on the order in which they are found."""
    accelerator(tree, DSA, "dsa0")
    accelerator(tree, IAX, "iax1")
    tree.queue(DSA, "dsa0", 1, mode="dedicated", threshold=0)
    tree.queue(DSA, "dsa0", 2, type="kernel")
    tree.queue(DSA, "dsa0", 3, type="none", state="disabled", node=False)
    tree.queue(IAX, "iax1", 0, group_id=-1, name="")
    found = look(tree)
    queues = {one.id: one for one in found.devices if one.kind == "dsa"}
    assert queues.keys() == {f"{DSA}/wq-1", f"{IAX}/wq-0"}
    one, other = queues[f"{DSA}/wq-1"], queues[f"{IAX}/wq-0"]
    assert (one.parent, one.numa_node, one.paths) == (DSA, 1, ("/dev/dsa/wq0.1",))
    assert one.attributes == {
        "name": "wq0.1",
        "accelerator": "dsa0",
        "device_type": "dsa",
        "mode": "dedicated",
        "label": "app",
        "driver_name": "user",
        "size": 16,
        "priority": 10,
        "group_id": 0,
        "threshold": 0,
        "max_batch_size": 32,
        "max_transfer_size": 2 << 20,
    }
    assert (other.paths, other.attributes["device_type"], other.attributes["group_id"]) == (
        ("/dev/iax/wq1.0",),
        "iaa",
        -1,
    )
    assert "label" not in other.attributes
    assert found.warnings == ()
    assert state(found, "dsa").state == PRESENT
    given = edits(one, other)
    assert paths(given) == ["/dev/dsa/wq0.1", "/dev/iax/wq1.0"]
    assert given.env == {"NODEAGENT_DSA_QUEUES": "/dev/dsa/wq0.1,/dev/iax/wq1.0"}


def test_without_queues_for_user_space_the_kind_says_so(tree: DeviceTree) -> None:
    accelerator(tree, DSA, "dsa0")
    assert state(look(tree), "dsa").state == ABSENT


@pytest.mark.parametrize(
    ("queue", "whole", "seen"),
    [
        ("enabled", "enabled", Sight(HEALTHY)),
        ("disabled", "enabled", Sight(UNHEALTHY, "work queue wq0.1 is disabled")),
        ("enabled", "halted", Sight(UNHEALTHY, "accelerator dsa0 is halted")),
        ("disabled", "disabled", Sight(UNHEALTHY, "accelerator dsa0 is disabled")),
        (None, "enabled", Sight(UNKNOWN, "the kernel shows no state of work queue wq0.1")),
    ],
)
def test_a_queue_is_healthy_while_it_and_its_accelerator_are_enabled(
    tree: DeviceTree, queue: str | None, whole: str, seen: Sight
) -> None:
    accelerator(tree, DSA, "dsa0", state=whole)
    folder = tree.queue(DSA, "dsa0", 1, state=queue)
    if queue is None:
        (folder / "state").unlink()
    assert sight(tree, f"{DSA}/wq-1") == seen


def test_a_queue_without_a_node_is_unknown(tree: DeviceTree) -> None:
    accelerator(tree, DSA, "dsa0")
    tree.queue(DSA, "dsa0", 1, node=False)
    ill = illness(by_id(look(tree))[f"{DSA}/wq-1"], {})
    assert ill is not None and ill.state == UNKNOWN


def test_a_queue_and_its_whole_accelerator_are_never_held_at_the_same_time(tree: DeviceTree) -> None:
    """Over both APIs, and by the counters that the scheduler sees."""
    accelerator(tree, DSA, "dsa0")
    for number in (0, 1):
        tree.queue(DSA, "dsa0", number)
    found = scan(SysFs(tree.root), all_kinds.builtin_kinds())
    queues, wholes = DeviceResource(name="d/dsa", kind="dsa"), DeviceResource(name="d/accel", kind="accel")
    ledger = allocate(found, NOBODY, wholes, [[DSA]], stamp()).ledger
    with pytest.raises(Refused, match=DSA):
        allocate(found, ledger, queues, [[f"{DSA}/wq-0"]], stamp())
    ledger = allocate(found, NOBODY, queues, [[f"{DSA}/wq-0"]], stamp()).ledger
    assert {one.id: one.healthy for one in queues.advertised(found, ledger, {})} == {
        f"{DSA}/wq-0": True,
        f"{DSA}/wq-1": True,
    }
    assert [one.healthy for one in wholes.advertised(found, ledger, {})] == [False]
    kind = DevicePool(kind="dsa", resources=(queues,))
    assert set(shown(pool_of(kind, found))) == {"0000-6a-01-0-wq-0", "0000-6a-01-0-wq-1"}
    assert wrong_with(kind, found) == []


# ---------------------------------------------------------------- QAT


def qat(tree: DeviceTree, services: str = "sym;asym", power: str = "up") -> None:
    """A physical function with two virtual ones, one of them for vfio."""
    files = {"qat/cfg_services": services, "qat/state": power}
    tree.pci(PF, pci_class="0b4000", device="4940", driver="4xxx", numa_node=1, files=files)
    for index, (address, driver) in enumerate(((VF, "vfio-pci"), (KERNEL_VF, "4xxxvf"))):
        folder = tree.vf(PF, index, address, driver=driver, group=40 + index)
        (folder / "device").write_text("0x4941\n")
        (folder / "class").write_text("0x0b4000\n")
        tree.link(f"sys/kernel/iommu_groups/{40 + index}/devices/{address}", folder)


def test_functions_of_qat_have_the_services_of_their_physical_function_in_a_fixed_order(tree: DeviceTree) -> None:
    """Known by their ids, also under vfio; one with QAT's own driver is the kernel's, without a node."""
    qat(tree)
    found = {one.id: one for one in look(tree).devices if one.kind == "qat"}
    assert found.keys() == {PF, VF, KERNEL_VF}
    assert {one.attributes["services"] for one in found.values()} == {"asym;sym"}
    assert {one.attributes["generation"] for one in found.values()} == {"4xxx"}
    assert (found[VF].parent, found[VF].attributes["sriov"]) == (PF, "vf")
    assert paths(edits(found[VF])) == ["/dev/vfio/vfio", "/dev/vfio/40"]
    assert found[KERNEL_VF].lacks_node


def test_an_old_generation_does_not_tell_its_services_and_another_accelerator_is_no_qat(tree: DeviceTree) -> None:
    tree.pci(PF, pci_class="0b4000", device="37c8", driver="c6xx")
    tree.pci(VF, pci_class="0b4000", vendor="177d", device="a0f2")
    found = by_id(look(tree))
    assert (found[PF].kind, found[PF].attributes) == ("qat", {"generation": "c62x"})
    assert found[VF].kind == "accel"


def test_a_device_that_is_down_is_unhealthy_with_its_virtual_functions(tree: DeviceTree) -> None:
    qat(tree, power="down")
    assert sight(tree, PF) == Sight(UNHEALTHY, "the device is down")
    found = scan(SysFs(tree.root), all_kinds.builtin_kinds())
    said = Evidence(device=PF, source="kind", state=UNHEALTHY, reason="the device is down")
    ill = illness(found.device_by_id[VF], observe({}, [said], 0.0))
    assert ill is not None and ill.reason == "the device is down"
    resource = DeviceResource(name="d/qat", kind="qat", match={"sriov": "vf"})
    assert [one.healthy for one in resource.advertised(found, NOBODY, observe({}, [said], 0.0))] == [False, False]


# ---------------------------------------------------------------- SGX


def enclaves(tree: DeviceTree) -> list[Device]:
    return [one for one in look(tree).devices if one.kind == "sgx"]


def test_enclave_memory_is_a_device_for_each_numa_node_and_provisioning_one_of_its_own(tree: DeviceTree) -> None:
    tree.sgx({0: 512 * MIB, 1: 0})
    one, provision = enclaves(tree)
    assert (one.id, one.numa_node, one.attributes) == ("sgx-0", 0, {"memory_bytes": 512 * MIB, "provision": False})
    assert paths(edits(one)) == ["/dev/sgx_enclave"]
    assert (provision.id, provision.attributes) == ("sgx-provision", {"provision": True})
    assert paths(edits(provision)) == ["/dev/sgx_provision"]
    assert not one.lacks_node


def test_an_old_kernel_and_a_machine_without_sgx(tree: DeviceTree) -> None:
    assert enclaves(tree) == []
    assert state(look(tree), "sgx").state == ABSENT
    tree.sgx({}, provision=False)
    assert [(one.id, one.attributes) for one in enclaves(tree)] == [("sgx", {"provision": False})]


def with_enclaves(tree: DeviceTree) -> Inventory:
    tree.sgx({0: 512 * MIB, 1: 256 * MIB})
    return scan(SysFs(tree.root), all_kinds.builtin_kinds())


RESOURCE = DeviceResource(name="d/enclave", kind="sgx", match={"provision": "false"}, replicas=8)
KIND = DevicePool(kind="sgx", resources=(RESOURCE,))


def test_enclave_memory_is_a_consumable_capacity_that_is_never_exceeded_over_both_apis(tree: DeviceTree) -> None:
    """All nodes go through the same node in /dev, which excludes no other holder."""
    found = with_enclaves(tree)
    pool = pool_of(KIND, found)
    assert amounts(pool, MEMORY) == {"sgx-0": 512 * MIB, "sgx-1": 256 * MIB}
    assert amounts(pool, SHARES) == {"sgx-0": 8, "sgx-1": 8}
    assert wrong_with(KIND, found) == []
    held = allocate(found, NOBODY, RESOURCE, [["sgx-0::0"], ["sgx-1::0"]], stamp())
    assert held_variables(found, held.grants[:1]) == {
        "NODEAGENT_DEVICE_MEMORY_BYTES": str(64 * MIB),
        "NODEAGENT_DEVICE_LIMITS": "advisory",
    }
    catalog = Catalog(driver=DRIVER, node_name=NODE, kinds={"sgx": KIND})
    large = claim("large", result("sgx", "sgx-0", share="s", shares=1, memory=449 * MIB))
    (why,) = prepare(found, held.ledger, catalog, [large], stamp()).errors.values()
    assert f"cannot grant {449 * MIB} bytes of the memory of sgx-0: {448 * MIB} are left" in why
    fits = claim("fits", result("sgx", "sgx-0", share="s", shares=1, memory=448 * MIB))
    (grant,) = prepare(found, held.ledger, catalog, [fits], stamp()).grants["uid-fits"]
    assert grant.amounts == (("sgx-0", MEMORY, 448 * MIB),)
