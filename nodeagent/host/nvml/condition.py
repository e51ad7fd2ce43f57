"""How a GPU is, as NVML says it. Part of the process that calls NVML.

What a driver lacks, and what a GPU or its mode does not support, is None: that is no fault of the GPU. Source: nvml.h
of CUDA 13 (NVIDIA/go-nvml 2f9e261, NVML_API_VERSION 13).
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from nodeagent.host.nvml.values import Condition, Fabric, FabricProbe, LinkErrors

T = TypeVar("T")
_CLOCKS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
"""The name from driver 535 on, and the one before."""


class ConditionReader:
    """The functions that say how a GPU is, of an initialised library. Raises pynvml.NVMLError if the GPU is lost or
    NVML fails as a whole."""

    def __init__(self, nvml: Any) -> None:  # the module pynvml, which has no types
        self._nvml = nvml
        self._absent = (
            nvml.NVMLError_NotSupported,
            nvml.NVMLError_FunctionNotFound,
            nvml.NVMLError_NoPermission,
            nvml.NVMLError_ArgumentVersionMismatch,
            nvml.NVMLError_InvalidArgument,
        )
        self._counted = (
            nvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL,
            nvml.NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
            nvml.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL,
            nvml.NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL,
            nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
        )

    def read(self, handle: Any, rows: tuple[int, int, int, int] | None) -> Condition:
        """Return how a GPU is, but for its fabric. rows: the answer of nvmlDeviceGetRemappedRows, or None if there is
        none."""
        nvml = self._nvml
        lifetime = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_AGGREGATE_ECC
        banks = self._asked(nvml.nvmlDeviceGetRowRemapperHistogram, handle) if rows is not None else None
        replays, recoveries, flits, data, recovery = self._fields(handle)
        return Condition(
            ecc_lifetime=self._asked(nvml.nvmlDeviceGetTotalEccErrors, handle, *lifetime),
            rows_remapped=rows[0] + rows[1] if rows is not None else None,
            banks_without_spare=banks.none if banks is not None else None,
            sram_exceeded=self._sram_exceeded(handle),
            clock_reasons=self._clock_reasons(handle),
            links=LinkErrors(
                replays=replays,
                recoveries=recoveries,
                crc=(flits or 0) + (data or 0) if flits is not None or data is not None else None,
            ),
            recovery=recovery,
        )

    def instance_errors(self, handle: Any) -> int | None:
        """Return the uncorrected errors of a MIG instance. Of an instance only those of the SRAM are known."""
        nvml = self._nvml
        kind = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC, nvml.NVML_MEMORY_LOCATION_SRAM
        return self._asked(nvml.nvmlDeviceGetMemoryErrorCounter, handle, *kind)

    def _sram_exceeded(self, handle: Any) -> bool | None:
        told = self._nvml.c_nvmlEccSramErrorStatus_v1_t()
        answer = self._asked(self._nvml.nvmlDeviceGetSramEccErrorStatus, handle, ctypes.byref(told))
        return bool(told.bThresholdExceeded) if answer is not None else None

    def _clock_reasons(self, handle: Any) -> int | None:
        asked = (self._asked(getattr(self._nvml, name), handle) for name in _CLOCKS)
        return next((one for one in asked if one is not None), None)

    def fabric(self, handle: Any) -> tuple[Fabric | None, FabricProbe | None]:
        """Return the fabric with which a GPU is registered, and where it stands in that.

        By version 3 or 2 of the structure, or by the function without versions (driver 525 and later). A fabric that
        reaches no other node has no UUID.
        """
        nvml, versioned = self._nvml, self._nvml.nvmlDeviceGetGpuFabricInfoV
        forms = (
            (versioned, nvml.c_nvmlGpuFabricInfo_v3_t),
            (versioned, nvml.c_nvmlGpuFabricInfo_v2_t),
            (nvml.nvmlDeviceGetGpuFabricInfo, nvml.c_nvmlGpuFabricInfo_t),
        )
        for ask, form in forms:
            told = form()
            if self._asked(ask, handle, ctypes.byref(told)) is not None:
                probe = FabricProbe(state=told.state, status=told.status, health=getattr(told, "healthMask", 0))
                return self._reached(told, probe), probe
        return None, None

    def _reached(self, told: Any, probe: FabricProbe) -> Fabric | None:
        if probe.state != self._nvml.NVML_GPU_FABRIC_STATE_COMPLETED or probe.status != self._nvml.NVML_SUCCESS:
            return None
        cluster = uuid.UUID(bytes=bytes(told.clusterUuid))
        return Fabric(cluster=str(cluster), clique=told.cliqueId) if cluster.int else None

    def _fields(self, handle: Any) -> list[int | None]:
        """Return the values of fields, each None if it is not supported."""
        values = self._asked(self._nvml.nvmlDeviceGetFieldValues, handle, self._counted)
        return [self._value(one) for one in values] if values is not None else [None] * len(self._counted)

    def _value(self, one: Any) -> int | None:
        if one.nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        nvml = self._nvml
        member = {
            nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
            nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
            nvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
        }.get(one.valueType)
        return int(getattr(one.value, member)) if member is not None else None

    def _asked(self, ask: Callable[..., T], *args: object) -> T | None:
        try:
            return ask(*args)
        except self._absent:
            return None
