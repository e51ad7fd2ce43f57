"""Events on the wire: of events.k8s.io/v1, and the same in the core group, where kubelet's credentials may write them.

Source: pkg/apis/core/validation/events.go and plugin/pkg/auth/authorizer/rbac/bootstrappolicy (Kubernetes 1.36).
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NAMESPACE = "default"
"""Events of objects without a namespace, such as a Node, lie here."""
LONGEST_NOTE_BYTES, LONGEST_INSTANCE, LONGEST_NODE = 1024, 128, 220
_IN_CORE = MappingProxyType(
    {"regarding": "involvedObject", "note": "message", "reportingController": "reportingComponent"}
)


class PodRef(NamedTuple):
    """A pod that an Event is about."""

    namespace: str
    name: str
    uid: str


def on_node(
    node: str, controller: str, reason: str, note: str, *, action: str, warns: bool, at: float
) -> dict[str, Any]:
    """Return an Event on a Node, as events.k8s.io/v1 has it. A note that is too long is cut.

    controller: the name under which it is reported. at: seconds since the epoch. The UID of the Node is its name, as in
    kubelet's own Events: `kubectl describe node` finds both.
    """
    regarding = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node}
    return _event(regarding, node, controller, reason, note, action, warns=warns, at=at)


def on_pod(
    pod: PodRef, node: str, controller: str, reason: str, note: str, *, action: str, warns: bool, at: float
) -> dict[str, Any]:
    """Return an Event on a pod, like on_node()."""
    regarding = {"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
    return _event(regarding, node, controller, reason, note, action, warns=warns, at=at)


def _event(
    regarding: Mapping[str, str],
    node: str,
    controller: str,
    reason: str,
    note: str,
    action: str,
    *,
    warns: bool,
    at: float,
) -> dict[str, Any]:
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    name = f"{regarding['name'][:LONGEST_NODE].rstrip('.-')}.{secrets.token_hex(8)}"
    return {
        "metadata": {"name": name, "namespace": regarding.get("namespace", NAMESPACE)},
        "eventTime": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": controller,
        "reportingInstance": node[:LONGEST_INSTANCE],
        "action": action,
        "reason": reason,
        "type": "Warning" if warns else "Normal",
        "regarding": dict(regarding),
        "note": note.encode("utf-8", "backslashreplace")[:LONGEST_NOTE_BYTES].decode("utf-8", "ignore"),
    }


def in_core(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an Event of events.k8s.io/v1 as the core group has it."""
    return {_IN_CORE.get(name, name): value for name, value in event.items()}
