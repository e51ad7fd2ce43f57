"""Reads of what may hang: in a thread, with a deadline for each, and one that hangs delays no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.aio.reads import Reads

DEADLINE_S = 0.05


def told(text: str) -> Callable[[], str]:
    return lambda: text


async def test_what_is_read_is_returned_by_key() -> None:
    reads: Reads[str, str] = Reads()
    assert await reads.run({"a": told("1"), "b": told("2")}) == ({"a": "1", "b": "2"}, frozenset())
    assert await reads.run({}) == ({}, frozenset())


async def test_one_that_hangs_delays_no_other_and_is_read_again_when_it_has_ended() -> None:
    """While it hangs no second thread is started for it."""
    goes_on, begun, reads = threading.Event(), [], Reads[str, str](DEADLINE_S)

    def hangs() -> str:
        begun.append(threading.current_thread())
        assert goes_on.wait(30)
        return "late"

    every = {"a": told("1"), "x": hangs, "b": told("2")}
    for _ in range(3):
        assert await reads.run(every) == ({"a": "1", "b": "2"}, frozenset({"x"}))
    assert len(begun) == 1
    goes_on.set()
    await asyncio.to_thread(begun[0].join, 30)
    assert await reads.run(every) == ({"a": "1", "b": "2", "x": "late"}, frozenset())


async def test_many_slow_reads_do_not_look_like_one_that_hangs() -> None:
    """The deadline is that of one read."""
    slow = threading.Event()
    every = {number: lambda: slow.wait(DEADLINE_S / 4) for number in range(12)}
    found, hanging = await Reads[int, bool](DEADLINE_S).run(every)
    assert (len(found), hanging) == (12, frozenset())


async def test_a_caller_that_gives_up_ends_the_pass_after_the_read_that_it_is_in() -> None:
    first, goes_on, later, threads = threading.Event(), threading.Event(), list[int](), list[threading.Thread]()

    def waits() -> None:
        threads.append(threading.current_thread())
        first.set()
        assert goes_on.wait(30)

    asked = asyncio.create_task(Reads[str, None](30).run({"a": waits, "b": lambda: later.append(1)}))
    assert await asyncio.to_thread(first.wait, 30)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    goes_on.set()
    await asyncio.to_thread(threads[0].join, 30)
    assert not later


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), max_size=5))
def test_whichever_hang_all_others_are_read(hang: list[bool]) -> None:
    goes_on = threading.Event()

    async def run() -> None:
        every = {number: goes_on.wait if one else (lambda: True) for number, one in enumerate(hang)}
        found, hanging = await Reads[int, bool](DEADLINE_S).run(every)
        assert found.keys() == {number for number, one in enumerate(hang) if not one}
        assert hanging == {number for number, one in enumerate(hang) if one}

    try:
        asyncio.run(run())
    finally:
        goes_on.set()
