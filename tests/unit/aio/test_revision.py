"""Revisions that rise with others."""

from __future__ import annotations

import asyncio
import gc
import weakref

from nodeagent.aio.revision import Revision


async def test_a_revision_rises_with_each_of_its_sources_and_no_source_with_it() -> None:
    """Also over several steps."""
    left, right = Revision(), Revision()
    both = Revision(left, right)
    last = Revision(both)
    waiting = asyncio.create_task(last.changed(last.value))
    await asyncio.sleep(0)
    right.bump()
    assert await asyncio.wait_for(waiting, 5) == 2
    left.bump()
    both.bump()
    assert [one.value for one in (left, right, both, last)] == [2, 2, 4, 4]


async def test_a_revision_that_nobody_has_any_more_is_forgotten() -> None:
    """Sockets come and go for as long as the agent runs."""
    source = Revision()
    gone = weakref.ref(Revision(source))
    gc.collect()
    assert gone() is None
    source.bump()
    assert source.value == 2
