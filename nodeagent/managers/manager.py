"""The interface that all managers share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nodeagent.config.schema import Config

Followed = Callable[[], Awaitable[None]]
"""What is done after a grant and before it is answered."""


async def nothing_follows() -> None:
    """Do nothing after a grant."""


class Manager:
    """Keeps one desired state in force. Building one starts nothing.

    The daemon has a list of managers. It applies each configuration to all of them in order, runs `serve` of all, and
    `lead` of all while this agent leads the node. On shutdown it calls `withdraw`, cancels both, and closes them in
    reverse order. The methods here do nothing: a manager overrides only those it needs.
    """

    name = "manager"
    """Used in the log and as the name of its tasks."""

    async def apply(self, config: Config) -> None:
        """Apply a configuration. Also called when a kubelet has started, since it may manage different resources than
        before."""

    async def serve(self) -> None:
        """Do what every agent on a node does, until cancelled."""

    async def lead(self) -> None:
        """Do what only the leading agent on a node does, until cancelled."""

    def not_ready(self) -> list[str]:
        """Return the reasons why the agent is not ready, one sentence each."""
        return []

    def notes(self) -> list[str]:
        """Return what an admin may want to change, one sentence each."""
        return []

    def document(self) -> dict[str, Any]:
        """Return the state for `nodeagent status -o json`, in plain types."""
        return {}

    async def withdraw(self) -> None:
        """Stop offering anything to kubelet, before any task is cancelled."""

    async def close(self) -> None:
        """Wait for work in progress and release open resources."""
