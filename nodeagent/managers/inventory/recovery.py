"""Lets devices recover when their time has come."""

from __future__ import annotations

import asyncio
import contextlib

from nodeagent.state.agent import Agent


async def recoveries(agent: Agent) -> None:
    """Let devices recover when their time has come."""
    seen = 0
    while True:
        due = agent.recover_due()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due):
                seen = await agent.revisions.health.changed(seen)
