"""The forms of configurations of CPUs, hugepages and memory."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.core.model.options import FULL_PCPUS, check_options
from nodeagent.core.model.quantity import parse_percent
from nodeagent.core.opaque.form import ClassName, Form, Percent, at
from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig
from nodeagent.errors import InputError

KERNEL_FOLDERS = ("/proc", "/sys")
_Ways = Annotated[int, msgspec.Meta(ge=1, le=32)]
_Mbps = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Utilization = (
    Annotated[int, msgspec.Meta(ge=0, le=100)]
    | Annotated[str, msgspec.Meta(pattern=r"^(max|100(\.0{1,2})?|[0-9]{1,2}(\.[0-9]{1,2})?)$")]
)
_Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$", max_length=1024)]


class CpuForm(Form, frozen=True):
    """CPUs: how they are chosen, what they have of their caches, and how fast they run."""

    options: tuple[str, ...] = ()
    numa: Literal["single", "restricted", "best-effort", ""] = ""
    core_type: Literal["performance", "efficiency", ""] = ""
    named_pool: ClassName = ""
    hide_hyperthreads: bool = False
    cache_ways: _Ways | None = None
    cache_class: ClassName = ""
    memory_bandwidth_percent: Percent | None = None
    memory_bandwidth_mbps: _Mbps | None = msgspec.field(default=None, name="memoryBandwidthMBps")
    uclamp_min: _Utilization | None = None
    uclamp_max: _Utilization | None = None
    uclamp_class: ClassName = ""

    def settings(self) -> OpaqueConfig:
        core = (f"require-{self.core_type}-cores",) if self.core_type else ()
        own = self.cache_ways, self.memory_bandwidth_percent, self.memory_bandwidth_mbps
        if self.cache_class and any(one is not None for one in own):
            raise InputError("$.cacheClass excludes $.cacheWays, $.memoryBandwidthPercent and $.memoryBandwidthMBps")
        if self.named_pool and any(one is not None for one in own):
            raise InputError("$.namedPool excludes $.cacheWays, $.memoryBandwidthPercent and $.memoryBandwidthMBps")
        if self.named_pool and self.hide_hyperthreads:
            raise InputError("$.namedPool excludes $.hideHyperthreads")
        low, high = self._clamp()
        whole = (FULL_PCPUS,) if self.hide_hyperthreads else ()
        with at("$.options"):
            options = check_options((*self.options, *core, *whole))
        return OpaqueConfig(
            options=options,
            numa=self.numa,
            named_pool=self.named_pool,
            hide_hyperthreads=self.hide_hyperthreads,
            cache_ways=self.cache_ways,
            cache_class=self.cache_class,
            memory_bandwidth_percent=self.memory_bandwidth_percent,
            memory_bandwidth_mbps=self.memory_bandwidth_mbps,
            uclamp_min_hundredths=low,
            uclamp_max_hundredths=high,
            uclamp_class=self.uclamp_class,
        )

    def _clamp(self) -> tuple[int | None, int | None]:
        """Return the lowest and the highest utilization, in hundredths of a percent."""
        said = self.uclamp_min, self.uclamp_max
        if self.uclamp_class and any(one is not None for one in said):
            raise InputError("$.uclampClass excludes $.uclampMin and $.uclampMax")
        if self.named_pool and (self.uclamp_class or any(one is not None for one in said)):
            raise InputError("$.namedPool excludes $.uclampMin, $.uclampMax and $.uclampClass")
        low, high = (None if one is None else parse_percent(one) for one in said)
        if low is not None and high is not None and low > high:
            raise InputError(f"{self.uclamp_min} at $.uclampMin is above $.uclampMax, {self.uclamp_max}")
        return low, high


class HugepageForm(Form, frozen=True):
    """Hugepages: where they are mounted."""

    mount_path: _Path | None = None

    def settings(self) -> OpaqueConfig:
        if self.mount_path is None:
            return NO_SETTINGS
        parts = [part for part in self.mount_path.split("/") if part]
        if not parts or {".", ".."} & {*parts}:
            raise InputError(f"{self.mount_path!r} at $.mountPath, expected the path of a folder, without . and ..")
        if f"/{parts[0]}" in KERNEL_FOLDERS or parts == ["dev"]:
            raise InputError(f"{self.mount_path!r} at $.mountPath would hide the kernel's own files")
        return OpaqueConfig(mount_path="/" + "/".join(parts))


class MemoryForm(Form, frozen=True):
    """Memory has no settings yet."""
