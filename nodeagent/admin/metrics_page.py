"""The page of metrics in Prometheus' text format.

The state is read at one moment, between two turns of the event loop; the text is made of it in a thread, one page at a
time, so that any number of scrapers see a whole page each. Gauges of the state have as many series as the
node has holders, so they are written directly: prometheus-client needs ten times as long for a line
(docs/performance.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec

from nodeagent.admin.state_gauges import STATE_GAUGES, Moment, Samples, StateGauge
from nodeagent.admin.watched import Watched
from nodeagent.telemetry import metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


class MetricsPage:
    """All metrics of the agent."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._texts = [GaugeText(gauge) for gauge in STATE_GAUGES]
        self._newest = _Rendered(at=-1e9, text=b"")
        self._turn = asyncio.Lock()

    async def text(self, *, max_age_s: float = 0.0) -> bytes:
        """Return the page. max_age_s: how old it may be, so that many clients cost no more than one."""
        asked = time.monotonic()
        async with self._turn:
            if self._newest.at < asked - max_age_s:
                at, read = time.monotonic(), self._read()
                self._newest = _Rendered(at=at, text=await asyncio.to_thread(self._page, read))
            return self._newest.text

    def _read(self) -> list[Samples]:
        moment = Moment(self._watched)
        return [gauge.samples(moment) for gauge in STATE_GAUGES]

    def _page(self, read: Sequence[Samples]) -> bytes:
        gauges = "".join(one.text(samples) for one, samples in zip(self._texts, read, strict=True))
        # Names of devices may have bytes that are no UTF-8.
        return metrics.render() + gauges.encode(errors="replace")


class _Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A page, and when the state was read for it (monotonic seconds)."""

    at: float
    text: bytes


class GaugeText:
    """One gauge in the text format 0.0.4. Names and labels of a series are written once, and kept while it is there."""

    def __init__(self, gauge: StateGauge) -> None:
        self.gauge = gauge
        self._head = f"# HELP {gauge.name} {_help(gauge.help)}\n# TYPE {gauge.name} gauge\n"
        self._order = sorted(range(len(gauge.labels)), key=gauge.labels.__getitem__)
        self._series: dict[tuple[str, ...], str] = {}

    def text(self, samples: Samples) -> str:
        """Return the lines of all samples."""
        known = self._series
        self._series = {values: known.get(values) or self._begun(values) for values in samples}
        pairs = zip(self._series.values(), samples.values(), strict=True)
        return self._head + "".join([f"{series} {_number(value)}\n" for series, value in pairs])

    def _begun(self, values: Sequence[str]) -> str:
        """Return what stands before the value of a series."""
        labels = [f'{self.gauge.labels[i]}="{values[i].translate(_ESCAPED)}"' for i in self._order]
        return f"{self.gauge.name}{{{','.join(labels)}}}" if labels else self.gauge.name


def _help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _number(value: float) -> str:
    """Return a number as Go reads it."""
    if value == 1:
        return "1.0"
    text = repr(float(value))
    return {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(text, text)
