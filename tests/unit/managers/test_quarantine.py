"""Devices that the configuration keeps from being granted."""

from __future__ import annotations

from fnmatch import fnmatchcase
from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, NO_HEALTH, UNHEALTHY, Evidence, observe, withdraw
from nodeagent.managers.inventory.quarantine import SOURCE, notes, quarantined
from tests.builders.inventories import even_rows, inventory_of

UUID = MappingProxyType({"uuid": "GPU-8a56-1", "serial": "S1"})
GPU = Device(kind="gpu", id="0000:41:00.0", pci_address="0000:41:00.0", vendor="10de", attributes=UUID)
MIG = replace(GPU, id="0000:41:00.0/mig-2-0", parent=GPU.id, attributes=MappingProxyType({"uuid": "MIG-1"}))
NIC = Device(kind="nic", id="0000:3b:00.0", pci_address="0000:3b:00.0")
INVENTORY = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[GPU, MIG, NIC])


def out(*patterns: str) -> set[str]:
    return {one.device for one in quarantined(INVENTORY, patterns, NO_HEALTH)[0]}


def test_a_device_is_known_by_its_id_address_uuid_and_serial_number() -> None:
    assert out("0000:3b:00.0") == {NIC.id}
    assert out("GPU-8a56*") == {GPU.id} == out("S1")
    assert out("MIG-1") == {MIG.id}
    assert out() == out("nothing") == set()


def test_the_reason_names_the_pattern_and_the_device_is_unhealthy() -> None:
    ((one,), _, _) = quarantined(INVENTORY, ["0000:3b:*"], NO_HEALTH)
    assert (one.state, one.reason, one.latched) == (UNHEALTHY, "quarantined by the configuration (0000:3b:*)", False)


def test_a_pattern_that_matches_nothing_is_said() -> None:
    *_, unused = quarantined(INVENTORY, ["0000:3b:00.0", "GPU-9*"], NO_HEALTH)
    assert notes(unused) == ["health.quarantine: no device here has the id, PCI address, UUID or serial number GPU-9*"]


def test_what_is_taken_out_of_the_list_recovers_when_the_rest_has_been_good_for_long_enough() -> None:
    evidence, *_ = quarantined(INVENTORY, [NIC.id], NO_HEALTH)
    health = observe(NO_HEALTH, [*evidence, Evidence(device=NIC.id, source="carrier", state=HEALTHY)], 0.0)
    _, freed, _ = quarantined(INVENTORY, [], health)
    assert freed == [(NIC.id, SOURCE)]
    waiting = withdraw(health, freed, 1.0, 30.0)
    assert waiting[NIC.id].state == UNHEALTHY and SOURCE not in waiting[NIC.id].seen
    assert quarantined(INVENTORY, [], waiting)[1] == []


@given(st.lists(st.sampled_from(["0000:*", "*", "GPU-?a56-1", "[S]1", "0000:41:00.0*", "MIG-[!2]", "x"]), max_size=4))
def test_exactly_what_a_pattern_matches_is_kept_out(patterns: list[str]) -> None:
    names = {GPU.id: (GPU.id, "GPU-8a56-1", "S1"), MIG.id: (MIG.id, GPU.id, "MIG-1"), NIC.id: (NIC.id,)}
    wanted = {id for id, mine in names.items() if any(fnmatchcase(one, p) for one in mine for p in patterns)}
    evidence, freed, unused = quarantined(INVENTORY, patterns, NO_HEALTH)
    assert {one.device for one in evidence} == wanted and not freed
    every = [one for mine in names.values() for one in mine]
    assert set(unused) == {p for p in patterns if not any(fnmatchcase(one, p) for one in every)}
