"""Events on the wire: of events.k8s.io/v1, and the same in the core group, where kubelet's credentials may write them.

Equal Events have the same name: one that an earlier agent wrote, or the other one of a rolling upgrade, is found again
without being listed.

Source: pkg/apis/core/validation/events.go and plugin/pkg/auth/authorizer/rbac/bootstrappolicy (Kubernetes 1.36).
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.core.events.happenings import PodRef

NAMESPACE = "default"
"""Events of objects without a namespace, such as a Node, lie here."""
LONGEST_NOTE_BYTES, LONGEST_INSTANCE, LONGEST_NAME = 1024, 128, 220
_DIGEST_BYTES = 8
_IN_CORE = MappingProxyType(
    {"regarding": "involvedObject", "note": "message", "reportingController": "reportingComponent"}
)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What an Event says, without when and how often it happened."""

    pod: PodRef | None
    """What it is about; None for the Node."""
    node: str
    controller: str
    """The name under which it is reported."""
    reason: str
    action: str
    note: str
    warns: bool

    @property
    def namespace(self) -> str:
        """Return where it lies."""
        return self.pod.namespace if self.pod is not None else NAMESPACE

    @property
    def name(self) -> str:
        """Return the name of its object, which is that of all equal Events."""
        uid = self.pod.uid if self.pod is not None else self.node
        parts = (self.controller, self.node, uid, self.reason, self.note)
        digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "backslashreplace"), digest_size=_DIGEST_BYTES)
        about = self.pod.name if self.pod is not None else self.node
        return f"{about[:LONGEST_NAME].rstrip('.-')}.{digest.hexdigest()}"


def render(event: Event, *, first_at: float, count: int = 1, last_at: float = 0.0) -> dict[str, Any]:
    """Return an Event as events.k8s.io/v1 has it. Times are in seconds since the epoch.

    A note that is too long is cut. The UID of the Node is its name, as in kubelet's own Events: `kubectl describe node`
    finds both.
    """
    series = {"series": _series(count, last_at)} if count > 1 else {}
    return {
        "metadata": {"name": event.name, "namespace": event.namespace},
        "eventTime": _micro_time(first_at),
        "reportingController": event.controller,
        "reportingInstance": event.node[:LONGEST_INSTANCE],
        "action": event.action,
        "reason": event.reason,
        "type": "Warning" if event.warns else "Normal",
        "regarding": _regarding(event),
        "note": event.note.encode("utf-8", "backslashreplace")[:LONGEST_NOTE_BYTES].decode("utf-8", "ignore"),
        **series,
    }


def repeated(count: int, last_at: float) -> dict[str, Any]:
    """Return the merge patch of an Event that has happened `count` times, last at a time in seconds since the epoch.

    count: at least 2, as of a series.
    """
    return {"series": _series(count, last_at)}


def times(document: Mapping[str, Any]) -> int:
    """Return how often an Event has happened, as the API server has it."""
    found = (document.get("series") or {}).get("count")
    return found if isinstance(found, int) else 1


def in_core(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an Event of events.k8s.io/v1 as the core group has it."""
    return {_IN_CORE.get(name, name): value for name, value in event.items()}


def _regarding(event: Event) -> dict[str, str]:
    if (pod := event.pod) is None:
        return {"apiVersion": "v1", "kind": "Node", "name": event.node, "uid": event.node}
    return {"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid}


def _series(count: int, last_at: float) -> dict[str, Any]:
    return {"count": count, "lastObservedTime": _micro_time(last_at)}


def _micro_time(at: float) -> str:
    """Return a time as meta/v1 MicroTime has it."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
