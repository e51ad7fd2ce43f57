"""What an admin is told to do about a device that is ill: the most that any cause needs, in words with its address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.advice.repair import degradations, health_notes, repair
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import (
    DEGRADED,
    HEALTHY,
    NO_HEALTH,
    UNHEALTHY,
    UNKNOWN,
    DeviceState,
    Evidence,
    Health,
    Remedy,
    observe,
)
from nodeagent.core.model.inventory import Inventory

ID, PART_ID = "0000:41:00.0", "0000:41:00.0/mig-1g.10gb-4"
GPU = Device(kind="gpu", id=ID, pci_address=ID)
PART = Device(kind="gpu", id=PART_ID, pci_address=ID, parent=ID)
MACHINE = Inventory(devices=(GPU, PART))
RESET = f"end all programs that use {ID}, then `nvidia-smi --gpu-reset -i {ID}`"
CLEAR = f"`nodeagent health clear {ID}`"


def ill(*remedies: Remedy, latched: bool = False, device: str = ID, state: DeviceState = UNHEALTHY) -> Health:
    evidence = [
        Evidence(device=device, source=f"s{number}", state=state, reason="why", remedy=one, latched=latched)
        for number, one in enumerate(remedies)
    ]
    return observe(NO_HEALTH, evidence, 0.0)


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (NO_HEALTH, ""),
        (ill(Remedy.NONE), ""),
        (ill(Remedy.DRAIN), f"end all programs that use {ID}"),
        (ill(Remedy.RESET), RESET),
        (ill(Remedy.RESET, state=UNKNOWN), RESET),
        (ill(Remedy.RESET, latched=True), f"{RESET}, then {CLEAR}"),
        (ill(Remedy.RESET, Remedy.REBOOT, latched=True), "drain the node and reboot it"),
        (ill(Remedy.REPLACE, Remedy.RESET), f"drain the node and replace {ID}"),
        (ill(Remedy.NONE, latched=True), f"if it is well: {CLEAR}"),
        (ill(Remedy.RESET, state=HEALTHY), ""),
        (ill(Remedy.RESET, state=DEGRADED), ""),
    ],
)
def test_the_most_that_a_cause_needs_is_what_to_do(health: Health, words: str) -> None:
    assert repair(GPU, health) == words


def test_a_part_is_repaired_with_its_whole_and_what_is_latched_of_it_is_cleared_by_its_own_id() -> None:
    assert repair(PART, ill(Remedy.RESET)) == RESET
    assert (
        repair(PART, ill(Remedy.NONE, latched=True, device=PART_ID))
        == f"if it is well: `nodeagent health clear {PART_ID}`"
    )
    assert repair(GPU, ill(Remedy.RESET, device=PART_ID)) == ""


def test_a_warning_of_a_whole_is_one_of_its_parts_and_a_note_once() -> None:
    hot = observe(NO_HEALTH, [Evidence(device=ID, source="clocks", state=DEGRADED, reason="too hot")], 0.0)
    assert degradations(PART, hot) == degradations(GPU, hot) == ("too hot",)
    assert list(health_notes(MACHINE, hot)) == [f"{ID} is degraded: too hot"]
    assert list(health_notes(MACHINE, ill(Remedy.RESET))) == [f"{ID} is unhealthy (why): {RESET}"]
    assert list(health_notes(MACHINE, NO_HEALTH)) == []


@given(st.lists(st.tuples(st.sampled_from(DeviceState), st.sampled_from(Remedy), st.booleans()), max_size=6))
def test_nothing_is_advised_for_a_device_that_is_well(causes: list[tuple[DeviceState, Remedy, bool]]) -> None:
    """And where something helps, a device that is not is never left without advice."""
    evidence = [
        Evidence(device=ID, source=f"s{number}", state=state, reason="why", remedy=remedy, latched=latched)
        for number, (state, remedy, latched) in enumerate(causes)
    ]
    health = observe(NO_HEALTH, evidence, 0.0)
    bad = [(remedy, latched) for state, remedy, latched in causes if state in (UNHEALTHY, UNKNOWN)]
    latched = any(one for _, _, one in causes)
    helps = bool(bad) and (latched or any(remedy is not Remedy.NONE for remedy, _ in bad))
    assert bool(repair(GPU, health)) == helps
