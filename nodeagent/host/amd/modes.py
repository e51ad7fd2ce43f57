"""How AMD's GPUs are partitioned: what the driver shows, and what it is told.

Source: drivers/gpu/drm/amd/amdgpu/amdgpu_gfx.c of Linux 6.18 (current_compute_partition: EINVAL for a mode that is not
available, EBUSY while a process may use the GPU through KFD, EPERM during a reset, EIO if KFD does not come back) and
amdgpu_gmc.c (current_memory_partition: a request until the driver is loaded again, not shown in any file). The driver
announces neither with an event.
"""

from __future__ import annotations

from nodeagent.core.partitions.amd import AmdModes, Kind
from nodeagent.errors import HostError
from nodeagent.host.pci import driver_binding
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.host.vfio import TimedPut

DEADLINE_S = 60.0
"""The driver takes down KFD's part of the GPU and builds it again."""
_DEVICES = "sys/bus/pci/devices"
_NONE = ("", "UNKNOWN", "Not supported")


class AmdGpus:
    """The GPUs below a root. Every method blocks."""

    def __init__(self, sysfs: SysFs, put: TimedPut | None = None) -> None:
        self._sysfs = sysfs
        self._put = put or TimedPut(deadline_s=DEADLINE_S)

    def modes(self, address: str) -> AmdModes:
        """Return what the driver shows of a GPU. Raise HostError if it shows nothing now, as during a reset."""
        return AmdModes(
            uuid=self._one(address, "unique_id"),
            binding=driver_binding(self._sysfs, address),
            compute=self._one(address, "current_compute_partition"),
            computes=self._several(address, "available_compute_partition"),
            memory=self._one(address, "current_memory_partition"),
            memories=self._several(address, "available_memory_partition"),
        )

    def change(self, address: str, kind: Kind, mode: str) -> None:
        """Set the compute partition, or request the memory partition. Raise HostError, also if the compute partition
        is another one afterwards."""
        if self.hangs(address):
            raise HostError(f"cannot partition {address}: an earlier write has not ended")
        self._put(self._sysfs.path(f"{_DEVICES}/{address}/current_{kind}_partition"), mode)
        if kind is Kind.COMPUTE and (found := self._one(address, "current_compute_partition")) != mode:
            raise HostError(f"cannot set the compute partition of {address} to {mode}: it is {found or 'unknown'}")

    def hangs(self, address: str) -> bool:
        """Return whether a write that concerns a GPU has not ended: it may still take effect."""
        return self._put.hangs(address)

    def is_unchanged(self, address: str, found: str) -> bool:
        """Return whether a GPU has the compute partition that was found before, and gets no other by a write that has
        not ended. Raise HostError if that is unknown."""
        return not self.hangs(address) and self._one(address, "current_compute_partition") == found

    def _one(self, address: str, file: str) -> str:
        text = self._sysfs.text(f"{_DEVICES}/{address}/{file}", "")
        return "" if text in _NONE else text

    def _several(self, address: str, file: str) -> tuple[str, ...]:
        text = self._sysfs.text(f"{_DEVICES}/{address}/{file}", "")
        return () if text in _NONE else tuple(one.strip() for one in text.split(","))
