"""`ras`: errors of the memory and the blocks of AMD's GPUs that could not be corrected.

Source: Documentation/gpu/amdgpu/ras.rst (Linux 6.12), "RAS Error Count sysfs Interface": a file BLOCK_err_count for
each block, with a line "ue: N" for uncorrected and one "ce: N" for corrected errors, counted since the driver was
loaded. Newer kernels have a line "de: N" for deferred ones. Reading them asks the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.model.device import Device
from nodeagent.core.model.health import HEALTHY, UNHEALTHY
from nodeagent.host.health.pcie import folder, is_function, sleeps
from nodeagent.host.health.source import Readings, Sight, Silence
from nodeagent.host.pci import AMD
from nodeagent.host.sysfs.lenient import Tolerant

_SUFFIX = "_err_count"
_NAMES = {"ue": "uncorrected", "ce": "corrected", "de": "deferred"}


class Ras:
    """The source `ras`."""

    name = "ras"
    period_s = 0.0

    def concerns(self, device: Device) -> bool:
        return device.kind == "gpu" and device.vendor == AMD and is_function(device)

    def look(self, reader: Tolerant, device: Device) -> Sight | Silence:
        path = f"{folder(device.id)}/ras"
        files = {name: f"{path}/{name}" for name in reader.names(path) if name.endswith(_SUFFIX)}
        if not files:
            return Silence.NOTHING_TO_SEE
        if sleeps(reader, device):
            return Silence.NO_ANSWER
        texts = {name.removesuffix(_SUFFIX): reader.if_told(file) or "" for name, file in files.items()}
        counts = {block: found for block, text in texts.items() if "ue" in (found := counts_of(text))}
        # While the GPU is reset, the driver answers with a sentence instead. A block that does not answer may be ill.
        seen = judged(counts)
        return Silence.NO_ANSWER if seen.state == HEALTHY and counts.keys() != texts.keys() else seen


def counts_of(text: str) -> dict[str, int]:
    """Return the counts in lines of "NAME: COUNT"; other lines are left out."""
    words = (line.partition(":") for line in text.splitlines())
    return {name.strip(): int(count) for name, _, count in words if count.strip().isascii() and count.strip().isdigit()}


def judged(counts: Mapping[str, Mapping[str, int]]) -> Sight:
    """Return what the counts of some blocks say."""
    bad = {block: one["ue"] for block, one in sorted(counts.items()) if one["ue"]}
    reason = f"{sum(bad.values())} uncorrected errors in {', '.join(bad)} since the driver was loaded" if bad else ""
    return Sight(UNHEALTHY if bad else HEALTHY, reason, _readings(counts))


def _readings(counts: Mapping[str, Mapping[str, int]]) -> Readings:
    return {
        f"{block}_{_NAMES[name]}": count
        for block, one in sorted(counts.items())
        for name, count in one.items()
        if name in _NAMES
    }
