"""A configured resource: what its containers get, and what cannot be offered."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device, DeviceNode, DriverFile, DriverFiles, DriverUse, Hook, Mount
from nodeagent.core.model.grant import Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Pages
from nodeagent.errors import ConfigError, HostError
from nodeagent.host.devices.all_kinds import CharSelector, UsbSelector, builtin_kinds
from nodeagent.resources.offer import Offer, misspelt, offers, selectors
from tests.builders.inventories import even_rows, inventory_of

HOLDER = Holder(api="device-plugin", resource="nodeagent.dev/r")


def configured(**resource: Any) -> Config:
    return msgspec.convert({"resources": [{"name": "r", **resource}]}, Config)


def offer(**resource: Any) -> Offer:
    (one,) = offers(configured(**resource), builtin_kinds())
    return one


def machine(**attributes: str) -> Inventory:
    gpu = Device(kind="gpu", id="0000:01:00.0", paths=("/dev/dri/card0",), attributes=MappingProxyType(attributes))
    return inventory_of(even_rows(1, 2, 1, 4, 1), devices=[gpu])


def gpu_grant() -> Grant:
    return Grant(id="g-1", holder=HOLDER, ids=("0000:01:00.0",), devices=("0000:01:00.0",))


def test_cpus_and_pages_are_told_in_variables() -> None:
    pages = (Pages(node=0, page_bytes=2 << 20, pages=8), Pages(node=1, page_bytes=2 << 20, pages=4))
    grant = Grant(id="g-1", holder=HOLDER, cpus=CpuSet([2, 3, 5]), hugepages=pages)
    assert dict(offer(kind="cpu").edits(machine(), grant).env) == {
        "NODEAGENT_R_GRANT": "g-1",
        "NODEAGENT_CPUS": "2-3,5",
        "NODEAGENT_NUMA_NODES": "0,1",
        "NODEAGENT_HUGEPAGES_2MI": "12",
        "NODEAGENT_HUGEPAGES_2MI_NUMA_NODES": "0,1",
    }


def test_what_is_configured_comes_with_what_the_kind_needs() -> None:
    one = offer(kind="gpu", env={"A": "b"}, mounts=[{"hostPath": "/opt/gpu", "containerPath": "/gpu"}])
    edits = one.edits(machine(), gpu_grant())
    assert edits.env["A"] == "b"
    assert edits.mounts == (Mount(host_path="/opt/gpu", container_path="/gpu", read_only=True),)
    assert edits.device_nodes == (DeviceNode(host_path="/dev/dri/card0", container_path="/dev/dri/card0"),)
    assert offer(kind="gpu", deviceNodes=False).edits(machine(), gpu_grant()).device_nodes == ()


def test_a_device_is_named_for_cdi_by_a_field_or_an_attribute() -> None:
    by_id = offer(kind="gpu", cdi={"kind": "vendor.com/gpu"})
    assert by_id.edits(machine(), gpu_grant()).cdi_devices == ("vendor.com/gpu=0000:01:00.0",)
    by_uuid = offer(kind="gpu", cdi={"kind": "vendor.com/gpu", "name": "uuid"})
    assert by_uuid.edits(machine(uuid="GPU-7"), gpu_grant()).cdi_devices == ("vendor.com/gpu=GPU-7",)


def test_a_container_does_not_start_without_a_device_that_cannot_be_named() -> None:
    """The library that knows the UUID is away: nothing may be granted that the container would not get."""
    by_uuid = offer(kind="gpu", deviceNodes=False, cdi={"kind": "vendor.com/gpu", "name": "uuid"})
    with pytest.raises(HostError, match=r"cannot name 0000:01:00\.0 for CDI kind vendor\.com/gpu: it has no 'uuid'"):
        by_uuid.edits(machine(), gpu_grant())


def test_a_container_does_not_start_without_the_node_of_its_device() -> None:
    """Unless the configuration says that CDI provides everything."""
    bare = inventory_of(even_rows(1, 2, 1, 4, 1), devices=[Device(kind="gpu", id="0000:01:00.0", paths=("/dev/kfd",))])
    with pytest.raises(HostError, match=r"cannot hand over 0000:01:00\.0: it has no device node"):
        offer(kind="gpu").edits(bare, gpu_grant())
    by_cdi = offer(kind="gpu", deviceNodes=False, cdi={"kind": "vendor.com/gpu"})
    assert by_cdi.edits(bare, gpu_grant()).cdi_devices == ("vendor.com/gpu=0000:01:00.0",)


def test_what_cannot_be_offered_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"cannot serve nodeagent\.dev/r: unknown kind 'gpus', expected one of .*gpu"):
        offer(kind="gpus")
    with pytest.raises(ConfigError, match='did you mean "full-pcpus-only"'):
        offer(kind="cpu", options=["full-pcpu-only"])


def test_the_machine_is_searched_for_what_is_configured() -> None:
    assert selectors(configured(kind="char", paths=["/dev/ttyS*"])).char == (
        CharSelector(name="r", globs=("/dev/ttyS*",)),
    )
    found = selectors(configured(kind="usb", usb=[{"vendor": "046D", "product": "082d"}])).usb
    assert found == (UsbSelector(name="r", vendor="046d", product="082d"),)


# ---------------------------------------------------------------- the files of NVIDIA's driver


DRIVER = DriverFiles(
    version="580.95.05",
    root="/",
    searched=("/usr/lib64",),
    files=(
        DriverFile(host_path="/usr/lib64/libcuda.so.580.95.05", container_paths=("/usr/lib64/libcuda.so.1",)),
        DriverFile(
            host_path="/usr/lib64/libnvcuvid.so.580.95.05",
            container_paths=("/usr/lib64/libnvcuvid.so.1",),
            use=DriverUse.VIDEO,
        ),
    ),
    hook=Hook(path="/usr/bin/nvidia-cdi-hook", args=("nvidia-cdi-hook", "update-ldcache")),
)
GPU = Device(kind="gpu", id="0000:01:00.0", vendor="10de", driver="nvidia", paths=("/dev/nvidia0",))


def _gpu_edits(files: DriverFiles | None, nvidia: dict[str, str] | None = None, **resource: Any) -> Any:
    content = {"resources": [{"name": "gpu", "kind": "gpu", **resource}], "nvidia": nvidia or {}}
    (offer,) = offers(msgspec.convert(content, Config), builtin_kinds())
    machine = Inventory(devices=(GPU,), nvidia_driver=files)
    holder = Holder(api="device-plugin", resource="nodeagent.dev/gpu")
    return offer.edits(machine, Grant(id="g-1", holder=holder, ids=(GPU.id,), devices=(GPU.id,)))


def test_a_gpu_of_nvidia_comes_with_the_files_of_its_driver() -> None:
    got = _gpu_edits(DRIVER)
    assert [one.container_path for one in got.mounts] == ["/usr/lib64/libcuda.so.1"]
    assert got.env["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert got.hooks == (DRIVER.hook,)
    video = _gpu_edits(DRIVER, driverCapabilities=["video"])
    assert [one.container_path for one in video.mounts] == ["/usr/lib64/libcuda.so.1", "/usr/lib64/libnvcuvid.so.1"]


@pytest.mark.parametrize(
    "content",
    [
        {"nvidia": {"driverFiles": "off"}},
        {"cdi": {"kind": "nvidia.com/gpu"}},
        {"cdi": {"kind": "nvidia.com/gpu"}, "deviceNodes": False},
        {"deviceNodes": False},
    ],
)
def test_where_another_injector_is_configured_the_agent_adds_no_file(content: dict[str, Any]) -> None:
    got = _gpu_edits(DRIVER, **content)
    assert got.mounts == ()
    assert "NVIDIA_VISIBLE_DEVICES" not in got.env
    assert got.hooks == ()


def test_without_the_files_a_gpu_is_handed_over_only_if_they_need_not_be_injected() -> None:
    assert _gpu_edits(None).device_nodes
    with pytest.raises(HostError, match="the version of NVIDIA's driver is unknown"):
        _gpu_edits(None, {"driverFiles": "inject"})


def test_the_configured_root_is_searched_and_with_off_nothing_is() -> None:
    for nvidia, root in (({}, ""), ({"driverRoot": "/opt/driver"}, "/opt/driver"), ({"driverFiles": "off"}, None)):
        assert selectors(msgspec.convert({"nvidia": nvidia}, Config)).driver_root == root


def test_of_a_list_of_patterns_one_has_to_match_and_of_the_alternatives_one() -> None:
    def served(**keys: Any) -> list[str]:
        one = offer(kind="nic", **keys)
        made = [
            Device(kind="nic", id=id, driver=driver, attributes=MappingProxyType({"sriov": "vf", "vf_index": index}))
            for index, (id, driver) in enumerate([("a", "iavf"), ("b", "vfio-pci"), ("c", "mlx5_core")])
        ]
        resource = one.resource
        assert isinstance(resource, DeviceResource)
        return [device.id for device in made if resource.serves(device)]

    assert served(match={"driver": ["iavf", "vfio*"]}) == ["a", "b"]
    assert served(match={"driver": []}) == []
    assert served(matchAny=[{"vf_index": "0"}, {"driver": "mlx5_core", "vf_index": ["1", "2"]}]) == ["a", "c"]
    assert served(match={"sriov": "vf"}, matchAny=[{"id": "b"}]) == ["b"]
    assert served(match={"sriov": "pf"}, matchAny=[{"id": "b"}]) == []


def test_a_device_that_is_withheld_is_served_where_an_alternative_names_why() -> None:
    resource = offer(kind="nic", matchAny=[{"default_route": "true"}]).resource
    assert isinstance(resource, DeviceResource)
    assert resource.serves(Device(kind="nic", id="a", attributes=MappingProxyType({"default_route": True})))


def test_a_pattern_for_devices_without_an_attribute_is_not_taken_for_misspelt() -> None:
    there = inventory_of(even_rows(1, 2, 1, 4, 1), devices=[Device(kind="nic", id="a")])
    notes = list(misspelt([offer(kind="nic", match={"sriov_numvfs": ["", "0"]}, matchAny=[{"odd": "x"}])], there))
    assert notes == ["nodeagent.dev/r: match names 'odd', which no nic of this machine has"]
