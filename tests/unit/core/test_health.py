"""From evidence to a state: bad counts at once, good must last, unknown is neither."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.health import (
    DEGRADED,
    HEALTHY,
    NO_HEALTH,
    UNHEALTHY,
    UNKNOWN,
    DeviceState,
    Evidence,
    Health,
    Remedy,
    clear,
    forget,
    latched_causes,
    next_recovery,
    observe,
    recovered,
    withdraw,
)


def seen(health: Health, state: str, now: float, *, source: str = "nvml", reason: str = "") -> Health:
    return observe(health, [Evidence(device="d", source=source, state=state, reason=reason)], now, 30)


@pytest.mark.parametrize("state", [HEALTHY, UNHEALTHY, UNKNOWN])
def test_the_first_evidence_counts_at_once(state: str) -> None:
    """Nothing came before that it would have to outlast."""
    assert seen(NO_HEALTH, state, 7, reason="why")["d"].state == state


@pytest.mark.parametrize("bad", [UNHEALTHY, UNKNOWN])
def test_bad_evidence_counts_at_once_and_good_must_last(bad: str) -> None:
    """30 s of it, from the first good word."""
    health = seen(seen(NO_HEALTH, HEALTHY, 0), bad, 10, reason="Xid 79")
    assert (health["d"].state, health["d"].since, health["d"].reason) == (bad, 10, "Xid 79")
    assert next_recovery(health, 30) is None
    waiting = seen(seen(health, HEALTHY, 20), HEALTHY, 45)
    assert (waiting["d"].state, waiting["d"].reason, next_recovery(waiting, 30)) == (bad, "Xid 79", 50)
    assert recovered(waiting, 49.9, 30) is waiting
    well = recovered(waiting, 50, 30)["d"]
    assert (well.state, well.since, well.reason, well.good_since) == (HEALTHY, 50, "", None)


def test_a_device_that_comes_and_goes_stays_unhealthy() -> None:
    """Each fall begins the wait again."""
    health = seen(NO_HEALTH, UNHEALTHY, 0)
    for now in range(0, 200, 20):
        health = seen(seen(health, HEALTHY, now), UNHEALTHY, now + 19)
    assert (health["d"].state, health["d"].since) == (UNHEALTHY, 0)
    assert recovered(health, 1e9, 30) is health


def test_good_evidence_that_has_lasted_counts_without_a_look() -> None:
    """Whichever comes first."""
    health = seen(seen(NO_HEALTH, UNHEALTHY, 0), HEALTHY, 10)
    assert seen(health, HEALTHY, 40)["d"].state == HEALTHY


def test_all_sources_have_to_be_good() -> None:
    """The worst word counts, by the newest of each source; unhealthy is worse than unknown."""
    health = seen(NO_HEALTH, HEALTHY, 0, source="inventory")
    health = seen(health, UNKNOWN, 1, source="nvml", reason="no answer")
    assert (health["d"].state, health["d"].reason) == (UNKNOWN, "no answer")
    health = seen(health, UNHEALTHY, 2, source="admin", reason="taken out")
    health = seen(health, HEALTHY, 3, source="nvml")
    assert (health["d"].state, health["d"].reason) == (UNHEALTHY, "taken out")
    health = seen(health, HEALTHY, 4, source="admin")
    assert next_recovery(health, 30) == 34


def test_what_changes_nothing_returns_the_same_health() -> None:
    """So that no one is notified of it."""
    health = seen(NO_HEALTH, UNHEALTHY, 0, reason="r")
    assert seen(health, UNHEALTHY, 9, reason="r") is health
    assert observe(health, [], 9) is health
    assert forget(health, ["other"]) is health


def test_a_device_that_is_gone_is_forgotten_with_its_evidence() -> None:
    """When it comes back it is judged again."""
    health = forget(seen(NO_HEALTH, UNHEALTHY, 0), ["d"])
    assert "d" not in health
    assert seen(health, HEALTHY, 1)["d"].state == HEALTHY


def test_what_is_withdrawn_no_longer_counts_but_the_rest_must_stay_good_for_a_while() -> None:
    """A source that has nothing to look at any longer has not seen anything good."""
    health = seen(seen(NO_HEALTH, UNHEALTHY, 0, source="a", reason="A"), UNHEALTHY, 0, source="b", reason="B")
    health = withdraw(health, [("d", "a"), ("d", "c"), ("e", "a")], 10, 30)
    assert (health["d"].state, health["d"].reason) == (UNHEALTHY, "B")
    health = withdraw(health, [("d", "b")], 20, 30)
    assert (health["d"].state, next_recovery(health, 30)) == (UNHEALTHY, 50)
    assert recovered(health, 50, 30)["d"].state == HEALTHY
    assert withdraw(health, [("d", "b")], 21, 30) is health
    fatal = latched(NO_HEALTH, 0, source="xid")
    assert withdraw(fatal, [("d", "xid")], 100, 30) is fatal


@given(st.lists(st.tuples(st.sampled_from([HEALTHY, UNHEALTHY, UNKNOWN]), st.floats(0, 40), st.sampled_from("ab"))))
def test_a_device_is_healthy_only_after_30_good_seconds_or_if_it_never_was_bad(
    story: list[tuple[str, float, str]],
) -> None:
    """Checked against the whole story."""
    health, now = NO_HEALTH, 0.0
    newest: dict[str, str] = {}
    bad_at: float | None = None
    for state, after, source in story:
        now += after
        newest[source] = state
        health = recovered(seen(health, state, now, source=source), now, 30)
        if set(newest.values()) != {HEALTHY}:
            bad_at = now
            assert health["d"].state != HEALTHY
        elif bad_at is not None and health["d"].state == HEALTHY:
            assert now - bad_at >= 30
        if bad_at is None:
            assert health["d"].state == HEALTHY


def latched(health: Health, now: float, *, source: str = "xid", reason: str = "Xid 79") -> Health:
    one = Evidence(device="d", source=source, state=UNHEALTHY, reason=reason, latched=True)
    return observe(health, [one], now, 30)


@given(st.lists(st.tuples(st.sampled_from([HEALTHY, UNHEALTHY, UNKNOWN]), st.floats(0, 1000), st.sampled_from("ab"))))
def test_a_latched_cause_never_ends_by_evidence(story: list[tuple[str, float, str]]) -> None:
    """However often its own source or another one reports the device as good."""
    health, now = latched(NO_HEALTH, 0.0, source="a"), 0.0
    for state, after, source in story:
        now += after
        health = recovered(seen(health, state, now, source=source), now, 30)
        assert health["d"].state == UNHEALTHY
        assert "Xid 79" in [one.reason for one in latched_causes(health)]
    assert clear(health, "d", now)["d"].reason != "Xid 79"


def test_what_is_cleared_counts_at_once_and_the_rest_of_the_evidence_stays() -> None:
    """The admin has decided: nothing has to last."""
    health = latched(seen(NO_HEALTH, HEALTHY, 0), 1)
    assert clear(health, "d", 2)["d"].state == HEALTHY
    ill = latched(seen(NO_HEALTH, UNHEALTHY, 0, source="ecc", reason="5 errors"), 1)
    assert (clear(ill, "d", 2)["d"].state, clear(ill, "d", 2)["d"].reason) == (UNHEALTHY, "5 errors")
    alone = latched(NO_HEALTH, 1)
    assert clear(alone, "d", 2)["d"].state == HEALTHY
    assert clear(health, "other", 2) is health
    assert clear(seen(NO_HEALTH, UNHEALTHY, 0), "d", 2)["d"].state == UNHEALTHY


def test_what_ends_a_latched_cause_does_not_become_less_by_a_newer_one() -> None:
    """Xid 79 asks for a reboot, Xid 119 for a reset alone."""
    causes = [("Xid 79", Remedy.REBOOT), ("Xid 119", Remedy.RESET)]
    evidence = [
        Evidence(device="d", source="xid", state=UNHEALTHY, reason=reason, latched=True, remedy=remedy)
        for reason, remedy in causes
    ]
    for order in (evidence, evidence[::-1]):
        health = observe(observe(NO_HEALTH, order[:1], 0, 30), order[1:], 1, 30)
        assert (health["d"].remedy, health["d"].reason) == (Remedy.REBOOT, "Xid 79")
        assert clear(health, "d", 2)["d"].remedy is Remedy.NONE


@given(
    st.lists(
        st.tuples(
            st.sampled_from([DEGRADED, UNHEALTHY, UNKNOWN]), st.sampled_from([*Remedy]), st.booleans(), st.text("ab")
        ),
        min_size=1,
    )
)
def test_a_latched_cause_gets_worse_alone(story: list[tuple[DeviceState, Remedy, bool, str]]) -> None:
    """While it stands, neither its state nor its remedy is less than that of any latched cause of its source."""
    health, worst, most = NO_HEALTH, 0, 0
    severity, remedies = [DEGRADED, UNKNOWN, UNHEALTHY], [*Remedy]
    for now, (state, remedy, latched, reason) in enumerate(story):
        one = Evidence(device="d", source="xid", state=state, reason=reason, latched=latched, remedy=remedy)
        health = observe(health, [one], now, 30)
        if latched:
            worst, most = max(worst, severity.index(state)), max(most, remedies.index(remedy))
            (cause,) = latched_causes(health)
            assert (cause.state, cause.remedy) == (severity[worst], remedies[most])


def test_a_newer_latched_cause_of_the_same_source_replaces_the_older() -> None:
    health = latched(latched(NO_HEALTH, 0, reason="Xid 74"), 1, reason="Xid 79")
    assert [(one.source, one.reason) for one in latched_causes(health)] == [("xid", "Xid 79")]
