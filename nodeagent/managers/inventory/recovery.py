"""Lets devices recover when they are due."""

from __future__ import annotations

import asyncio
import contextlib

from nodeagent.state.agent import Agent


async def recoveries(agent: Agent) -> None:
    """Mark devices as recovered when they are due, until cancelled."""
    seen = 0
    while True:
        due = agent.recover_due()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due):
                seen = await agent.revisions.health.changed(seen)
