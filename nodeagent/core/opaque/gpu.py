"""The form of configurations of GPUs."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from nodeagent.core.model.quantity import parse_quantity
from nodeagent.core.opaque.form import Form, Interrupts, Percent, VfioDriver, at
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig
from nodeagent.errors import InputError


class _TimeSlicing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    interval: Literal["Default", "Short", "Medium", "Long"] = "Default"


class _Mps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    active_thread_percentage: Percent | None = None
    pinned_device_memory_limit: str | None = None

    def pinned_bytes(self) -> int | None:
        if self.pinned_device_memory_limit is None:
            return None
        with at("$.mps.pinnedDeviceMemoryLimit"):
            size = parse_quantity(self.pinned_device_memory_limit)
            if not size:
                raise InputError("a limit of nothing")
            return size


class GpuForm(Form, frozen=True):
    """GPUs: the driver, or how they are shared and what containers get of the driver; and their interrupts."""

    driver: VfioDriver = ""
    interrupts: Interrupts = ""
    time_slicing: _TimeSlicing | None = None
    mps: _Mps | None = None
    driver_capabilities: tuple[Literal["graphics", "video"], ...] = ()

    def settings(self) -> OpaqueConfig:
        found = replace(self._sharing(), driver_capabilities=frozenset(self.driver_capabilities))
        if self.driver and found != NO_SETTINGS:
            raise InputError("$.driver excludes all other keys: a guest brings a driver of its own")
        return replace(found, driver=self.driver, interrupts=self.interrupts)

    def _sharing(self) -> OpaqueConfig:
        if self.mps is None:
            return OpaqueConfig(time_slice=self.time_slicing.interval if self.time_slicing is not None else "")
        if self.time_slicing is not None:
            raise InputError("$.timeSlicing and $.mps exclude each other")
        percent, size = self.mps.active_thread_percentage, self.mps.pinned_bytes()
        return OpaqueConfig(mps=True, mps_threads_percent=percent, mps_pinned_bytes=size)
