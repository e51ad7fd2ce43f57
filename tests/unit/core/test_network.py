"""Adapters as the plugins of others know them: variables named like the SR-IOV plugin's, and files for CNI plugins."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import pytest

from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.device_info import file_name, files_of, pci_info, resource_of_file
from nodeagent.core.network.variables import pci_variables, variable
from tests.builders.inventories import even_rows, inventory_of

PF, VF, OTHER = "0000:3b:00.0", "0000:3b:01.3", "0000:5e:00.0"
RESOURCE = "intel.com/dpdk_nic_1"


def adapter(id: str, *paths: str, parent: str = "", address: str = "", **attributes: str | int | bool) -> Device:
    return Device(
        kind="nic",
        id=id,
        pci_address=address or id,
        parent=parent or None,
        paths=paths,
        attributes=MappingProxyType(attributes),
    )


def info(*devices: Device, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        pci_variables(RESOURCE, devices, **options)["PCIDEVICE_INTEL_COM_DPDK_NIC_1_INFO"]
    )
    return found


@pytest.mark.parametrize(
    ("resource", "name"),
    [
        ("intel.com/sriov", "PCIDEVICE_INTEL_COM_SRIOV"),
        ("nodeagent.dev/vf", "PCIDEVICE_NODEAGENT_DEV_VF"),
        ("openshift.io/mlx-nics.a", "PCIDEVICE_OPENSHIFT_IO_MLX-NICS_A"),
    ],
)
def test_a_variable_is_named_as_the_plugin_names_it(resource: str, name: str) -> None:
    """A hyphen stays, as in its pool_stub.go, whatever its README says."""
    assert variable(resource) == name


def test_the_addresses_of_all_devices_are_in_one_variable() -> None:
    found = pci_variables("a.b/c", [adapter(OTHER), adapter(VF)])
    assert found["PCIDEVICE_A_B_C"] == f"{VF},{OTHER}"
    assert json.loads(found["PCIDEVICE_A_B_C_INFO"]) == {
        VF: {"generic": {"deviceID": VF}},
        OTHER: {"generic": {"deviceID": OTHER}},
    }


def test_a_function_under_vfio_says_its_nodes() -> None:
    found = info(adapter(VF, "/dev/vfio/vfio", "/dev/vfio/169"), vhost_net=True)
    assert found[VF] == {
        "generic": {"deviceID": VF},
        "vfio": {"dev-mount": "/dev/vfio/169", "mount": "/dev/vfio/vfio"},
        "vhost": {"net-mount": "/dev/vhost-net", "tun-mount": "/dev/net/tun"},
    }


def test_an_rdma_function_says_its_nodes_unless_the_container_does_not_get_them() -> None:
    one = adapter(VF, "/dev/infiniband/uverbs2", "/dev/infiniband/umad2", "/dev/infiniband/rdma_cm", rdma="mlx5_2,x")
    assert info(one)[VF]["rdma"] == {
        "rdma_cm": "/dev/infiniband/rdma_cm",
        "rdma_dev": "mlx5_2",
        "umad": "/dev/infiniband/umad2",
        "uverbs": "/dev/infiniband/uverbs2",
    }
    assert "rdma" not in info(one, rdma=False)[VF]


def test_what_the_configuration_adds_is_said_of_every_device_or_of_one() -> None:
    """What is said of one counts more, as in the plugin's README."""
    said = {"*": {"token": "original", "a": "1"}, VF: {"token": "specific"}}
    found = info(adapter(VF), adapter(OTHER), info=said)
    assert found[VF]["extra"] == {"a": "1", "token": "specific"}
    assert found[OTHER]["extra"] == {"a": "1", "token": "original"}


def test_a_scalable_function_goes_by_its_auxiliary_device() -> None:
    one = adapter(f"{PF}/mlx5_core.sf.4", address=PF, auxiliary="mlx5_core.sf.4")
    assert pci_variables("a.b/c", [one])["PCIDEVICE_A_B_C"] == "mlx5_core.sf.4"


def test_what_is_no_function_of_these_kinds_has_no_variable() -> None:
    gpu = Device(kind="gpu", id=VF, pci_address=VF)
    assert pci_variables("a.b/c", [gpu, Device(kind="accel", id="neuron0")]) == {}


# ---------------------------------------------------------------- device information


def machine() -> Inventory:
    owner = adapter(PF, sriov="pf", representors="eth9=pf0vf0,eth7=pf0vf3,eth8=c1pf0sf3")
    vf = adapter(VF, parent=PF, sriov="vf", vf_index=3, rdma="mlx5_2")
    part = adapter(f"{PF}/mlx5_core.sf.4", address=PF, auxiliary="mlx5_core.sf.4")
    return inventory_of(even_rows(1, 1, 1, 4, 1), devices=[owner, vf, adapter(OTHER), part])


def grant(api: str, device: str, resource: str = RESOURCE, *, ids: tuple[str, ...] = (), shared: bool = False) -> Grant:
    held = {"shares" if shared else "devices": (device,)}
    return Grant(id=f"g-{device}", holder=Holder(api=api, resource=resource), ids=ids or (device,), **held)


def test_a_file_says_what_is_known_of_the_function() -> None:
    one = machine().device_by_id[VF]
    assert pci_info(machine(), one, vhost_net=True) == {
        "type": "pci",
        "version": "1.1.0",
        "pci": {
            "pci-address": VF,
            "vhost-net": "/dev/vhost-net",
            "rdma-device": "mlx5_2",
            "pf-pci-address": PF,
            "representor-device": "eth7",
        },
    }
    assert pci_info(machine(), machine().device_by_id[OTHER])["pci"] == {"pci-address": OTHER}


def test_there_is_one_file_for_each_adapter_that_a_container_or_a_claim_holds() -> None:
    grants = [
        grant(DEVICE_PLUGIN, VF),
        grant(CLAIM, OTHER, "nic.nodeagent.dev"),
        grant(KUBELET, PF),
        grant(DEVICE_PLUGIN, f"{PF}/mlx5_core.sf.4"),
        grant(DEVICE_PLUGIN, "0000:ff:00.0"),
        grant(DEVICE_PLUGIN, PF, "a.b/not-shown"),
    ]
    found = files_of(machine(), grants, {RESOURCE: False, "a.b/claimed": False}, lambda device: "a.b/claimed")
    assert sorted(found) == [f"a.b-claimed-{OTHER}-device.json", f"intel.com-dpdk_nic_1-{VF}-device.json"]
    assert json.loads(found[file_name(RESOURCE, VF)])["pci"]["pci-address"] == VF


def test_a_share_has_a_file_by_its_own_id() -> None:
    one = grant(DEVICE_PLUGIN, VF, ids=(f"{VF}::2", f"{VF}::5", f"{OTHER}::1"), shared=True)
    found = files_of(machine(), [one], {RESOURCE: False}, lambda device: "")
    assert sorted(found) == [file_name(RESOURCE, f"{VF}::2"), file_name(RESOURCE, f"{VF}::5")]


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        (file_name("a.b/vf", VF), "a.b/vf"),
        (file_name("a.b/vf", f"{VF}::17"), "a.b/vf"),
        (file_name("a.b/vf-dpdk", VF), ""),
        (file_name("axb/vf", VF), ""),
        (f"a.b-vf-{VF}-device.json.tmp", ""),
        ("a.b-vf-mlx5_core.sf.4-device.json", ""),
    ],
)
def test_files_of_other_plugins_are_told_apart_by_their_whole_name(name: str, owner: str) -> None:
    assert resource_of_file(name, ["a.b/vf"]) == owner
