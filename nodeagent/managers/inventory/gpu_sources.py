"""What NVML's answers say of the health of one GPU: one function for each source. docs/health.md has the table. Pure.

A source that is silent (None in what NVML says) gives no evidence, so that what it said before stays: a GPU whose
memory rows wait for a reset does not become healthy when it is divided into MIG instances, for which NVML no longer
answers. Source of all codes: nvml.h of CUDA 13 (NVIDIA/go-nvml 2f9e261).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from nodeagent.core.model.health import DEGRADED, HEALTHY, UNHEALTHY, UNKNOWN, DeviceState, Remedy
from nodeagent.host.nvml.values import NvGpu


class Finding(NamedTuple):
    """What one source says of a GPU."""

    state: DeviceState
    reason: str = ""
    remedy: Remedy = Remedy.NONE


GOOD = Finding(HEALTHY)
_SEVERITY = (HEALTHY, DEGRADED, UNKNOWN, UNHEALTHY)
_CLOCKS = (
    (0x40, "its clocks are halved or lower since it is too hot (hardware): check the cooling"),
    (0x80, "its clocks are halved or lower since its power supply asks for it (power brake): check the power"),
    (0x20, "its clocks are lowered since it or its memory is too hot: check the cooling"),
)
_HARDWARE_SLOWDOWN, _ITS_CAUSES = 0x08, 0x40 | 0x80
_SLOWED = "its clocks are halved or lower (hardware slowdown): check the cooling and the power"
_FABRIC_STATES = {1: "has not begun", 2: "is in progress"}
_NO_FABRIC, _FABRIC_COMPLETED = 0, 3
_BANDWIDTH, _ROUTE_RECOVERY, _ROUTE, _TIMEOUT_RECOVERY = 0, 2, 4, 6
"""Positions in the health mask of fields of two bits; 1 is true."""
_CONFIGURATION = 8
"""Position of a field of four bits."""
_MISCONFIGURED = {
    2: "wrong system GUID",
    3: "wrong serial number of the chassis",
    4: "no partition",
    5: "too few NVLinks",
    6: "incompatible firmware",
    7: "wrong location",
    8: "invalid state of the GPU",
}
_RECOVERY = {
    0: GOOD,
    1: Finding(UNHEALTHY, "the driver asks for a reset of the GPU", Remedy.RESET),
    2: Finding(UNHEALTHY, "the driver asks for a reboot of the node", Remedy.REBOOT),
    3: Finding(UNHEALTHY, "the driver asks for an end of all peer-to-peer traffic of the GPU", Remedy.DRAIN),
    4: Finding(UNHEALTHY, "the driver asks for a reset of the GPU once it is drained", Remedy.RESET),
    5: Finding(DEGRADED, "the driver asks for a recovery of its IMEX domain"),
    6: Finding(UNHEALTHY, "the driver asks for a reset of the GPU's bus", Remedy.REBOOT),
    7: Finding(UNHEALTHY, "the driver asks for a reboot of the node", Remedy.REBOOT),
}
"""6 and 7 are in pynvml 13.615, not yet in the header."""


def ecc(gpu: NvGpu) -> Finding | None:
    """Uncorrected memory errors; the count starts again when the driver is loaded or the GPU is reset. Those that the
    driver attributes to a MIG instance are that instance's."""
    if gpu.ecc_uncorrected is None:
        return None
    errors = gpu.ecc_uncorrected - sum(one.ecc_uncorrected or 0 for one in gpu.migs)
    if errors <= 0:
        return GOOD
    return Finding(UNHEALTHY, f"{errors} uncorrected memory errors since the driver was loaded", Remedy.RESET)


def rows(gpu: NvGpu) -> Finding | None:
    """Memory rows that wait for a reset or could not be remapped."""
    if gpu.rows_failed is None and gpu.rows_pending is None:
        return None
    found = []
    if gpu.rows_failed:
        found.append(Finding(UNHEALTHY, "a memory row could not be remapped: replace the GPU", Remedy.REPLACE))
    if gpu.rows_pending:
        reason = "memory rows are remapped at the next reset: reset the GPU"
        found.append(Finding(UNHEALTHY, reason, Remedy.RESET))
    if banks := gpu.condition.banks_without_spare:
        found.append(Finding(DEGRADED, f"{banks} memory banks have no spare row left"))
    return _worst(found)


def sram(gpu: NvGpu) -> Finding | None:
    """Whether there were too many uncorrected errors of the SRAM over the GPU's life."""
    if gpu.condition.sram_exceeded is None:
        return None
    reason = "more uncorrected SRAM errors than NVIDIA's field diagnostics tolerate: replace the GPU"
    return Finding(UNHEALTHY, reason, Remedy.REPLACE) if gpu.condition.sram_exceeded else GOOD


def clocks(gpu: NvGpu) -> Finding | None:
    """Whether heat or the power supply slow the GPU down. That it idles, or is at its power limit, is normal."""
    bits = gpu.condition.clock_reasons
    if bits is None:
        return None
    found = [Finding(DEGRADED, reason) for bit, reason in _CLOCKS if bits & bit]
    if bits & _HARDWARE_SLOWDOWN and not bits & _ITS_CAUSES:
        found.append(Finding(DEGRADED, _SLOWED))
    return _worst(found)


def fabric(gpu: NvGpu) -> Finding | None:
    """How the GPU stands with its fabric manager. CUDA starts on a GPU of an NVSwitch system only once it is
    registered (Fabric Manager user guide)."""
    probe = gpu.condition.fabric
    if probe is None:
        return None
    if probe.state == _NO_FABRIC:
        return GOOD
    if probe.state in _FABRIC_STATES:
        return Finding(UNKNOWN, f"its registration with the fabric manager {_FABRIC_STATES[probe.state]}")
    if probe.state != _FABRIC_COMPLETED:
        return Finding(UNKNOWN, f"its registration with the fabric manager is in state {probe.state}")
    if probe.status:
        return Finding(UNHEALTHY, f"its registration with the fabric manager has failed (NVML error {probe.status})")
    return _worst(_of_mask(probe.health))


def _of_mask(mask: int) -> Iterator[Finding]:
    wrong = mask >> _CONFIGURATION & 0xF
    if wrong > 1:
        what = _MISCONFIGURED.get(wrong, f"code {wrong}")
        yield Finding(UNHEALTHY, f"its NVLink fabric is configured incorrectly: {what}")
    if _is_true(mask, _ROUTE):
        yield Finding(UNHEALTHY, "a route of its NVLink fabric is unhealthy", Remedy.RESET)
    if _is_true(mask, _BANDWIDTH):
        yield Finding(DEGRADED, "its NVLink fabric has less bandwidth than it could have")
    if _is_true(mask, _ROUTE_RECOVERY) or _is_true(mask, _TIMEOUT_RECOVERY):
        yield Finding(DEGRADED, "its NVLink fabric is recovering from an error")


def _is_true(mask: int, at: int) -> bool:
    return mask >> at & 3 == 1


def recovery(gpu: NvGpu) -> Finding | None:
    """What the driver asks for."""
    action = gpu.condition.recovery
    if action is None:
        return None
    return _RECOVERY.get(action, Finding(UNKNOWN, f"the driver asks for a recovery that is not known here ({action})"))


def _worst(found: Iterable[Finding]) -> Finding:
    """Return what the worst findings say together."""
    every = list(found)
    state = max((one.state for one in every), key=_SEVERITY.index, default=HEALTHY)
    counting = [one for one in every if one.state == state]
    remedy = max((one.remedy for one in counting), key=tuple(Remedy).index, default=Remedy.NONE)
    return Finding(state, "; ".join(one.reason for one in counting), remedy)


OF_WHOLE: Mapping[str, Callable[[NvGpu], Finding | None]] = MappingProxyType(
    {"ecc": ecc, "rows": rows, "sram": sram, "clocks": clocks, "fabric": fabric, "recovery": recovery}
)
"""By name of the source."""
IGNORABLE = frozenset({"nvlink", "clocks", "fabric", "recovery"})
"""Sources that health.ignore can switch off; what the driver alone knows of memory always counts."""


def readings(gpu: NvGpu) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Yield (source, numbers by name) that were read, as far as they are known."""
    one = gpu.condition
    every: dict[str, dict[str, int | None]] = {
        "ecc": {"uncorrected": gpu.ecc_uncorrected, "uncorrected_lifetime": one.ecc_lifetime},
        "rows": {"remapped": one.rows_remapped, "banks_without_spare": one.banks_without_spare},
        "nvlink": {"replays": one.links.replays, "recoveries": one.links.recoveries, "crc_errors": one.links.crc},
        "clocks": {"reasons": one.clock_reasons},
    }
    for source, numbers in every.items():
        if known := {name: value for name, value in numbers.items() if value is not None}:
            yield source, known
