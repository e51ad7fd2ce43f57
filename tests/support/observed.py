"""What histograms have counted, for tests that look at how often more."""

from __future__ import annotations

from nodeagent.telemetry.metrics import REGISTRY


def observed(name: str, **labels: str) -> int:
    """How many times a histogram of the agent was observed: NAME without "nodeagent_" and "_seconds"."""
    return int(REGISTRY.get_sample_value(f"nodeagent_{name}_seconds_count", labels) or 0)


def total_s(name: str, **labels: str) -> float:
    """The sum of what it observed, in seconds."""
    return REGISTRY.get_sample_value(f"nodeagent_{name}_seconds_sum", labels) or 0.0
