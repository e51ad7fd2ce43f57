"""The table of steps, over every combination of facts; and what the end of a Register says of the path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from nodeagent.kube.kubelet.register_call import Outcome, outcome_of
from nodeagent.kube.kubelet.register_steps import Facts, OfferedTo, Step, next_step
from nodeagent.kube.rpc.status import Code, RpcError

BOTH = (False, True)


def every() -> Iterator[Facts]:
    for kubelet, served, offered_to, watched, due in itertools.product(BOTH, BOTH, OfferedTo, BOTH, BOTH):
        yield Facts(kubelet=kubelet, served=served, offered_to=offered_to, watched=watched, due=due)


def steps(step: Step) -> list[Facts]:
    return [facts for facts in every() if next_step(facts) is step]


def test_a_path_is_offered_once_while_it_is_served_to_a_kubelet_that_is_there() -> None:
    assert steps(Step.OFFER)
    for facts in steps(Step.OFFER):
        assert facts.kubelet and facts.served and facts.due
        assert facts.offered_to is OfferedTo.NONE


def test_a_stream_of_the_kubelet_that_is_there_is_never_ended_while_its_socket_lies_there() -> None:
    for facts in (*steps(Step.SERVE), *steps(Step.GIVE_UP)):
        assert not (facts.served and facts.watched and facts.offered_to is OfferedTo.CURRENT)


def test_a_stream_of_an_older_kubelet_is_ended() -> None:
    for facts in every():
        if facts.kubelet and facts.served and facts.offered_to is OfferedTo.ANOTHER:
            assert next_step(facts) is Step.SERVE


def test_nothing_is_served_or_offered_without_kubelet_and_a_stream_is_kept() -> None:
    for facts in every():
        if not facts.kubelet:
            assert next_step(facts) is (Step.REST if facts.watched else Step.AWAIT_KUBELET)


def test_only_a_stream_from_the_kubelet_that_is_there_counts() -> None:
    assert {(one.kubelet, one.served, one.offered_to, one.watched) for one in steps(Step.COUNT)} == {
        (True, True, OfferedTo.CURRENT, True)
    }


def test_a_resource_that_kubelet_does_not_watch_is_left_alone_for_a_time_only() -> None:
    """With kubelet there and the time over, there is always something to do."""
    assert not [facts for facts in steps(Step.REST) if facts.kubelet and facts.due]


@pytest.mark.parametrize(
    ("code", "sent", "outcome"),
    [
        ("UNAVAILABLE", False, "unsent"),
        ("DEADLINE_EXCEEDED", False, "unsent"),
        ("UNAVAILABLE", True, "unanswered"),
        ("DEADLINE_EXCEEDED", True, "unanswered"),
        ("CANCELLED", True, "unanswered"),
        ("UNKNOWN", True, "refused"),
        ("INVALID_ARGUMENT", True, "refused"),
        ("UNIMPLEMENTED", True, "refused"),
    ],
)
def test_only_a_call_that_found_no_server_was_certainly_not_heard(code: str, sent: bool, outcome: str) -> None:
    assert outcome_of(RpcError(Code[code], "why", sent=sent)) is Outcome(outcome)
