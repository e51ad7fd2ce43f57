"""MIG through NVML's own process, against a library that decides like the driver and keeps its state in a file."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.host.nvml.client import Probe
from nodeagent.host.nvml.values import (
    Completed,
    Create,
    Destroy,
    Failure,
    GpuInstance,
    Made,
    MigState,
    RefusedByDriver,
    SetMode,
    Snapshot,
)
from tests.support.mig_driver import CARDS, MigDriver, profiles_of, uuid

CREATE_GI, CREATE_CI = "nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlGpuInstanceCreateComputeInstance"
DEADLINE_S = 20.0


@contextlib.asynccontextmanager
async def probing(driver: MigDriver) -> AsyncIterator[Probe]:
    probe = Probe(env=driver.env, backoff_s=0)
    try:
        yield probe
    finally:
        await probe.close()


def request(profile: int, start: int, size: int, gpu: int = 0, gi: int | None = None) -> Create:
    return Create(gpu=uuid(gpu), profile=profile, start=start, size=size, gi=gi)


@pytest.mark.parametrize("card", sorted(CARDS))
async def test_a_gpu_in_mig_mode_shows_its_profiles_and_placements(tmp_path: Path, card: str) -> None:
    async with probing(MigDriver.of(tmp_path / "state", card)) as probe:
        answer = await probe.snapshot(DEADLINE_S)
    assert isinstance(answer, Snapshot), answer
    (gpu,) = answer.gpus
    assert (gpu.mig_enabled, gpu.mig_pending, gpu.processes) == (True, True, 0)
    assert sorted(gpu.profiles, key=lambda one: one.id) == sorted(profiles_of(card), key=lambda one: one.id)
    assert gpu.instances == ()


async def test_a_gpu_that_is_not_in_mig_mode_shows_none(tmp_path: Path) -> None:
    async with probing(MigDriver.of(tmp_path / "state", "h100-80", mig=False)) as probe:
        answer = await probe.snapshot(DEADLINE_S)
    assert isinstance(answer, Snapshot), answer
    assert (answer.gpus[0].mig_enabled, answer.gpus[0].profiles, answer.gpus[0].instances) == (False, (), ())


async def test_instances_of_others_are_listed_where_they_lie_with_or_without_a_compute_instance(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.make(0, "3g.40gb", 4, id=2)
    driver.make(0, "1g.10gb", 0, id=7, complete=False)
    async with probing(driver) as probe:
        answer, state = await probe.snapshot(DEADLINE_S), await probe.mig_state(uuid(0))
    assert isinstance(answer, Snapshot), answer
    assert isinstance(state, MigState), state
    assert (
        state.instances
        == answer.gpus[0].instances
        == (
            GpuInstance(id=2, profile=9, start=4, size=4),
            GpuInstance(id=7, profile=19, start=0, size=1),
        )
    )
    assert [mig.gpu_instance for mig in state.migs] == [2]


async def test_an_instance_is_made_exactly_where_it_is_asked_for_and_destroyed_again(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80", "h100-80")
    async with probing(driver) as probe:
        made = await probe.create(request(9, 4, 4, gpu=1))
        assert isinstance(made, Made), made
        assert made.uuid == f"MIG-00000001-0000-0000-0000-{made.gi:012x}"
        assert driver.there() == {(1, "3g.40gb", 4)}
        assert driver.instances()[0].complete
        assert await probe.destroy(Destroy(gpu=uuid(1), gi=made.gi)) == Completed()
        assert driver.instances() == []
        assert await probe.destroy(Destroy(gpu=uuid(1), gi=made.gi)) == Completed()


async def test_what_does_not_fit_is_refused_with_the_drivers_words_and_the_helper_lives_on(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.make(0, "1g.10gb", 6)
    async with probing(driver) as probe:
        await probe.snapshot(DEADLINE_S)
        pid = probe.pid
        assert await probe.create(request(9, 4, 4)) == RefusedByDriver(reason="Insufficient Resources")
        assert probe.pid == pid
    assert driver.there() == {(0, "1g.10gb", 6)}


async def test_a_failed_compute_instance_leaves_no_gpu_instance(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.fault(CREATE_CI, "23")
    async with probing(driver) as probe:
        assert await probe.create(request(9, 4, 4)) == RefusedByDriver(reason="Insufficient Resources")
    assert driver.instances() == []


async def test_an_instance_without_a_compute_instance_is_completed(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.make(0, "3g.40gb", 4, id=3, complete=False)
    async with probing(driver) as probe:
        made = await probe.create(request(9, 4, 4, gi=3))
        assert isinstance(made, Made), made
        assert made.gi == 3
        assert await probe.create(request(9, 4, 4, gi=3)) == made
    assert [one.complete for one in driver.instances()] == [True]


async def test_an_instance_in_use_is_not_destroyed(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.make(0, "3g.40gb", 4, id=3)
    driver.use(0, 3)
    async with probing(driver) as probe:
        answer = await probe.destroy(Destroy(gpu=uuid(0), gi=3))
    assert isinstance(answer, RefusedByDriver), answer
    assert answer.in_use


@pytest.mark.parametrize(("what", "left"), [("hang", set[object]()), ("hang-after", {(0, "3g.40gb", 4)})])
async def test_a_creation_that_hangs_is_a_failure_that_says_nothing_of_its_effect(
    tmp_path: Path, what: str, left: set[object]
) -> None:
    """It ends at its deadline, and the next look shows what is there."""
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.fault(CREATE_GI, what)
    async with probing(driver) as probe:
        await probe.snapshot(DEADLINE_S)
        assert isinstance(await probe.create(request(9, 4, 4), 1.0), Failure)
        state = await probe.mig_state(uuid(0), DEADLINE_S)
        assert isinstance(state, MigState), state
        assert bool(state.instances) == bool(left)
    assert driver.there() == left


@pytest.mark.parametrize("needs_reset", [False, True])
async def test_the_mode_is_switched_at_once_or_at_the_next_reset(tmp_path: Path, needs_reset: bool) -> None:
    driver = MigDriver.of(tmp_path / "state", "a100-40", mig=False, needs_reset=needs_reset)
    async with probing(driver) as probe:
        assert await probe.set_mode(SetMode(gpu=uuid(0), enabled=True)) == Completed(pending=needs_reset)
        answer = await probe.snapshot(DEADLINE_S)
    assert isinstance(answer, Snapshot), answer
    assert (answer.gpus[0].mig_enabled, answer.gpus[0].mig_pending) == (not needs_reset, True)


async def test_a_lost_gpu_refuses_by_name_and_the_other_works(tmp_path: Path) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80", "h100-80")
    driver.lose(0)
    async with probing(driver) as probe:
        assert await probe.create(request(9, 4, 4)) == RefusedByDriver(reason="GPU is lost")
        assert isinstance(await probe.create(request(9, 4, 4, gpu=1)), Made)
        answers = await asyncio.gather(*(probe.mig_state(uuid(1)) for _ in range(3)))
    assert all(answer == answers[0] for answer in answers)
