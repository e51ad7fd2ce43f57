"""A Lease (coordination.k8s.io/v1): which of several agents acts for the cluster. Pure.

The rules are those of client-go's leader election: a holder renews it, and another one takes it over once it has seen
no change of it for as long as it lasts, measured by its own clock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

Object = dict[str, Any]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What a Lease says."""

    holder: str = ""
    duration_s: float = 0.0
    renewed: str = ""
    """As its holder wrote it."""
    transitions: int = 0


def read(document: Mapping[str, Any]) -> Held:
    """Return what a Lease says. What is missing or of another type counts as not said."""
    spec = document.get("spec")
    said: Mapping[str, Any] = spec if isinstance(spec, dict) else {}
    holder, renewed = said.get("holderIdentity"), said.get("renewTime")
    duration, transitions = said.get("leaseDurationSeconds"), said.get("leaseTransitions")
    return Held(
        holder=holder if isinstance(holder, str) else "",
        duration_s=float(duration) if isinstance(duration, int) else 0.0,
        renewed=renewed if isinstance(renewed, str) else "",
        transitions=transitions if isinstance(transitions, int) else 0,
    )


def taken(
    before: Mapping[str, Any] | None, name: str, namespace: str, holder: str, duration_s: int, now_unix_s: float
) -> Object:
    """Return the Lease as its holder writes it, in place of `before`, or new if that is None."""
    found = read(before) if before is not None else Held()
    at = _micro_time(now_unix_s)
    again = found.holder == holder
    spec = {
        "holderIdentity": holder,
        "leaseDurationSeconds": duration_s,
        "acquireTime": (before or {}).get("spec", {}).get("acquireTime", at) if again else at,
        "renewTime": at,
        "leaseTransitions": found.transitions + (not again and before is not None),
    }
    metadata = dict(before["metadata"]) if before is not None else {"name": name, "namespace": namespace}
    metadata.pop("managedFields", None)
    return {"metadata": metadata, "spec": spec}


def _micro_time(at_unix_s: float) -> str:
    """Return a MicroTime."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at_unix_s))}.{int(at_unix_s % 1 * 1_000_000):06d}Z"
