"""One Kubernetes Event on the Node for each change of the health of a device that a pod or a claim holds.

An Event is optional. It delays nothing, is not retried, and nothing is sent where no API server is configured. The
newest state counts: what changes while the pace is exhausted is told once, as it then is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nodeagent.aio.revision import Revision
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.health import HEALTHY, UNHEALTHY, UNKNOWN, DeviceState
from nodeagent.kube.event import on_node
from nodeagent.managers.event_sender import EventSender, Pace, Send
from nodeagent.managers.manager import Manager
from nodeagent.state.agent import Agent

_REASONS = {HEALTHY: "DeviceHealthy", UNHEALTHY: "DeviceUnhealthy", UNKNOWN: "DeviceHealthUnknown"}


class Change(NamedTuple):
    """The health of a device that is held, as it is to be told."""

    device: str
    state: DeviceState
    reason: str
    holders: tuple[str, ...]


class DeviceEvents(Manager):
    """Sends the Events. Only the leading agent does."""

    name = "device events"

    def __init__(
        self, agent: Agent, send: Send, node_name: str, controller: str, configured: bool, pace: Pace | None = None
    ) -> None:
        """controller: the name under which the Events are reported. configured: whether there is an API server."""
        self._agent = agent
        self._node = node_name
        self._controller = controller
        self._configured = configured
        self._sender = EventSender(send, pace)
        self._revision = Revision(*agent.revisions)
        self._told: dict[str, DeviceState] = {}
        """The state of each device that is held, as it was last told, or was good when it was first seen."""

    async def lead(self) -> None:
        """Send an Event for every change, until cancelled."""
        while self._configured:
            seen = self._revision.value
            if next(self._changes(), None) is None:
                await self._revision.changed(seen)
                continue
            await self._sender.ready()
            if (change := next(self._changes(), None)) is not None:
                await self._tell(change)

    def _changes(self) -> Iterator[Change]:
        """Yield what is to be told. Of a device that has left nothing is known, which is no news of its health."""
        inventory, ledger = self._agent.inventory, self._agent.ledger
        self._told = {one: state for one, state in self._told.items() if one in ledger.devices_held}
        for id in sorted(ledger.devices_held & inventory.device_by_id.keys()):
            ill = illness(inventory.device_by_id[id], self._agent.health)
            state, reason = (ill.state, ill.reason) if ill is not None else (HEALTHY, "")
            if state != self._told.setdefault(id, HEALTHY):
                yield Change(id, state, reason, _holders(ledger, id))

    async def _tell(self, change: Change) -> None:
        """Send one Event; whether it arrives or not, the change counts as told."""
        self._told[change.device] = change.state
        await self._sender.send(event_of(change, self._node, self._controller, time.time()))


def is_configured(kubeconfig: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether there is an API server: a kubeconfig, or the variables of a pod."""
    return bool(kubeconfig or environ.get("KUBERNETES_SERVICE_HOST"))


def event_of(change: Change, node: str, controller: str, at: float) -> dict[str, Any]:
    """Return the Event of a change. at: seconds since the epoch."""
    return on_node(
        node,
        controller,
        _REASONS[change.state],
        _note(change),
        action="HealthChanged",
        warns=change.state != HEALTHY,
        at=at,
    )


def _note(change: Change) -> str:
    """Return the device, the cause in the words of its health, and who holds it."""
    cause = f": {change.reason}" if change.reason else ""
    return f"device {change.device} is {change.state}{cause}; held by {', '.join(change.holders)}"


def _holders(ledger: Ledger, device: str) -> tuple[str, ...]:
    grants = (one for one in ledger.grants.values() if device in (*one.devices, *one.shares))
    return tuple(sorted({str(one.holder) for one in grants}))
