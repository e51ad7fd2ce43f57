"""MIG through NVML: profiles, instances, and requests that change them. Part of the process that calls NVML.

Source: NVML API Reference Guide, "Multi Instance GPU Management".
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from nodeagent.core.partitions.geometry import Profile, Profiles
from nodeagent.host.nvml.values import Completed, Create, Destroy, GpuInstance, Made, MigState, SetMode

MIB = 1 << 20
_MOST_PLACEMENTS = 64
"""More than any GPU has for one profile."""


class MigControl:
    """The functions for MIG of an initialised library. Every method may raise pynvml.NVMLError."""

    def __init__(self, nvml: Any) -> None:  # the module pynvml, which has no types
        self._nvml = nvml
        self._known: dict[str, Profiles] = {}
        """What a model of GPU can be divided into does not change, so it is asked once for each GPU."""

    def profiles(self, uuid: str, handle: Any) -> Profiles:
        """Return what a GPU can be divided into; nothing if the driver does not say it."""
        if uuid not in self._known:
            self._known[uuid] = tuple(self._profiles(handle))
        return self._known[uuid]

    def instances(self, handle: Any, profiles: Profiles) -> tuple[GpuInstance, ...] | None:
        """Return the GPU instances, with or without compute instances, or None if they cannot be listed."""
        if not profiles:
            return None
        try:
            return tuple(sorted(self._instances(handle, profiles), key=lambda one: one.id))
        except (self._nvml.NVMLError_NoPermission, self._nvml.NVMLError_NotSupported):
            return None

    def create(self, one: Create) -> Made:
        """Make an instance at exactly one placement, with one compute instance over all of it; or complete one that has
        no compute instance yet. If that fails, nothing is left of what this call made."""
        handle = self.handle(one.gpu)
        if one.gi is not None:
            return self._complete(handle, self._nvml.nvmlDeviceGetGpuInstanceById(handle, one.gi))
        placement = self._nvml.c_nvmlGpuInstancePlacement_t(one.start, one.size)
        create = self._nvml.nvmlDeviceCreateGpuInstanceWithPlacement
        instance = create(handle, one.profile, ctypes.byref(placement))
        try:
            return self._complete(handle, instance)
        except self._nvml.NVMLError:
            self._nvml.nvmlGpuInstanceDestroy(instance)
            raise

    def destroy(self, one: Destroy) -> Completed:
        """Destroy an instance and its compute instances; one that is gone already is no error."""
        try:
            instance = self._nvml.nvmlDeviceGetGpuInstanceById(self.handle(one.gpu), one.gi)
        except self._nvml.NVMLError_NotFound:
            return Completed()
        for part in list(self._compute_instances(instance)):
            self._nvml.nvmlComputeInstanceDestroy(part)
        self._nvml.nvmlGpuInstanceDestroy(instance)
        return Completed()

    def set_mode(self, one: SetMode) -> Completed:
        """Switch a GPU into or out of MIG mode. If that waits for a reset, `pending` says so."""
        handle = self.handle(one.gpu)
        self._nvml.nvmlDeviceSetMigMode(handle, int(one.enabled))
        now, _ = self._nvml.nvmlDeviceGetMigMode(handle)
        return Completed(pending=bool(now) != one.enabled)

    def handle(self, uuid: str) -> Any:
        """Return the handle of a GPU."""
        return self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode())

    def processes(self, handle: Any) -> int | None:
        """Return how many processes compute on a GPU, or None if that is unknown."""
        try:
            return len(self._nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle))
        except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_FunctionNotFound):
            return None

    # ---------------------------------------------------------------- profiles

    def _profiles(self, handle: Any) -> Iterator[Profile]:
        for number in range(self._nvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            try:
                info = self._nvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, number)
                placements = self._placements(handle, info.id)
            except (
                self._nvml.NVMLError_NotSupported,
                self._nvml.NVMLError_InvalidArgument,
                self._nvml.NVMLError_FunctionNotFound,
                self._nvml.NVMLError_NoPermission,
            ):
                continue
            if placements:
                yield _profile(info, placements)

    def _placements(self, handle: Any, profile: int) -> list[tuple[int, int]]:
        found = (self._nvml.c_nvmlGpuInstancePlacement_t * _MOST_PLACEMENTS)()
        count = ctypes.c_uint(_MOST_PLACEMENTS)
        self._nvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile, found, ctypes.byref(count))
        return [(one.start, one.size) for one in found[: count.value]]

    # ---------------------------------------------------------------- instances

    def _instances(self, handle: Any, profiles: Profiles) -> Iterator[GpuInstance]:
        for one in profiles:
            found = (self._nvml.c_nvmlGpuInstance_t * max(1, one.most))()
            count = ctypes.c_uint(len(found))
            self._nvml.nvmlDeviceGetGpuInstances(handle, one.id, found, ctypes.byref(count))
            for instance in found[: count.value]:
                info = self._nvml.nvmlGpuInstanceGetInfo(instance)
                place = info.placement
                yield GpuInstance(id=info.id, profile=one.id, start=place.start, size=place.size)

    def _complete(self, handle: Any, instance: Any) -> Made:
        """Return an instance with a compute instance over all of it, making it if there is none."""
        gi = self._nvml.nvmlGpuInstanceGetInfo(instance).id
        parts = list(self._compute_instances(instance))
        if not parts:
            profile = max(self._compute_profiles(instance), key=lambda one: one[1])[0]
            parts = [self._nvml.nvmlGpuInstanceCreateComputeInstance(instance, profile)]
        ci = self._nvml.nvmlComputeInstanceGetInfo(parts[0]).id
        return Made(gi=gi, ci=ci, uuid=self._uuid(handle, gi, ci))

    def _compute_profiles(self, instance: Any) -> Iterator[tuple[int, int]]:
        """Yield (id, compute slices) of what an instance can be divided into."""
        shared = self._nvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
        for number in range(self._nvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
            try:
                info = self._nvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, number, shared)
            except (self._nvml.NVMLError_NotSupported, self._nvml.NVMLError_InvalidArgument):
                continue
            yield info.id, info.sliceCount

    def _compute_instances(self, instance: Any) -> Iterator[Any]:
        for profile, _ in self._compute_profiles(instance):
            found = (self._nvml.c_nvmlComputeInstance_t * 8)()
            count = ctypes.c_uint(len(found))
            self._nvml.nvmlGpuInstanceGetComputeInstances(instance, profile, found, ctypes.byref(count))
            yield from found[: count.value]

    def _uuid(self, handle: Any, gi: int, ci: int) -> str:
        nvml = self._nvml
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                device = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
            except nvml.NVMLError_NotFound:
                continue
            if (nvml.nvmlDeviceGetGpuInstanceId(device), nvml.nvmlDeviceGetComputeInstanceId(device)) == (gi, ci):
                return str(nvml.nvmlDeviceGetUUID(device))
        raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)


def mig_state(control: MigControl, migs: Any, uuid: str) -> MigState:
    """Return the instances of one GPU. migs: returns the compute instances of a handle."""
    handle = control.handle(uuid)
    return MigState(instances=control.instances(handle, control.profiles(uuid, handle)), migs=migs(handle))


def _profile(info: Any, placements: list[tuple[int, int]]) -> Profile:
    name = info.name.decode() if isinstance(info.name, bytes) else str(info.name)
    return Profile(
        id=info.id,
        name=name.removeprefix("MIG "),
        memory_bytes=info.memorySizeMB * MIB,
        most=info.instanceCount,
        size=placements[0][1],
        starts=tuple(sorted(start for start, _ in placements)),
        slices=info.sliceCount,
        multiprocessors=info.multiprocessorCount,
        copy_engines=info.copyEngineCount,
        decoders=info.decoderCount,
        encoders=info.encoderCount,
        jpeg_engines=info.jpegCount,
        ofa_engines=info.ofaCount,
    )
