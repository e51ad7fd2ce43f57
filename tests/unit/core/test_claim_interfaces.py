"""Which claims may have an interface in their pods, and what their status says of it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from nodeagent.core.dra.interfaces import check_interface, check_names, interface_of, network_data, rdma_of
from nodeagent.core.model.claim import Claim, ClaimRef
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.interface import Interface
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig, to_json
from nodeagent.errors import InputError

ID = "0000:5e:00.1"
ASKED = OpaqueConfig(interface=Interface(name="net1", addresses=("10.0.0.5/24",)))
CLAIM_OF_A_POD = Claim(ref=ClaimRef(namespace="default", name="c", uid="u"), reserved_for=("pod",))


def inventory(**attributes: Any) -> Inventory:
    said = MappingProxyType({"netdevs": "ens7", "mac": "02:00:00:00:00:07", **attributes})
    return Inventory(devices=(Device(kind="nic", id=ID, pci_address=ID, attributes=said),))


def why(
    found: Inventory,
    settings: OpaqueConfig = ASKED,
    *,
    claim: Claim = CLAIM_OF_A_POD,
    id: str = ID,
    allowed: bool = True,
    shared: bool = False,
) -> str:
    try:
        check_interface(found, claim, id, settings, allowed=allowed, shared=shared)
    except InputError as error:
        return str(error)
    return ""


def test_a_whole_adapter_with_one_interface_can_be_had_in_the_pod() -> None:
    assert why(inventory()) == ""
    assert why(inventory(netdevs=""), NO_SETTINGS, allowed=False, shared=True) == ""


def test_what_forbids_it_is_named() -> None:
    assert "network.moveInterfaces of this node does not allow it" in why(inventory(), allowed=False)
    assert f"{ID} is no whole adapter" in why(inventory(), shared=True)
    assert "no whole adapter" in why(inventory(), id="0000:5e:00.9")
    assert "has 0 interfaces on the host (none), expected one" in why(inventory(netdevs=""))
    assert "has 2 interfaces on the host (ens7, ens8), expected one" in why(inventory(netdevs="ens7,ens8"))
    assert "a default route of the node leads through ens7" in why(inventory(default_route=True))
    group = Claim(ref=CLAIM_OF_A_POD.ref, reserved_for=("g",), groups=("g",))
    assert "reserved for a group" in why(inventory(), claim=group)


def test_one_claim_has_no_two_interfaces_of_one_name() -> None:
    other = OpaqueConfig(interface=Interface(name="net2"))
    check_names([ASKED, other, NO_SETTINGS, OpaqueConfig(interface=Interface()), OpaqueConfig(interface=Interface())])
    with pytest.raises(InputError, match="2 interfaces of the claim would be called net1 in the pod"):
        check_names([ASKED, other, ASKED])


def grant(settings: str, *, api: str = CLAIM, devices: tuple[str, ...] = (ID,)) -> Grant:
    return Grant(id="g", holder=Holder(api=api), devices=devices, settings=settings)


def test_a_grant_asks_for_one_if_its_claim_holds_a_device_and_says_so() -> None:
    assert interface_of(grant(to_json(ASKED))) == ASKED.interface
    for other in (grant(""), grant(to_json(ASKED), api=DEVICE_PLUGIN), grant(to_json(ASKED), devices=())):
        assert interface_of(other) is None
    assert interface_of(grant('{"interface": {"name": "net1"}, "later": 1}')) is None, "a newer build wrote it"
    assert interface_of(grant('{"env":{"interface":"x"}}')) is None


def test_rdma_devices_go_along_unless_the_claim_wants_none() -> None:
    (device,) = inventory(rdma="mlx5_7,mlx5_8").devices
    (plain,) = inventory().devices
    assert rdma_of(grant(to_json(ASKED)), device) == ("mlx5_7", "mlx5_8")
    assert rdma_of(grant(to_json(OpaqueConfig(interface=Interface(), rdma=True))), device) == ("mlx5_7", "mlx5_8")
    assert rdma_of(grant(to_json(OpaqueConfig(interface=Interface(), rdma=False))), device) == ()
    assert rdma_of(grant(to_json(OpaqueConfig(rdma=True))), device) == ()
    assert rdma_of(grant(to_json(ASKED)), plain) == ()


def test_the_status_says_what_is_in_the_pod_and_otherwise_what_was_on_the_host() -> None:
    assert network_data(inventory(), grant(to_json(ASKED))) == {
        "interfaceName": "net1",
        "ips": ["10.0.0.5/24"],
        "hardwareAddress": "02:00:00:00:00:07",
    }
    host = {"interfaceName": "ens7", "hardwareAddress": "02:00:00:00:00:07"}
    assert network_data(inventory(), grant("")) == host
    assert network_data(inventory(netdevs=""), grant("")) == {}
    own = OpaqueConfig(interface=Interface(hardware_address="02:00:00:00:00:99"))
    assert network_data(inventory(), grant(to_json(own))) == {**host, "hardwareAddress": "02:00:00:00:00:99"}
