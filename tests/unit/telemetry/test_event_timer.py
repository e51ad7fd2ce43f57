"""How long an event of the kernel takes to a list: once for each list that it changes, and never for another reason."""

from __future__ import annotations

from nodeagent.telemetry.event_timer import EventTimer
from tests.support.observed import observed, total_s


class Timed:
    """A timer of an API of its own, with a clock that stands."""

    def __init__(self, api: str) -> None:
        self.api = api
        self.now_s = 100.0
        self.timer = EventTimer(api, lambda: self.now_s)

    def show(self, generation: int, event_s: float | None, *, sent: bool, key: str = "a") -> None:
        """One look at a list, which is sent if it differs, and is in force."""
        self.timer.looked(generation, event_s)
        if sent:
            self.timer.sent(key)
        self.timer.in_force(key)

    def found(self) -> tuple[int, float]:
        return observed("event_to_list", api=self.api), total_s("event_to_list", api=self.api)


def test_a_list_that_an_event_changes_is_timed_from_the_event() -> None:
    one = Timed("t-event")
    one.show(1, None, sent=True)
    one.show(2, 98.5, sent=True)
    assert one.found() == (1, 1.5)


def test_what_was_there_at_the_start_is_no_answer_to_an_event() -> None:
    one = Timed("t-start")
    one.show(7, 10.0, sent=True)
    assert one.found() == (0, 0.0)


def test_a_list_that_the_event_left_alone_does_not_count_when_something_else_changes_it() -> None:
    """A pod comes an hour after the event: that hour is not the event's."""
    one = Timed("t-other")
    one.show(1, None, sent=True)
    one.show(2, 99.0, sent=False)
    one.now_s += 3600
    one.show(2, 99.0, sent=True)
    assert one.found() == (0, 0.0)


def test_a_change_that_the_resync_found_is_not_timed() -> None:
    one = Timed("t-resync")
    one.show(1, None, sent=True)
    one.show(2, None, sent=True)
    assert one.found() == (0, 0.0)


def test_every_list_is_timed_for_itself_until_it_is_in_force() -> None:
    """One is written at once, the other two seconds later."""
    one = Timed("t-two")
    for key in ("a", "b"):
        one.show(1, None, sent=True, key=key)
    one.timer.looked(2, 99.0)
    one.timer.sent("a")
    one.timer.in_force("a")
    one.now_s += 2
    one.timer.looked(2, 99.0)
    one.timer.in_force("a")
    one.timer.sent("b")
    one.timer.in_force("b")
    assert one.found() == (2, 1.0 + 3.0)
