"""How a GPU is, through NVML's own process, against a library that is as strict as the driver, new or old."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.host.nvml.client import Probe
from nodeagent.host.nvml.values import Condition, FabricProbe, Failure, LinkErrors, NvGpu, Snapshot
from tests.support.mig_driver import MigDriver, library

DEADLINE_S = 20.0
INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, UNKNOWN = "2", "3", "4", "13", "999"
SRAM, FIELDS = "nvmlDeviceGetSramEccErrorStatus", "nvmlDeviceGetFieldValues"


@contextlib.asynccontextmanager
async def probing(driver: MigDriver, *, old: bool = False) -> AsyncIterator[Probe]:
    probe = Probe(env={**driver.env, "LD_LIBRARY_PATH": str(library(old=old))}, backoff_s=0)
    try:
        yield probe
    finally:
        await probe.close()


async def shown(driver: MigDriver, *, old: bool = False) -> NvGpu:
    """The first GPU as the helper answers."""
    async with probing(driver, old=old) as probe:
        answer = await probe.snapshot(DEADLINE_S)
    assert isinstance(answer, Snapshot), answer
    assert answer.errors == ()
    return answer.gpus[0]


@pytest.fixture
def driver(tmp_path: Path) -> MigDriver:
    return MigDriver.of(tmp_path / "state", "h100-80", mig=False)


async def test_a_gpu_without_faults_says_so_in_every_way_that_it_knows(driver: MigDriver) -> None:
    """A GPU without links has no errors of links, and one without a fabric no registration."""
    gpu = await shown(driver)
    assert (gpu.ecc_uncorrected, gpu.rows_pending, gpu.rows_failed) == (0, False, False)
    assert gpu.condition == Condition(
        ecc_lifetime=0, rows_remapped=0, banks_without_spare=0, sram_exceeded=False, clock_reasons=1, recovery=0
    )


async def test_every_sign_is_read(driver: MigDriver) -> None:
    signs = {
        "ecc_volatile": 2,
        "ecc_aggregate": 9,
        "rows_corrected": 1,
        "rows_uncorrected": 3,
        "rows_pending": 1,
        "rows_failed": 1,
        "banks_none": 5,
        "sram": 1,
        "clocks": 0x48,
        "fabric_state": 3,
        "fabric_health": 0x101,
        "links": 4,
        "links_down": 0b100,
        "replays": 7,
        "recoveries": 8,
        "crc_flit": 10,
        "crc_data": 11,
        "recovery": 4,
    }
    for name, value in signs.items():
        driver.sign(0, name, value)
    gpu = await shown(driver)
    assert (gpu.ecc_uncorrected, gpu.rows_pending, gpu.rows_failed) == (2, True, True)
    assert (gpu.nvlinks_active, gpu.nvlinks_inactive) == ((0, 1, 3), (2,))
    assert gpu.condition == Condition(
        ecc_lifetime=9,
        rows_remapped=4,
        banks_without_spare=5,
        sram_exceeded=True,
        clock_reasons=0x49,
        fabric=FabricProbe(state=3, status=0, health=0x101),
        links=LinkErrors(replays=7, recoveries=8, crc=21),
        recovery=4,
    )


async def test_a_driver_that_lacks_functions_is_no_fault_of_the_gpu(driver: MigDriver) -> None:
    """Before 535: the clocks are known under their former name, the fabric without its health."""
    driver.sign(0, "clocks", 0x80)
    driver.sign(0, "fabric_state", 2)
    driver.sign(0, "sram", 1)
    driver.sign(0, "recovery", 1)
    condition = (await shown(driver, old=True)).condition
    assert condition.clock_reasons == 0x81
    assert condition.fabric == FabricProbe(state=2, status=0)
    assert (condition.sram_exceeded, condition.recovery) == (None, None)


async def test_a_driver_that_knows_only_an_older_version_of_a_structure_is_asked_for_that(driver: MigDriver) -> None:
    driver.sign(0, "fabric_state", 3)
    driver.sign(0, "fabric_status", 10)
    driver.sign(0, "fabric_health", 1)
    driver.sign(0, "fabric_version", 2)
    gpu = await shown(driver)
    assert gpu.condition.fabric == FabricProbe(state=3, status=10, health=1)
    assert gpu.fabric is None


@pytest.mark.parametrize("code", [INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND])
async def test_what_cannot_be_asked_is_unknown_and_the_rest_is_read(driver: MigDriver, code: str) -> None:
    driver.sign(0, "ecc_aggregate", 4)
    driver.fault(SRAM, code)
    driver.fault(FIELDS, code)
    condition = (await shown(driver)).condition
    assert (condition.sram_exceeded, condition.links, condition.recovery) == (None, LinkErrors(), None)
    assert condition.ecc_lifetime == 4


async def test_a_gpu_whose_condition_cannot_be_read_is_an_error_of_that_gpu(tmp_path: Path) -> None:
    """It is not shown as one without faults, and the next is read."""
    driver = MigDriver.of(tmp_path / "state", "h100-80", "h100-80")
    driver.fault(SRAM, UNKNOWN)
    async with probing(driver) as probe:
        answer = await probe.snapshot(DEADLINE_S)
    assert isinstance(answer, Snapshot), answer
    assert [gpu.pci_address for gpu in answer.gpus] == ["0000:3b:00.0"]
    assert answer.errors[0].startswith("cannot read GPU 0000:1b:00.0 through NVML: ")


async def test_a_driver_that_hangs_over_the_condition_is_late(driver: MigDriver) -> None:
    driver.fault(SRAM, "hang")
    async with probing(driver) as probe:
        answer = await probe.snapshot(2.0)
        assert isinstance(answer, Failure), answer
        assert isinstance(await probe.snapshot(DEADLINE_S), Snapshot)


async def test_in_mig_mode_errors_are_known_of_each_instance_and_rows_of_the_gpu_only_while_there_is_none(
    tmp_path: Path,
) -> None:
    driver = MigDriver.of(tmp_path / "state", "h100-80")
    driver.sign(0, "rows_pending", 1)
    driver.sign(0, "ecc_volatile", 3)
    gpu = await shown(driver)
    assert (gpu.ecc_uncorrected, gpu.rows_pending, gpu.migs) == (None, True, ())
    driver.make(0, "1g.10gb", 0, id=7)
    driver.make(0, "1g.10gb", 1, id=8)
    driver.errors(0, 8, 3)
    gpu = await shown(driver)
    assert (gpu.ecc_uncorrected, gpu.rows_pending, gpu.condition.rows_remapped) == (None, None, None)
    assert {mig.gpu_instance: mig.ecc_uncorrected for mig in gpu.migs} == {7: 0, 8: 3}
    driver.fault("nvmlDeviceGetMemoryErrorCounter", NOT_SUPPORTED)
    assert sorted(str(mig.ecc_uncorrected) for mig in (await shown(driver)).migs) == ["3", "None"]
