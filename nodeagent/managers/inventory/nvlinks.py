"""The NVLinks of each GPU: which have been active since the machine was booted, in a file that outlives the agent, and
what errors they have had to correct since the last look.

Only what was active can be lost: boards have links that are not wired, and GPUs have links without a bridge. NVML shows
both like a link that has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.errors import HostError
from nodeagent.host.nvml.values import LinkErrors, NvGpu
from nodeagent.host.sysfs.record_file import RecordFile, UnreadableError
from nodeagent.telemetry.once import Once

FILE = "nvlinks.json"
"""In the state folder."""
Links = dict[str, frozenset[int]]
"""Numbers of links by the PCI address of their GPU."""
NO_ERRORS: Mapping[str, str] = MappingProxyType({})
MOST_CRC_ERRORS_A_SECOND = 100
"""From here on they matter: DCGM_LIMIT_MAX_NVLINK_CRC_ERROR of DCGM's dcgm_gpu_hardware_limits.h. A link that is
trained again or sends a packet again matters each time, as in DCGM's health watch of NVLinks."""


class _Document(msgspec.Struct, frozen=True):
    boot_id: str
    links: dict[str, tuple[int, ...]] = {}
    version: int = 1


class NvlinkMemory:
    """The links, in memory and in their file. What is forgotten by one agent of two stays forgotten in the other only
    after its restart."""

    def __init__(self, path: Path, boot_id: str) -> None:
        self._file = RecordFile(path, _Document)
        self._boot_id = boot_id
        self._links: Links = {}
        self._bad = Once("nvlinks-not-kept")

    @property
    def active_once(self) -> Mapping[str, frozenset[int]]:
        """Return the links that have been active, as far as `learn` has seen or read them."""
        return self._links

    def learn(self, gpus: tuple[NvGpu, ...]) -> None:
        """Remember the links that are active now, and write them if any is new. Blocks."""
        known = self._links or self._read()
        now = {gpu.pci_address: frozenset(gpu.nvlinks_active) for gpu in gpus if gpu.nvlinks_active}
        self._links = {
            one: known.get(one, frozenset()) | now.get(one, frozenset()) for one in known.keys() | now.keys()
        }
        if self._links != known:
            self._write()

    def forget(self, gpu: str) -> bool:
        """Forget the links of a GPU, as after a bridge was taken out. Return whether it had any. Blocks."""
        had = self._links.pop(gpu, None) is not None
        if had:
            self._write()
        return had

    def _read(self) -> Links:
        try:
            document = self._file.load()
        except UnreadableError as error:
            self._bad.report(str(error))
            return {}
        if document is None or document.boot_id != self._boot_id:
            return {}
        return {gpu: frozenset(links) for gpu, links in document.links.items()}

    def _write(self) -> None:
        links = {gpu: tuple(sorted(links)) for gpu, links in sorted(self._links.items())}
        try:
            self._file.save(_Document(boot_id=self._boot_id, links=links))
            self._bad.clear()
        except HostError as error:
            self._bad.report(str(error))


class NvlinkErrors:
    """What NVLinks have had to correct between two looks. A count that falls starts again, as after a reset."""

    def __init__(self) -> None:
        self._before: Mapping[str, LinkErrors] = {}
        self._looked_s = 0.0

    def grown(self, gpus: tuple[NvGpu, ...], now_s: float) -> Mapping[str, str]:
        """Return what grew since the last look, in words, by PCI address; GPUs without errors are left out.

        now_s: seconds of a steady clock.
        """
        before, since_s = self._before, now_s - self._looked_s
        self._before = {**before, **{gpu.pci_address: gpu.condition.links for gpu in gpus}}
        self._looked_s = now_s
        words = {one: _growth(before[one], self._before[one], since_s) for one in before}
        return {one: text for one, text in words.items() if text}


def _growth(before: LinkErrors, now: LinkErrors, since_s: float) -> str:
    recoveries, replays = _more(before.recoveries, now.recoveries), _more(before.replays, now.replays)
    crc = _more(before.crc, now.crc)
    found = [f"{recoveries} recoveries"] if recoveries else []
    found += [f"{replays} replays"] if replays else []
    found += [f"{crc} CRC errors"] if crc >= MOST_CRC_ERRORS_A_SECOND * since_s > 0 else []
    return f"its NVLinks have had errors: {', '.join(found)} in {since_s:.0f} s" if found else ""


def _more(before: int | None, now: int | None) -> int:
    return max(0, now - before) if before is not None and now is not None else 0
