"""Which claims may have properties set of their virtual functions, and what is known of them."""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from nodeagent.config.network import NetworkConfig
from nodeagent.core.dra.interfaces import network_data, vf_of
from nodeagent.core.model.claim import FROM_CLAIM, Opaque, Result
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.interface import Interface
from nodeagent.core.network.vf_checks import Property, VfPlace, check_vf, place_of, said_of, text_of, value_of
from nodeagent.core.network.vf_properties import VfProperties
from nodeagent.core.opaque.decode import API_VERSION, settings_for
from nodeagent.core.opaque.settings import OpaqueConfig, from_json, to_json
from nodeagent.errors import InputError

PF, VF = "0000:3b:00.0", "0000:3b:02.3"
ASKED = VfProperties(vlan=100, trust=True)


def nic(id: str, parent: str | None = None, **attributes: Any) -> Device:
    return Device(kind="nic", id=id, pci_address=id, parent=parent, attributes=MappingProxyType(attributes))


def inventory(*, netdevs: str = "ens1f0", **attributes: Any) -> Inventory:
    """A physical function with one virtual one."""
    vf = {"sriov": "vf", "vf_index": 3, "netdevs": "ens1f0v3", "mac": "02:00:00:00:00:07", **attributes}
    return Inventory(devices=(nic(PF, sriov="pf", netdevs=netdevs), nic(VF, PF, **vf)))


def why(found: Inventory, *, id: str = VF, allowed: Collection[str] = frozenset(Property), shared: bool = False) -> str:
    try:
        check_vf(found, id, ASKED, allowed, shared=shared)
    except InputError as error:
        return str(error)
    return ""


def test_a_virtual_function_with_a_known_place_can_be_set() -> None:
    assert why(inventory()) == ""
    assert place_of(inventory(), VF) == VfPlace(pf=PF, interface="ens1f0", index=3)
    assert why(inventory(netdevs="ens1f0", driver="vfio-pci")) == "", "whatever driver it has"


def test_what_forbids_it_is_named() -> None:
    assert why(inventory(), allowed={"mac", "vlan"}) == ("vf: network.vfProperties of this node does not allow trust")
    assert "does not allow vlan, trust" in why(inventory(), allowed=())
    assert f"vf: {VF} is shared" in why(inventory(), shared=True)
    assert f"vf: {PF} is no virtual function" in why(inventory(), id=PF)
    assert "vf: 0000:3b:02.9 is no virtual function" in why(inventory(), id="0000:3b:02.9")
    assert "not known which virtual function" in why(inventory(vf_index=None))
    alone = Inventory(devices=(nic(VF, PF, sriov="vf", vf_index=3),))
    assert "not known which virtual function" in why(alone)
    assert f"{PF}, the physical function of {VF}, has 0 interfaces (none)" in why(inventory(netdevs=""))
    assert "has 2 interfaces (ens1, ens1d1)" in why(inventory(netdevs="ens1,ens1d1"))


def test_what_a_node_can_allow_is_what_can_be_set() -> None:
    (names,) = get_args(get_type_hints(NetworkConfig, include_extras=True)["vf_properties"])
    assert set(get_args(names)) == {*Property}


def settings(**said: Any) -> OpaqueConfig:
    parameters = {"apiVersion": API_VERSION, "kind": "NicConfig", **said}
    opaque = Opaque(source=FROM_CLAIM, driver="d", requests=(), parameters=parameters)
    return settings_for(Result(request="r", driver="d", pool="node/nic", device="x"), "nic", (opaque,), "d")


def test_what_a_claim_says_is_what_is_kept() -> None:
    said = {"mac": "02:00:00:00:00:0A", "vlan": 5, "vlanQoS": 1, "maxTxRateMbps": 100, "spoofCheck": False}
    found = settings(vf=said)
    wanted = VfProperties(mac="02:00:00:00:00:0a", vlan=5, vlan_qos=1, max_tx_rate_mbps=100, spoof_check=False)
    assert found.vf == wanted
    assert said_of(wanted) == (Property.MAC, Property.VLAN, Property.TX_RATE, Property.SPOOF_CHECK)
    assert from_json(to_json(found)) == found
    assert settings(vf={}).vf == VfProperties()
    assert settings().vf is None


def test_what_belongs_together_is_set_together() -> None:
    """A minimum without a maximum has no limit; no VLAN is the same with every priority."""
    assert settings(vf={"minTxRateMbps": 5}).vf == VfProperties(min_tx_rate_mbps=5, max_tx_rate_mbps=0)
    none, also_none = VfProperties(vlan=0), VfProperties(vlan=0, vlan_qos=3, vlan_protocol="802.1ad")
    assert value_of(none, Property.VLAN) == value_of(also_none, Property.VLAN) == (0,)
    assert value_of(VfProperties(), Property.VLAN) == ()


def test_an_interface_in_a_pod_has_the_address_that_its_physical_function_gives_it() -> None:
    found = settings(vf={"mac": "02:00:00:00:00:0A"}, interface={"name": "net1"})
    assert found.interface == Interface(name="net1", hardware_address="02:00:00:00:00:0a")
    assert settings(vf={"vlan": 5}, interface={}).interface == Interface()


def grant(settings: str, *, api: str = CLAIM, devices: tuple[str, ...] = (VF,)) -> Grant:
    return Grant(id="g", holder=Holder(api=api), devices=devices, settings=settings)


def test_a_grant_asks_for_it_if_its_claim_holds_a_device() -> None:
    text = to_json(OpaqueConfig(vf=ASKED))
    assert vf_of(grant(text)) == ASKED
    for other in (grant(""), grant(text, api=DEVICE_PLUGIN), grant(text, devices=())):
        assert vf_of(other) is None
    assert vf_of(grant('{"vf": {"vlan": 5}, "later": 1}')) is None, "a newer build wrote it"


def test_the_status_has_the_address_that_the_claim_gave() -> None:
    said = grant(to_json(OpaqueConfig(vf=VfProperties(mac="02:00:00:00:00:99"))))
    assert network_data(inventory(), said) == {"interfaceName": "ens1f0v3", "hardwareAddress": "02:00:00:00:00:99"}
    assert network_data(inventory(), grant(to_json(OpaqueConfig(vf=ASKED))))["hardwareAddress"] == "02:00:00:00:00:07"


@pytest.mark.parametrize(
    ("said", "which", "words"),
    [
        (ASKED, Property.VLAN, "VLAN 100"),
        (VfProperties(vlan=0), Property.VLAN, "VLAN 0"),
        (VfProperties(vlan=5, vlan_protocol="802.1ad"), Property.VLAN, "VLAN 5 (802.1ad)"),
        (VfProperties(max_tx_rate_mbps=0), Property.TX_RATE, "transmit rate 0 to any Mbit/s"),
        (VfProperties(spoof_check=False), Property.SPOOF_CHECK, "spoof checking off"),
        (VfProperties(link_state="auto"), Property.LINK_STATE, "link state auto"),
        (VfProperties(), Property.TRUST, "trust"),
    ],
)
def test_each_property_has_words(said: VfProperties, which: Property, words: str) -> None:
    assert text_of(said, which) == words


def test_what_is_empty_is_not_written() -> None:
    assert msgspec.json.encode(VfProperties(vlan=5)) == b'{"vlan":5}'
