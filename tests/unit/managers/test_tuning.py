"""Frequency and wake-up latency of exclusive CPUs: set, repaired, given back, whenever the agent dies."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from nodeagent.aio.revision import Revision
from nodeagent.config.isolation import PinningConfig, TuningConfig
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.tuning import tuner
from nodeagent.managers.tuning.manager import TuningManager
from tests.doubles.cpufreq import Dead, FakeCpufreq
from tests.support.long_form import share_of
from tests.support.until import until

FAST = TuningConfig(governor="performance", wakeup_latency_us=0)
POLICY, LATENCY = "sys/devices/system/cpu/cpufreq/policy{}/{}", "sys/devices/system/cpu/cpu{}/power/{}"
RESUME = "pm_qos_resume_latency_us"


class Stand:
    """A machine of 8 CPUs, two to a policy, and an agent that can be begun again."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = FakeCpufreq(root, [(0, 1), (2, 3), (4, 5), (6, 7)])
        monkeypatch.setattr(tuner, "put", self.kernel.put)
        self.root, self.memory = root, root / "state/tuning.json"
        self.before = self.kernel.values()
        self.exclusive, self.tuning, self.revision = EMPTY, FAST, Revision()
        self.manager = self.begin()

    def begin(self) -> TuningManager:
        self.manager = TuningManager(
            SysFs(self.root),
            lambda: self.exclusive,
            lambda: PinningConfig(tuning=self.tuning, verify_seconds=1000),
            self.revision.changed,
            self.memory,
        )
        return self.manager

    def round(self, cpus: str | None = None) -> None:
        if cpus is not None:
            self.exclusive = CpuSet.parse(cpus)
        asyncio.run(self.manager.tune())

    def changed(self) -> dict[str, str]:
        """What differs from what the machine had at first."""
        return {path: value for path, value in self.kernel.values().items() if value != self.before[path]}


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(tmp_path, monkeypatch)


def test_exclusive_cpus_are_set_and_have_their_own_values_again_afterwards(stand: Stand) -> None:
    stand.round("2-3")
    assert stand.changed() == {
        POLICY.format(1, "scaling_governor"): "performance",
        LATENCY.format(2, RESUME): "n/a",
        LATENCY.format(3, RESUME): "n/a",
    }
    assert stand.manager.document() == {"cpus": "2-3", "set": 3, "refused": {}, "notes": []}
    stand.round("")
    assert not stand.changed() and not stand.memory.exists() and stand.manager.notes() == []


def test_nothing_is_read_or_kept_where_nothing_is_configured(stand: Stand) -> None:
    stand.tuning = TuningConfig()
    stand.round("0-7")
    assert not stand.kernel.writes and not stand.memory.exists()


def test_switching_it_off_gives_back_what_is_still_held(stand: Stand) -> None:
    stand.round("0-3")
    stand.tuning = TuningConfig()
    stand.round()
    assert not stand.changed()


def test_what_another_program_sets_is_set_again_while_it_is_ours_and_stays_afterwards(stand: Stand) -> None:
    path = LATENCY.format(2, RESUME)
    stand.round("2-3")
    for _ in range(2):
        stand.kernel.put(str(stand.root / path), "50")
        stand.round()
        assert stand.kernel.values()[path] == "n/a"
    (note,) = stand.manager.notes()
    assert note == (
        f"pinning.tuning: {stand.root / path} is set by another program again and again: keep tuned, "
        "power-profiles-daemon or cpupower off exclusive CPUs"
    )
    stand.kernel.put(str(stand.root / path), "50")
    stand.round("")
    assert stand.changed() == {path: "50"}


def test_a_range_moves_up_and_down_whatever_its_ends_were(stand: Stand) -> None:
    """The kernel lets a lower end never be above the upper one; both come out as configured, and as they were."""
    stand.tuning = TuningConfig(min_frequency_mhz=3000, max_frequency_mhz=3200)
    stand.round("0-1")
    stand.tuning = TuningConfig(min_frequency_mhz=900, max_frequency_mhz=1000)
    stand.round()
    ends = POLICY.format(0, "scaling_min_freq"), POLICY.format(0, "scaling_max_freq")
    assert [stand.kernel.values()[one] for one in ends] == ["900000", "1000000"]
    stand.tuning = TuningConfig(min_frequency_mhz=3000, max_frequency_mhz=3200)
    stand.round()
    assert [stand.kernel.values()[one] for one in ends] == ["3000000", "3200000"]
    stand.round("")
    assert not stand.changed()


def test_a_preference_beside_the_governor_performance_is_refused_by_the_kernel_and_said(stand: Stand) -> None:
    stand.tuning = TuningConfig(governor="performance", energy_performance_preference="power")
    stand.round("0-1")
    path = str(stand.root / POLICY.format(0, "energy_performance_preference"))
    assert stand.manager.notes() == [f"pinning.tuning: cannot write {path}: Device or resource busy, value 'power'"]
    stand.round("")
    assert not stand.changed()


def test_after_a_reboot_the_kernel_has_its_own_values_and_keeps_them(stand: Stand) -> None:
    stand.round("0-1")
    for path, value in stand.before.items():
        (stand.root / path).write_text(value)
    stand.kernel.reboot("boot-2")
    other = LATENCY.format(0, RESUME)
    stand.kernel.put(str(stand.root / other), "7")
    stand.exclusive = EMPTY
    stand.begin()
    stand.round()
    assert stand.changed() == {other: "7"}


def test_a_cpu_that_goes_offline_gets_its_value_back_when_it_returns(stand: Stand) -> None:
    path = stand.root / LATENCY.format(3, RESUME)
    stand.round("2-3")
    away = path.rename(path.with_suffix(".away"))
    stand.round("")
    assert f"{path}: it is gone for now, value '0'" in stand.manager.notes()[0]
    away.rename(path)
    stand.round()
    assert not stand.changed() and stand.manager.notes() == []


def test_a_policy_that_cannot_be_read_is_named_keeps_what_was_set_and_affects_no_other(stand: Stand) -> None:
    stand.round("0-3")
    garbage = stand.root / POLICY.format(1, "affected_cpus")
    before = garbage.read_text()
    garbage.write_text("two three\n")
    stand.round("0-5")
    assert {path for path, value in stand.changed().items() if value == "performance"} == {
        POLICY.format(number, "scaling_governor") for number in (0, 1, 2)
    }
    assert any(str(garbage) in one and "'two three'" in one for one in stand.manager.notes())
    garbage.write_text(before)
    stand.round("")
    assert not stand.changed() and stand.manager.notes() == []


def test_a_damaged_record_is_said_and_harms_nothing(stand: Stand) -> None:
    stand.round("0-1")
    stand.memory.write_bytes(b"{")
    stand.begin()
    stand.round()
    assert "CPUs that were tuned before stay as they are" in stand.manager.notes()[0]
    assert stand.kernel.values()[POLICY.format(0, "scaling_governor")] == "performance"


def test_nothing_is_written_where_it_cannot_be_recorded(stand: Stand) -> None:
    stand.memory.mkdir(parents=True)
    (stand.memory / "full").write_text("")
    stand.round("0-1")
    assert not stand.kernel.writes
    assert "cannot" in stand.manager.notes()[0]


def test_it_follows_what_is_held_and_the_configuration(stand: Stand) -> None:
    async def run() -> None:
        leading = asyncio.create_task(stand.manager.lead())
        stand.exclusive = CpuSet.parse("0-1")
        stand.revision.bump()
        await until(lambda: stand.changed().keys() >= {POLICY.format(0, "scaling_governor")})
        stand.tuning = TuningConfig()
        stand.revision.bump()
        await until(lambda: not stand.changed())
        leading.cancel()

    asyncio.run(run())


def test_killed_at_any_step_of_any_history_it_ends_as_the_ledger_says(stand: Stand) -> None:
    """5,000 steps, a tenth of them in every run: CPUs held and released, configurations, kill -9 between any writes."""
    chance = random.Random(4)
    configs = [
        FAST,
        TuningConfig(),
        TuningConfig(min_frequency_mhz=2000, max_frequency_mhz=2100),
        TuningConfig(governor="performance", energy_performance_preference="performance", max_frequency_mhz=1000),
    ]
    for _ in range(share_of(5000, 0.1)):
        stand.exclusive = CpuSet(cpu for cpu in range(8) if chance.random() < 0.5)
        stand.tuning = chance.choice(configs)
        if chance.random() < 0.5:
            stand.kernel.dies_after = chance.randrange(6)
        try:
            stand.round()
        except Dead:
            stand.begin()
        stand.kernel.dies_after = None
        if chance.random() < 0.3:
            stand.round()
            if stand.tuning == FAST:
                held = set(stand.exclusive)
                assert {one for one in stand.changed() if RESUME in one} == {LATENCY.format(c, RESUME) for c in held}
    stand.round("")
    assert not stand.changed() and not stand.memory.exists()
