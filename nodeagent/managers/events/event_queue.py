"""Events that wait to be written, and those that were: what is equal is counted, what is outdated is replaced.

An Event is identified by what it is about, its reason and its note. One that happens again soon is written once more at
most every SERIES_S, as a series with its count (events.k8s.io/v1). Of the Events about one subject only the newest
waits. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from nodeagent.core.events.happenings import MOST_PODS, RULES, Happening
from nodeagent.kube.event import Event

SERIES_S = 360.0
"""How long a repetition of what was just written waits."""
STALE_S = 3600.0
"""How long an Event may wait, and how long a written one is remembered: for as long as the API server keeps it
(--event-ttl)."""
FORGET_S = 60.0
"""How often to look at what can be forgotten."""
MOST_WAITING, MOST_KNOWN = 200, 1000


class Series(msgspec.Struct, kw_only=True, eq=False):
    """An Event and how often it happened. Times `..._at` are in seconds since the epoch, `..._s` of a clock."""

    event: Event
    subject: tuple[str, str, str]
    found: bool
    first_at: float
    count: int = 0
    last_at: float = 0.0
    exists: bool = False
    """Whether the API server has it, as far as known."""
    unsure: bool = False
    """Whether this agent may have created it: the answer was lost."""
    counted: bool = False
    """Whether `count` has what an earlier agent wrote, too."""
    written: int = 0
    """How often it had happened when it was last written."""
    written_s: float = 0.0
    reported_s: float = 0.0

    @property
    def waits(self) -> bool:
        """Return whether it has happened since it was last written."""
        return self.count > self.written


class EventQueue:
    """The Events of one agent."""

    def __init__(self, node: str, controller: str, clock: Callable[[], float], unix: Callable[[], float]) -> None:
        """Set up. controller: the name under which Events are reported. clock: in seconds. unix: seconds since the
        epoch."""
        self._node, self._controller = node, controller
        self._clock, self._unix = clock, unix
        self._known: dict[Event, Series] = {}
        self._waiting: dict[tuple[str, str, str], Series] = {}
        self._last: dict[tuple[str, str, str], Series] = {}
        """What was last written about each subject."""
        self._forget_s = 0.0
        self.dropped = 0
        """How many were never written since too many waited, or they waited for too long."""

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, happening: Happening) -> None:
        """Have a happening written."""
        for event in self._events(happening):
            self._add(event, happening)
        while len(self._waiting) > MOST_WAITING:
            self._drop(next(iter(self._waiting.values())))

    def _events(self, happening: Happening) -> Iterable[Event]:
        action, warns = RULES[happening.reason]
        on_node = (None,) if happening.on_node or not happening.pods else ()
        for pod in (*on_node, *happening.pods[:MOST_PODS]):
            yield Event(
                pod=pod,
                node=self._node,
                controller=self._controller,
                reason=happening.reason,
                action=action,
                note=happening.note,
                warns=warns,
            )

    def _add(self, event: Event, happening: Happening) -> None:
        about = event.namespace, event.pod.uid if event.pod is not None else ""
        subject, now = (*about, happening.subject), self._unix()
        one = self._known.get(event)
        if one is None:
            one = self._known[event] = Series(event=event, subject=subject, found=happening.found, first_at=now)
        one.count, one.last_at, one.reported_s = one.count + 1, now, self._clock()
        outdated = self._waiting.get(subject)
        if outdated is not None and outdated is not one:
            self._replaced(outdated)
        self._waiting[subject] = one

    def _replaced(self, one: Series) -> None:
        """Forget an Event that was not written in time, or what of it was not."""
        if one.exists:
            one.count = one.written
        else:
            self._known.pop(one.event, None)

    def _drop(self, one: Series) -> None:
        self._waiting.pop(one.subject, None)
        self.dropped += not one.exists
        self._replaced(one)

    # ---------------------------------------------------------------- writing

    def next(self, silent: Callable[[Series], float] = lambda one: 0.0) -> tuple[Series | None, float]:
        """Return the one to write next, and in how many seconds; None if none waits. silent: return for how many
        seconds an Event must not be written."""
        self._forget()
        due = ((one, max(self._due_s(one), silent(one))) for one in self._waiting.values())
        return min(due, key=lambda pair: pair[1], default=(None, 0.0))

    def _due_s(self, one: Series) -> float:
        repeats = self._last.get(one.subject) is one
        return max(0.0, one.written_s + SERIES_S - self._clock()) if repeats else 0.0

    def wrote(self, one: Series, count: int, at_s: float) -> None:
        """Note that an Event was written at `at_s`, by the clock, when it had happened `count` times."""
        one.written, one.written_s = count, at_s
        self._last[one.subject] = one
        if not one.waits and self._waiting.get(one.subject) is one:
            del self._waiting[one.subject]

    def defer(self, one: Series) -> None:
        """Note that an Event could not be written now: the others that wait are tried before it."""
        if self._waiting.get(one.subject) is one:
            self._waiting[one.subject] = self._waiting.pop(one.subject)

    def refuse(self, one: Series) -> None:
        """Note that an Event can never be written."""
        self._drop(one)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._known.clear()
        self._last.clear()

    def _forget(self) -> None:
        """Drop what has waited for too long, and forget what the API server has forgotten."""
        before_s = self._clock() - STALE_S
        for one in [one for one in self._waiting.values() if one.reported_s < before_s]:
            self._drop(one)
        if self._clock() >= self._forget_s or len(self._known) > MOST_KNOWN:
            self._forget_s = self._clock() + FORGET_S
            self._last = {subject: one for subject, one in self._last.items() if one.written_s >= before_s}
            quiet = sorted((one for one in self._known.values() if not one.waits), key=lambda one: one.written_s)
            excess = len(self._known) - MOST_KNOWN
            for number, one in enumerate(quiet):
                if number < excess or one.written_s < before_s:
                    del self._known[one.event]
