"""Whether kubelet shows what was sent: what changed while it was asked does not count, nor what it is about to show."""

from __future__ import annotations

from nodeagent.managers.deviceplugin.shown import GRACE_S, ShownCheck

A, B, OTHER = ("r/a", "1"), ("r/b", "1"), ("x/y", "1")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_kubelet_never_showed_is_reported_at_once() -> None:
    """At the start nothing is ready before it is there."""
    check = ShownCheck(Clock())
    check.compare({"r/a", "r/b"}, {A, B}, {A, B}, {B, OTHER})
    assert (check.differing, check.unshown) == (["r/a"], ["r/a"])
    check.compare({"r/a", "r/b"}, {A, B}, {A, B}, {A, B})
    assert (check.differing, check.unshown) == ([], [])


def test_a_change_is_reported_only_when_kubelet_takes_longer_than_it_may() -> None:
    clock = Clock()
    check = ShownCheck(clock)
    check.compare({"r/a", "r/b"}, {A}, {A}, {A})
    for after_s in (0.0, GRACE_S):
        clock.now_s = 200.0 + after_s
        check.compare({"r/a", "r/b"}, {A, ("r/a", "2")}, {A, ("r/a", "2")}, {A})
        assert (check.differing, check.unshown) == (["r/a"], [])
    clock.now_s += 0.1
    assert check.unshown == ["r/a"]
    check.compare({"r/a"}, set(), set(), {A})
    assert check.differing == ["r/a"], "none is healthy any longer, and kubelet shows one"
    check.compare({"r/b"}, set(), set(), {A})
    assert check.differing == [], "what is no longer served is not kubelet's to show"


def test_what_changes_while_kubelet_is_asked_does_not_count() -> None:
    check = ShownCheck(Clock())
    check.compare({"r/a", "r/b"}, {A}, {A, B}, {A})
    assert check.differing == []
    check.compare({"r/a", "r/b"}, {A, B}, {A}, {A})
    assert check.differing == []
    check.compare({"r/a", "r/b"}, {A, B}, {B}, set())
    assert check.differing == ["r/b"]


def test_a_kubelet_that_cannot_answer_is_not_blamed() -> None:
    check = ShownCheck(Clock())
    check.compare({"r/a", "r/b"}, {A}, {A}, set())
    check.forget()
    assert check.unshown == []
