"""Errors of GPUs: which count, how long, over restarts of the agent, and what the admin can do about them."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.config.schema import Config
from nodeagent.core.model.device import Device
from nodeagent.core.model.health import (
    DEGRADED,
    HEALTHY,
    NO_HEALTH,
    UNHEALTHY,
    UNKNOWN,
    Evidence,
    Health,
    Remedy,
    clear,
    latched_causes,
    observe,
    recovered,
    withdraw,
)
from nodeagent.core.model.xid import SAYS_NOTHING, XIDS, XidEffect, effect_of
from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.nvml.values import Condition, FabricProbe, Failure, LinkErrors, Mig, NvGpu, Snapshot, Xid
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory.gpu_faults import FILE as FAULTS
from nodeagent.managers.inventory.gpu_faults import FaultMemory
from nodeagent.managers.inventory.gpu_health import (
    bound_elsewhere,
    instance_evidence,
    not_looked_at,
    nvlink_evidence,
    nvml_evidence,
    xid_evidence,
)
from nodeagent.managers.inventory.latches import FILE, LatchMemory
from nodeagent.managers.inventory.nvlinks import FILE as NVLINKS
from nodeagent.managers.inventory.nvlinks import NvlinkErrors, NvlinkMemory
from nodeagent.managers.inventory.scanner import InventoryScanner
from nodeagent.state.agent import Agent, AgentSettings
from nodeagent.state.store import Store
from tests.builders.devices import DeviceTree
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.machines import machine

GPU, MIG = "0000:41:00.0", "0000:41:00.0/mig-2-0"
WHOLE = Device(kind="gpu", id=GPU, pci_address=GPU, vendor="10de", driver="nvidia")
PART = replace(WHOLE, id=MIG, parent=GPU)
INVENTORY = inventory_of(even_rows(1, 1, 1, 2, 1), devices=[WHOLE, PART])
RECOVER_S = 30.0


def snapshot(condition: Condition | None = None, **gpu: object) -> Snapshot:
    condition = condition or Condition()
    shown = NvGpu(pci_address=GPU, uuid="GPU-1", name="Double", condition=condition, **gpu)  # type: ignore[arg-type]
    return Snapshot(driver_version="580", gpus=(shown,))


def polled(health: Health, now: float, nvml: Snapshot | Failure) -> Health:
    return recovered(observe(health, nvml_evidence(nvml, INVENTORY), now, RECOVER_S), now, RECOVER_S)


def reported(health: Health, now: float, code: int, instance: tuple[int, int] | None = None) -> Health:
    xid = Xid(pci_address=GPU, code=code, instance=instance)
    return observe(health, xid_evidence(xid, INVENTORY), now, RECOVER_S)


def states(health: Health) -> tuple[str, str]:
    return tuple(health[one].state if one in health else HEALTHY for one in (GPU, MIG))  # type: ignore[return-value]


KERNEL = ("carrier", "pcie", "aer", "nvme", "smart", "ras")
"""Sources that are read from the kernel; which of them a device can have does not matter here."""
GOOD, BAD, WARNS, SILENT = "good", "bad", "warns", "silent"
ROUTE_OK = 0b10_10_10_10 | 1 << 8
"""A health mask of the fabric in which nothing is wrong."""
SIGNS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "ecc": [({}, SILENT), ({"ecc_uncorrected": 0}, GOOD), ({"ecc_uncorrected": 3}, BAD)],
    "rows": [
        ({}, SILENT),
        ({"rows_pending": False, "rows_failed": False}, GOOD),
        ({"rows_pending": True, "rows_failed": False}, BAD),
        ({"rows_pending": False, "rows_failed": True}, BAD),
        ({"rows_pending": False, "rows_failed": False, "banks_without_spare": 2}, WARNS),
        ({"rows_pending": True, "rows_failed": False, "banks_without_spare": 2}, BAD),
    ],
    "sram": [({}, SILENT), ({"sram_exceeded": False}, GOOD), ({"sram_exceeded": True}, BAD)],
    "clocks": [
        ({}, SILENT),
        *(({"clock_reasons": bits}, GOOD) for bits in (0, 0x1, 0x2, 0x4, 0x10, 0x100)),
        *(({"clock_reasons": bits | 4}, WARNS) for bits in (0x8, 0x20, 0x40, 0x80, 0x48, 0x88)),
    ],
    "fabric": [
        ({}, SILENT),
        ({"fabric": FabricProbe(state=0, status=0)}, GOOD),
        ({"fabric": FabricProbe(state=3, status=0)}, GOOD),
        ({"fabric": FabricProbe(state=3, status=0, health=ROUTE_OK)}, GOOD),
        *(({"fabric": FabricProbe(state=state, status=0)}, BAD) for state in (1, 2, 7)),
        ({"fabric": FabricProbe(state=3, status=10)}, BAD),
        *(({"fabric": FabricProbe(state=3, status=0, health=code << 8)}, BAD) for code in (2, 5, 8, 15)),
        ({"fabric": FabricProbe(state=3, status=0, health=1 << 4)}, BAD),
        *(({"fabric": FabricProbe(state=3, status=0, health=1 << at)}, WARNS) for at in (0, 2, 6)),
    ],
    "recovery": [
        ({}, SILENT),
        ({"recovery": 0}, GOOD),
        ({"recovery": 5}, WARNS),
        *(({"recovery": action}, BAD) for action in (1, 2, 3, 4, 6, 7, 99)),
    ],
}
"""What NVML can show of a GPU, and what that says, by source."""
OF_CONDITION = frozenset(Condition.__struct_fields__)
answers = st.fixed_dictionaries({source: st.sampled_from(every) for source, every in SIGNS.items()})
codes = st.sampled_from([*XIDS, 7, 999])
links = st.tuples(st.just("nvlink"), st.frozensets(st.integers(0, 2)))
seen = st.tuples(st.sampled_from(KERNEL), st.sampled_from([HEALTHY, UNHEALTHY, UNKNOWN, None]))
Step = tuple[str, object]
steps = st.lists(
    st.tuples(
        st.one_of(st.tuples(st.just("xid"), codes), st.tuples(st.just("nvml"), answers), links, seen),
        st.floats(0, 200),
    ),
    max_size=25,
)


def shown(signs: dict[str, tuple[dict[str, Any], str]]) -> Snapshot:
    """NVML's answer with these signs."""
    fields = {name: value for some, _ in signs.values() for name, value in some.items()}
    condition = Condition(**{name: value for name, value in fields.items() if name in OF_CONDITION})
    return snapshot(condition, **{name: value for name, value in fields.items() if name not in OF_CONDITION})


class Story:
    """The health of a GPU that all sources look at."""

    def __init__(self) -> None:
        self.health, self.now = polled(NO_HEALTH, 0.0, snapshot()), 0.0

    def tell(self, step: Step, after_s: float) -> None:
        """One look or one Xid, some seconds after the last."""
        self.now += after_s
        what, said = step
        if what == "xid":
            self.health = reported(self.health, self.now, said)  # type: ignore[arg-type]
        elif what == "nvml":
            self.health = polled(self.health, self.now, shown(said))  # type: ignore[arg-type]
        elif what == "nvlink":
            nvml = snapshot(nvlinks_inactive=tuple(said))  # type: ignore[arg-type]
            self.take(*nvlink_evidence(nvml, INVENTORY, {GPU: frozenset({0, 1})}))
        elif said is None:
            self.take([], [(GPU, what)])
        else:
            self.take([Evidence(device=GPU, source=what, state=said)], [])  # type: ignore[arg-type]

    def take(self, evidence: list[Evidence], unseen: list[tuple[str, str]]) -> None:
        health = withdraw(observe(self.health, evidence, self.now, RECOVER_S), unseen, self.now, RECOVER_S)
        self.health = recovered(health, self.now, RECOVER_S)


@given(steps)
def test_a_fatal_error_never_heals_whatever_the_other_sources_say(story: list[tuple[Step, float]]) -> None:
    """NVML that shows the GPU without any fault, links that come back, a kernel that sees nothing bad or no longer
    anything: only an admin, a reboot or the driver ends it."""
    told, fatal = Story(), False
    for step, after_s in story:
        told.tell(step, after_s)
        fatal |= step[0] == "xid" and effect_of(step[1]) in (XidEffect.FATAL, XidEffect.UNLISTED)  # type: ignore[arg-type]
        assert not fatal or told.health[GPU].state != HEALTHY
    causes = latched_causes(told.health)
    assert bool(causes) == fatal
    assert latched_causes(clear(told.health, GPU, told.now)) == ()


@given(steps)
def test_an_error_of_an_application_changes_nothing_whatever_the_other_sources_say(
    story: list[tuple[Step, float]],
) -> None:
    """The same story without it has the same health at the same moments."""
    with_it, without = Story(), Story()
    for step, after_s in story:
        with_it.tell(step, after_s)
        if step[0] == "xid" and effect_of(step[1]) in SAYS_NOTHING:  # type: ignore[arg-type]
            without.now += after_s
        else:
            without.tell(step, after_s)
        assert with_it.health == without.health


@given(steps)
def test_a_gpu_is_healthy_exactly_if_every_cause_has_ended_for_long_enough(story: list[tuple[Step, float]]) -> None:
    """Each source counts by itself, checked against a plain list of what each has said last: its silence changes
    nothing, and a warning makes nothing ill."""
    told, last, bad_until, latched = Story(), dict[str, bool](), -RECOVER_S, False
    warned = dict[str, bool]()
    for (what, said), after_s in story:
        ill = any(last.values())
        told.tell((what, said), after_s)
        if what == "xid":
            effect = effect_of(said)  # type: ignore[arg-type]
            latched |= effect in (XidEffect.FATAL, XidEffect.UNLISTED)
            if effect not in SAYS_NOTHING:
                last["xid"], warned["xid"] = effect is XidEffect.CONTAINED, effect is XidEffect.DEGRADED and not latched
        elif what == "nvml":
            last["xid"], warned["xid"] = False, False
            for source, (_, verdict) in said.items():  # type: ignore[attr-defined]
                if verdict != SILENT:
                    last[source] = verdict == BAD
                    warned[source] = verdict == WARNS
        elif what == "nvlink":
            last["nvlink"] = bool({0, 1} & said)  # type: ignore[operator]
        else:
            last[what] = said not in (HEALTHY, None)
        bad_until = told.now if ill or any(last.values()) else bad_until
        good = not latched and not any(last.values()) and told.now - bad_until >= RECOVER_S
        if told.now - bad_until != RECOVER_S:  # rounding
            assert (recovered(told.health, told.now, RECOVER_S)[GPU].state == HEALTHY) == good
        assert {source for source, _ in told.health[GPU].degradations} == {one for one, now in warned.items() if now}


@pytest.mark.parametrize("code", [13, 31, 39, 43, 45, 68, 130])
def test_an_error_of_the_application_leaves_the_gpu_healthy(code: int) -> None:
    assert xid_evidence(Xid(pci_address=GPU, code=code), INVENTORY) == []


@pytest.mark.parametrize("code", [48, 79, 95, 119])
def test_a_fatal_error_is_that_of_the_whole_gpu(code: int) -> None:
    """Also where the driver names an instance: its parts are no better than the GPU."""
    health = reported(NO_HEALTH, 0.0, code, (2, 0))
    assert health[GPU].state == UNHEALTHY
    assert health[GPU].reason.startswith(f"the driver reported Xid {code} (")
    assert states(polled(health, 1e6, snapshot())) == (UNHEALTHY, HEALTHY)


def test_a_contained_error_is_that_of_its_instance_and_heals() -> None:
    """An instance that is not known by now counts as the whole GPU."""
    health = reported(polled(NO_HEALTH, 0.0, snapshot()), 1.0, 94, (2, 0))
    assert states(health) == (HEALTHY, UNHEALTHY)
    health = polled(health, 20.0, snapshot())
    assert states(health) == (HEALTHY, UNHEALTHY)
    assert states(polled(health, 50.0, snapshot())) == (HEALTHY, HEALTHY)
    assert states(reported(NO_HEALTH, 0.0, 94, (7, 0))) == (UNHEALTHY, HEALTHY)
    assert states(reported(NO_HEALTH, 0.0, 94)) == (UNHEALTHY, HEALTHY)


def test_a_contained_error_of_an_instance_of_the_agents_own_is_that_of_its_place() -> None:
    """Its number names no device: another instance at the same place may have another."""
    (one,) = xid_evidence(Xid(pci_address=GPU, code=94, instance=(7, 0)), INVENTORY, f"{GPU}/mig-2-0")
    assert (one.device, one.state) == (f"{GPU}/mig-2-0", UNHEALTHY)


@pytest.mark.parametrize("code", [63, 92, 121, 164])
def test_what_wears_out_is_a_warning_until_nvml_shows_the_gpu_again(code: int) -> None:
    health = reported(polled(NO_HEALTH, 0.0, snapshot()), 1.0, code)
    assert states(health) == (HEALTHY, HEALTHY)
    assert [source for source, _ in health[GPU].degradations] == ["xid"]
    assert polled(health, 20.0, snapshot())[GPU].degradations == ()


def test_a_warning_hides_no_lasting_cause() -> None:
    health = reported(reported(NO_HEALTH, 0.0, 48), 1.0, 63)
    assert (health[GPU].state, health[GPU].reason[:27]) == (UNHEALTHY, "the driver reported Xid 48 ")


def test_an_error_that_the_table_lacks_is_neither_healthy_nor_fatal() -> None:
    health = reported(NO_HEALTH, 0.0, 4711)
    assert health[GPU].state == UNKNOWN
    assert health[GPU].reason == "the driver reported Xid 4711, which is not in the table of docs/health.md"


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ({"ecc_uncorrected": 99}, "99 uncorrected memory errors since the driver was loaded"),
        ({"rows_pending": True}, "memory rows are remapped at the next reset: reset the GPU"),
        ({"rows_failed": True}, "a memory row could not be remapped: replace the GPU"),
    ],
)
def test_memory_errors_last_as_long_as_nvml_shows_them(gpu: dict[str, int | bool], reason: str) -> None:
    health = NO_HEALTH
    for now in (0.0, 100.0, 10_000.0):
        health = polled(health, now, snapshot(**gpu))
        assert (health[GPU].state, health[GPU].reason) == (UNHEALTHY, reason)
    assert polled(health, 15_000.0, snapshot())[GPU].state == UNHEALTHY, "NVML no longer answers for it"
    for now in (20_000.0, 20_100.0):
        health = polled(health, now, snapshot(ecc_uncorrected=0, rows_pending=False, rows_failed=False))
    assert health[GPU].state == HEALTHY


def one(source: str, nvml: Snapshot) -> Evidence:
    """What a source says of the GPU."""
    (found,) = [one for one in nvml_evidence(nvml, INVENTORY) if (one.device, one.source) == (GPU, source)]
    return found


@pytest.mark.parametrize(
    ("source", "nvml", "state", "reason", "remedy"),
    [
        ("ecc", snapshot(ecc_uncorrected=1), UNHEALTHY, "1 uncorrected memory errors", Remedy.RESET),
        ("rows", snapshot(rows_pending=True), UNHEALTHY, "memory rows are remapped at the next reset", Remedy.RESET),
        ("rows", snapshot(rows_pending=True, rows_failed=True), UNHEALTHY, "a memory row could not", Remedy.REPLACE),
        ("sram", snapshot(Condition(sram_exceeded=True)), UNHEALTHY, "more uncorrected SRAM errors", Remedy.REPLACE),
        (
            "clocks",
            snapshot(Condition(clock_reasons=0x48)),
            DEGRADED,
            "its clocks are halved or lower since it is too hot (",
            "",
        ),
        (
            "clocks",
            snapshot(Condition(clock_reasons=0x88)),
            DEGRADED,
            "its clocks are halved or lower since its power",
            "",
        ),
        (
            "clocks",
            snapshot(Condition(clock_reasons=0x8)),
            DEGRADED,
            "its clocks are halved or lower (hardware slow",
            "",
        ),
        ("recovery", snapshot(Condition(recovery=2)), UNHEALTHY, "the driver asks for a reboot", Remedy.REBOOT),
        (
            "recovery",
            snapshot(Condition(recovery=3)),
            UNHEALTHY,
            "the driver asks for an end of all peer",
            Remedy.DRAIN,
        ),
        (
            "recovery",
            snapshot(Condition(recovery=4)),
            UNHEALTHY,
            "the driver asks for a reset of the GPU once",
            "reset",
        ),
        ("recovery", snapshot(Condition(recovery=42)), UNKNOWN, "the driver asks for a recovery that is not known", ""),
        (
            "fabric",
            snapshot(Condition(fabric=FabricProbe(state=2, status=0))),
            UNKNOWN,
            "its registration with the fabric manager is in progress",
            "",
        ),
        (
            "fabric",
            snapshot(Condition(fabric=FabricProbe(state=3, status=0, health=4 << 8 | 1))),
            UNHEALTHY,
            "its NVLink fabric is configured incorrectly: no partition",
            "",
        ),
    ],
)
def test_each_sign_of_a_gpu_has_a_state_a_reason_and_what_helps(
    source: str, nvml: Snapshot, state: str, reason: str, remedy: str
) -> None:
    found = one(source, nvml)
    assert (found.state, found.reason[: len(reason)], found.remedy) == (state, reason, remedy)


def test_what_is_ignored_does_not_count_and_what_only_the_driver_knows_of_memory_always_does() -> None:
    """The fabric of a GPU in MIG mode does not count either: it uses no links."""
    ill = snapshot(Condition(clock_reasons=0x40, recovery=1, fabric=FabricProbe(state=1, status=0)), rows_failed=True)
    every = {found.source for found in nvml_evidence(ill, INVENTORY, tuple(SIGNS)) if found.device == GPU}
    assert every == {"nvml", "xid", "rows"}
    unseen = not_looked_at(ill, INVENTORY, ["clocks", "carrier", "recovery"])
    assert {said for said in unseen if said[0] == GPU} == {(GPU, "clocks"), (GPU, "recovery")}
    divided = snapshot(ill.gpus[0].condition, mig_enabled=True)
    assert "fabric" not in {found.source for found in nvml_evidence(divided, INVENTORY)}
    assert (GPU, "fabric") in not_looked_at(divided, INVENTORY, [])


def divided(errors: int | None, of_gpu: int | None = None) -> Snapshot:
    mig = Mig(
        uuid="MIG-1", profile="1g.10gb", memory_bytes=1, gpu_instance=2, compute_instance=0, ecc_uncorrected=errors
    )
    return snapshot(ecc_uncorrected=of_gpu, mig_enabled=True, migs=(mig,))


def with_instances(health: Health, now: float, nvml: Snapshot | Failure) -> Health:
    evidence, unseen = instance_evidence(nvml, INVENTORY, health, lambda gpu, mig: f"{gpu}/mig-{mig.gpu_instance}-0")
    after = withdraw(observe(health, evidence, now, RECOVER_S), unseen, now, RECOVER_S)
    return recovered(polled(after, now, nvml), now, RECOVER_S)


def test_errors_of_an_instance_are_its_own_and_end_with_it() -> None:
    """Neither with NVML's silence nor with that of the driver on the count."""
    health = with_instances(NO_HEALTH, 0.0, divided(2, of_gpu=2))
    assert states(health) == (HEALTHY, UNHEALTHY)
    assert health[MIG].reason == "2 uncorrected memory errors since the instance was made"
    for now, silent in ((40.0, divided(None)), (80.0, Failure(absent=False, reason="NVML failed"))):
        health = with_instances(health, now, silent)
        assert health[MIG].seen["ecc"].state == UNHEALTHY
    assert states(with_instances(health, 100.0, divided(2, of_gpu=3)))[0] != HEALTHY, "one is of no instance"
    for now in (120.0, 160.0):
        health = with_instances(health, now, snapshot(mig_enabled=True))
    assert health[MIG].state == HEALTHY


def test_a_gpu_that_nvml_does_not_show_is_unhealthy_and_one_that_nobody_can_ask_for_is_unknown() -> None:
    health = polled(NO_HEALTH, 0.0, Snapshot(driver_version="580"))
    assert health[GPU].reason == "NVML does not show this GPU"
    assert polled(NO_HEALTH, 0.0, Failure(absent=False, reason="NVML failed"))[GPU].state == UNKNOWN


@pytest.mark.parametrize("nvml", [Snapshot(driver_version="580"), Failure(absent=False, reason="NVML failed")])
def test_a_mig_instance_is_well_again_with_its_gpu(nvml: Snapshot | Failure) -> None:
    health = polled(NO_HEALTH, 0.0, nvml)
    assert HEALTHY not in states(health)
    for now in (30.0, 60.0):
        health = polled(health, now, snapshot())
    assert states(health) == (HEALTHY, HEALTHY)


@pytest.mark.parametrize("nvml", [Snapshot(driver_version="580"), Failure(absent=False, reason="NVML failed")])
def test_a_gpu_under_another_driver_is_not_judged_by_nvml(nvml: Snapshot | Failure) -> None:
    """What was known before it was bound to vfio, for a virtual machine, does not stay; a fatal error does."""
    there = replace(INVENTORY, devices=(replace(WHOLE, driver="vfio-pci"),))
    assert nvml_evidence(nvml, there) == []
    assert bound_elsewhere(INVENTORY) == []
    before = reported(polled(NO_HEALTH, 0.0, Failure(absent=False, reason="NVML failed")), 1.0, 94)
    for now in (2.0, 40.0):
        before = recovered(withdraw(before, bound_elsewhere(there), now, RECOVER_S), now, RECOVER_S)
    assert before[GPU].state == HEALTHY
    fatal = reported(NO_HEALTH, 0.0, 79)
    assert withdraw(fatal, bound_elsewhere(there), 1.0, RECOVER_S) is fatal


# ---------------------------------------------------------------- over restarts


class Machine:
    """What the binding of a driver and a boot look like from outside."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.boot_id, self.bindings = "b1", {GPU: "17"}

    def memory(self) -> LatchMemory:
        return LatchMemory(self.path, self.boot_id, lambda id: self.bindings.get(id, ""))


FATAL = Evidence(device=GPU, source="xid", state=UNHEALTHY, reason="Xid 79", latched=True, remedy=Remedy.REBOOT)


def test_a_latched_cause_outlives_the_agent_and_ends_with_the_boot_or_the_drivers_binding(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.memory().keep([FATAL])
    assert machine.memory().standing([GPU]) == ([FATAL], [])
    machine.bindings[GPU] = "18"
    assert machine.memory().standing([GPU]) == ([], [GPU])
    assert machine.memory().standing([GPU]) == ([], []), "what has ended is forgotten"
    machine.memory().keep([FATAL])
    machine.boot_id = "b2"
    assert machine.memory().standing([GPU]) == ([], [GPU])


def test_a_cause_of_a_lesser_remedy_does_not_replace_one_of_a_greater_in_the_file(tmp_path: Path) -> None:
    """Also that of another agent, which knows nothing of the first."""
    machine = Machine(tmp_path)
    machine.memory().keep([FATAL])
    machine.memory().keep([replace(FATAL, reason="Xid 119", remedy=Remedy.RESET)])
    assert machine.memory().standing([GPU]) == ([FATAL], [])
    machine.memory().keep([replace(FATAL, state=UNKNOWN, reason="Xid 1", remedy=Remedy.REPLACE)])
    assert machine.memory().standing([GPU]) == ([replace(FATAL, remedy=Remedy.REPLACE)], [])
    machine.boot_id = "b2"
    machine.memory().keep([replace(FATAL, reason="Xid 119", remedy=Remedy.RESET)])
    assert [one.reason for one in machine.memory().standing([GPU])[0]] == ["Xid 119"], "a reboot has ended the others"


def test_a_cause_of_a_device_that_is_away_waits_for_it(tmp_path: Path) -> None:
    """A GPU that has fallen off the bus may be shown again without a reset."""
    machine = Machine(tmp_path)
    machine.memory().keep([FATAL])
    assert machine.memory().standing([]) == ([], [])
    assert machine.memory().standing([GPU]) == ([FATAL], [])


def test_a_record_of_an_earlier_build_names_no_remedy(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.memory().keep([FATAL])
    document = json.loads(machine.path.read_bytes())
    del document["causes"][0]["remedy"]
    machine.path.write_text(json.dumps(document))
    assert machine.memory().standing([GPU]) == ([replace(FATAL, remedy=Remedy.NONE)], [])


def test_what_is_cleared_is_forgotten_for_good(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    memory = machine.memory()
    memory.keep([FATAL])
    memory.clear(GPU)
    assert machine.memory().standing([GPU]) == ([], [])


@pytest.mark.parametrize("content", [b"", b"{", b'{"causes": [{"device": 1}]}', b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_reported_and_written_again(tmp_path: Path, content: bytes) -> None:
    machine = Machine(tmp_path)
    machine.path.write_bytes(content)
    with capture_logs() as lines:
        memory = machine.memory()
        assert memory.standing([GPU]) == ([], [])
    assert [one["event"] for one in lines] == ["health-unreadable"]
    memory.keep([FATAL])
    assert [one["device"] for one in json.loads(machine.path.read_bytes())["causes"]] == [GPU]


def test_a_folder_that_cannot_be_written_is_reported_and_the_cause_counts_all_the_same(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.path = tmp_path / "file" / FILE
    (tmp_path / "file").write_text("in the way")
    memory = machine.memory()
    with capture_logs() as lines:
        memory.keep([FATAL])
    assert "health-not-written" in [one["event"] for one in lines]
    assert memory.standing([GPU]) == ([FATAL], [])


def test_the_causes_of_a_health_are_what_is_kept() -> None:
    health = MappingProxyType(dict(reported(reported(NO_HEALTH, 0.0, 94, (2, 0)), 0.0, 79)))
    assert [(one.device, one.source) for one in latched_causes(health)] == [(GPU, "xid")]


def test_two_agents_of_a_node_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """As during a rolling upgrade: what one latches or clears counts for the other."""
    machine, other = Machine(tmp_path), replace(FATAL, device="0000:42:00.0")
    machine.bindings[other.device] = "18"
    one, two = machine.memory(), machine.memory()
    assert one.standing([GPU]) == two.standing([GPU]) == ([], [])
    one.keep([FATAL])
    two.keep([other])
    assert one.standing([GPU, other.device]) == ([FATAL, other], [])
    two.clear(GPU)
    one.keep([other])
    assert machine.memory().standing([GPU, other.device]) == ([other], [])


def test_a_fatal_error_is_not_hidden_by_a_later_one_that_is_less_bad() -> None:
    """The driver reports an unlisted Xid right after a fatal one."""
    health = reported(reported(NO_HEALTH, 0.0, 79), 1.0, 4711)
    assert (health[GPU].state, health[GPU].reason[:27]) == (UNHEALTHY, "the driver reported Xid 79 ")
    assert reported(reported(NO_HEALTH, 0.0, 4711), 1.0, 79)[GPU].state == UNHEALTHY


def test_an_agent_that_hangs_with_the_lock_keeps_no_other_from_remembering(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with machine.path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        machine.memory().keep([FATAL])
    assert machine.memory().standing([GPU]) == ([FATAL], [])


def test_what_could_not_be_written_is_written_as_soon_as_it_can_be(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "state")
    (tmp_path / "state").write_text("in the way")
    memory = machine.memory()
    memory.keep([FATAL])
    (tmp_path / "state").unlink()
    assert memory.standing([GPU]) == ([FATAL], [])
    assert machine.memory().standing([GPU]) == ([FATAL], [])


def test_a_cause_of_a_gpu_that_is_away_is_not_replaced_by_one_that_is_less_bad(tmp_path: Path) -> None:
    """Nothing is known of its health meanwhile, so the file alone can tell which is worse."""
    machine = Machine(tmp_path)
    less = replace(FATAL, state=UNKNOWN, reason="Xid 4711")
    machine.memory().keep([less])
    machine.memory().keep([FATAL])
    machine.memory().keep([less])
    assert machine.memory().standing([GPU]) == ([FATAL], [])
    machine.boot_id = "b2"
    machine.memory().keep([less])
    assert machine.memory().standing([GPU]) == ([less], []), "what has ended is replaced by anything"


# ---------------------------------------------------------------- NVLinks


class Linked:
    """A GPU with NVLinks, over restarts of the agent."""

    def __init__(self, folder: Path) -> None:
        self.path, self.boot_id = folder / NVLINKS, "b1"
        self.health = NO_HEALTH
        self.restart()

    def restart(self) -> None:
        self.memory, self.health = NvlinkMemory(self.path, self.boot_id), NO_HEALTH
        self.errors = NvlinkErrors()

    def poll(
        self, now: float, active: set[int], inactive: set[int], errors: LinkErrors | None = None, **gpu: bool
    ) -> tuple[str, str]:
        """State and reason after a poll that shows these links."""
        condition = Condition(links=errors or LinkErrors())
        nvml = snapshot(condition, nvlinks_active=tuple(active), nvlinks_inactive=tuple(inactive), **gpu)
        self.memory.learn(nvml.gpus)
        grown = self.errors.grown(nvml.gpus, now)
        evidence, unseen = nvlink_evidence(nvml, INVENTORY, self.memory.active_once, grown)
        health = withdraw(observe(self.health, evidence, now, RECOVER_S), unseen, now, RECOVER_S)
        self.health = recovered(health, now, RECOVER_S)
        return (self.health[GPU].state, self.health[GPU].reason) if GPU in self.health else (HEALTHY, "")


def test_a_link_that_was_lost_makes_the_gpu_unhealthy_until_it_is_back_for_a_while(tmp_path: Path) -> None:
    """Links that never were active do not count; nor does a restart of the agent heal anything."""
    node = Linked(tmp_path)
    assert node.poll(0, {1, 2, 3}, {0}) == (HEALTHY, "")
    assert node.poll(1, {1, 2}, {0, 3}) == (UNHEALTHY, "NVLink 3 was active and is inactive")
    node.restart()
    assert node.poll(2, {1}, {0, 2, 3}) == (UNHEALTHY, "NVLinks 2, 3 were active and are inactive")
    assert node.poll(3, {1, 2, 3}, {0})[0] == UNHEALTHY
    assert node.poll(33, {1, 2, 3}, {0}) == (HEALTHY, "")


def test_errors_of_links_are_a_warning_while_they_grow(tmp_path: Path) -> None:
    """What was counted before the agent started does not count, nor do CRC errors that the links cope with; a count
    that falls starts again."""
    node = Linked(tmp_path)
    assert node.poll(0, {0, 1}, set(), LinkErrors(replays=5, recoveries=1, crc=900)) == (HEALTHY, "")
    assert node.health[GPU].degradations == ()
    node.poll(30, {0, 1}, set(), LinkErrors(replays=7, recoveries=2, crc=3899))
    warned = "its NVLinks have had errors: 1 recoveries, 2 replays in 30 s"
    assert node.health[GPU].degradations == (("nvlink", warned),)
    node.poll(60, {0, 1}, set(), LinkErrors(replays=7, recoveries=2, crc=6899))
    assert node.health[GPU].degradations == (("nvlink", "its NVLinks have had errors: 3000 CRC errors in 30 s"),)
    assert node.poll(90, {0, 1}, set(), LinkErrors(replays=0, recoveries=0, crc=0)) == (HEALTHY, "")
    assert node.health[GPU].degradations == ()
    assert node.poll(120, {0}, {1}, LinkErrors(replays=9, recoveries=0, crc=0))[0] == UNHEALTHY


def test_a_gpu_without_a_bridge_or_in_mig_mode_has_no_links_to_lose(tmp_path: Path) -> None:
    node = Linked(tmp_path)
    assert node.poll(0, set(), {0, 1, 2, 3}) == (HEALTHY, "")
    assert GPU not in node.health, "nothing was seen, neither good nor bad"
    node.poll(1, {0}, set())
    assert node.poll(2, set(), {0})[0] == UNHEALTHY
    node.poll(3, set(), {0}, mig_enabled=True)
    assert node.poll(33, set(), {0}, mig_enabled=True) == (HEALTHY, "")


def test_links_are_forgotten_with_a_reboot_and_at_an_admins_word(tmp_path: Path) -> None:
    node = Linked(tmp_path)
    node.poll(0, {0, 1}, set())
    assert node.memory.forget(GPU)
    assert not node.memory.forget(GPU)
    assert node.poll(1, {0}, {1}) == (HEALTHY, "")
    node.poll(2, {0, 1}, set())
    node.boot_id = "b2"
    node.restart()
    assert node.poll(3, {0}, {1}) == (HEALTHY, "")


@pytest.mark.parametrize("answer", [Failure(absent=False, reason="NVML failed"), Snapshot(driver_version="580")])
def test_what_is_known_of_links_stays_while_nvml_does_not_show_the_gpu(
    tmp_path: Path, answer: Snapshot | Failure
) -> None:
    node = Linked(tmp_path)
    node.poll(0, {0}, set())
    assert nvlink_evidence(answer, INVENTORY, node.memory.active_once) == ([], [])


@pytest.mark.parametrize("content", [b"", b"{", b'{"boot_id": 1}'])
def test_a_file_of_links_that_cannot_be_read_is_reported_and_written_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NVLINKS).write_bytes(content)
    with capture_logs() as lines:
        Linked(tmp_path).poll(0, {0}, set())
    assert [one["event"] for one in lines] == ["nvlinks-not-kept", "record-set-aside"]
    (damaged,) = tmp_path.glob(f"{NVLINKS}.damaged-*")
    assert damaged.read_bytes() == content
    node = Linked(tmp_path)
    assert node.poll(1, set(), {0})[0] == UNHEALTHY


# ---------------------------------------------------------------- what NVML said, over restarts

SEEN_ROWS, SILENT_ON_ROWS = snapshot(rows_pending=True, rows_failed=False), snapshot(mig_enabled=True)


def faults_of(folder: Path, boot_id: str = "b1", binding: str = "17") -> FaultMemory:
    return FaultMemory(folder / FAULTS, boot_id, lambda _: binding)


def test_what_lasts_is_remembered_until_nvml_says_otherwise_a_reboot_or_another_binding(tmp_path: Path) -> None:
    """Heat and a registration that is under way are seen again; latched causes have a file of their own."""
    assert faults_of(tmp_path).standing() == []
    hot = snapshot(Condition(clock_reasons=0x40, fabric=FabricProbe(state=2, status=0)), rows_pending=True)
    ill = reported(polled(NO_HEALTH, 0.0, hot), 0.0, 79)
    faults_of(tmp_path).keep(ill, [GPU])
    (found,) = faults_of(tmp_path).standing()
    assert (found.device, found.source, found.state, found.latched) == (GPU, "rows", UNHEALTHY, False)
    assert found.remedy is Remedy.RESET
    assert faults_of(tmp_path, boot_id="b2").standing() == []
    assert faults_of(tmp_path, binding="18").standing() == []
    well = polled(ill, 1.0, snapshot(rows_pending=False, rows_failed=False))
    faults_of(tmp_path).keep(well, [GPU])
    assert faults_of(tmp_path).standing() == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"boot_id": 1}', b"\xff"])
def test_a_file_of_faults_that_cannot_be_read_is_reported_and_written_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FAULTS).write_bytes(content)
    with capture_logs() as lines:
        memory = faults_of(tmp_path)
        assert memory.standing() == []
    assert [line["event"] for line in lines] == ["gpu-faults-not-kept"]
    memory.keep(polled(NO_HEALTH, 0.0, SEEN_ROWS), [GPU])
    assert len(faults_of(tmp_path).standing()) == 1


class Answers:
    """NVML, which says what it is told to."""

    def __init__(self, *answers: Snapshot | Failure) -> None:
        self.answers = list(answers)

    async def snapshot(self) -> Snapshot | Failure:
        return self.answers.pop(0)

    async def close(self) -> None:
        pass


async def test_a_gpu_on_whose_rows_nvml_falls_silent_is_as_ill_after_a_restart_of_the_agent(tmp_path: Path) -> None:
    """Until NVML answers for them again, or an admin has it forgotten."""
    tree, folder = DeviceTree(machine(tmp_path / "root", "1s1n2c")), tmp_path / "state"
    tree.pci(GPU, pci_class="030200", vendor="10de", driver="nvidia")
    why = "memory rows are remapped at the next reset: reset the GPU"
    for answers in (
        (SEEN_ROWS, SILENT_ON_ROWS),
        (SILENT_ON_ROWS,),
        (Failure(absent=False, reason="late"), SILENT_ON_ROWS),
    ):
        async with scanning(tree, folder) as (agent, scanner):
            scanner.probe = Answers(*answers)  # type: ignore[assignment]
            for _ in answers:
                await scanner.ask_nvml()
            assert agent.health[GPU].seen["rows"].reason == why
    async with scanning(tree, folder) as (agent, scanner):
        scanner.probe = Answers(SILENT_ON_ROWS, SILENT_ON_ROWS)  # type: ignore[assignment]
        await scanner.ask_nvml()
        scanner.answered.set()
        assert await scanner.clear_health(GPU, "uid 0")
        await scanner.ask_nvml()
        assert "rows" not in agent.health[GPU].seen
    assert faults_of(folder, binding="").standing() == []


async def test_the_machine_is_read_again_only_if_nvml_says_something_new_of_it(tmp_path: Path) -> None:
    """What is plugged in without an event shows whether it was. The health is reported each time."""
    tree, folder = DeviceTree(machine(tmp_path / "root", "1s1n2c")), tmp_path / "state"
    tree.pci(GPU, pci_class="030200", vendor="10de", driver="nvidia")
    first, ill, other = snapshot(), snapshot(rows_pending=True, rows_failed=False), snapshot(minor=3)
    async with scanning(tree, folder) as (agent, scanner):
        scanner.probe = Answers(first, first, ill, other, other)  # type: ignore[assignment]
        await scanner._look_at_nvml()
        assert agent.inventory.device_by_id[GPU].attributes["uuid"] == "GPU-1"
        tree.pci("0000:05:00.0", driver="ixgbe")
        for _ in range(2):
            await scanner._look_at_nvml()
            assert "0000:05:00.0" not in agent.inventory.device_by_id
        assert agent.health[GPU].seen["rows"].state == UNHEALTHY
        await scanner._look_at_nvml()
        assert "0000:05:00.0" in agent.inventory.device_by_id
        assert agent.inventory.device_by_id[GPU].attributes["minor"] == 3
        tree.pci("0000:06:00.0", driver="ixgbe")
        await scanner.ask_nvml()
        assert "0000:06:00.0" in agent.inventory.device_by_id


@contextlib.asynccontextmanager
async def scanning(tree: DeviceTree, folder: Path) -> AsyncIterator[tuple[Agent, InventoryScanner]]:
    """An agent that has looked at a machine once, with its record of errors in a folder."""
    sysfs, families = SysFs(tree.root), builtin_kinds()
    agent = Agent(Store(folder), scan(sysfs, families), AgentSettings(boot_id="b1"), nothing_held)
    scanner = InventoryScanner(agent, sysfs, families, folder, Config)
    try:
        await scanner.rescan()
        yield agent, scanner
    finally:
        await scanner.close()
        await agent.close()


async def nothing_held() -> tuple[()]:
    return ()


@pytest.mark.parametrize("content", [b"", b"{", b'{"causes": 1}', b"\xff\xfe"])
async def test_gpus_are_unknown_where_the_record_of_their_errors_is_damaged(tmp_path: Path, content: bytes) -> None:
    """Until an admin says otherwise, one by one, also after a restart; devices of others are not concerned."""
    tree, second = DeviceTree(machine(tmp_path / "root", "1s1n2c")), "0000:42:00.0"
    for id in (GPU, second):
        tree.pci(id, pci_class="030200", vendor="10de", driver="nvidia")
    tree.pci("0000:43:00.0", pci_class="030200", vendor="1002", driver="amdgpu")
    folder, why = tmp_path / "state", "the record of earlier errors (health.json) was damaged"
    folder.mkdir()
    (folder / FILE).write_bytes(content)
    async with scanning(tree, folder) as (agent, scanner):
        assert {id: (one.state, one.reason) for id, one in agent.health.items()} == {
            GPU: (UNKNOWN, why),
            second: (UNKNOWN, why),
        }
        assert await scanner.clear_health(GPU, "uid 0")
        await scanner.rescan()
        agent.observe([Evidence(device=second, source="xid", state=HEALTHY)])
        assert {id: one.state for id, one in agent.health.items()} == {GPU: HEALTHY, second: UNKNOWN}
    async with scanning(tree, folder) as (agent, _):
        assert {id: (one.state, one.reason) for id, one in agent.health.items()} == {second: (UNKNOWN, why)}
