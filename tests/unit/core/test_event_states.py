"""The states of a node that are reported: on whom, and when they are news."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.events.happenings import RULES, PodRef, Reason, claim_refused, drift
from nodeagent.core.events.states import Node, changes, states
from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.model.claim import Claim, ClaimRef
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.health import DEGRADED as HEALTH_DEGRADED
from nodeagent.core.model.health import UNHEALTHY, Evidence, Remedy, observe
from nodeagent.core.model.inventory import DEGRADED, Inventory, KindState

GPU = Device(kind="gpu", id="gpu-0")
BOOK = PodRef("trading", "book", "uid-book")
RUNTIME = {"uid-risk": PodRef("trading", "risk", "uid-risk")}


def held(api: str, *pods: str, **holder: str) -> Ledger:
    who = Holder(api=api, resource="nodeagent.dev/gpu", **holder)
    return grant(Ledger(), Grant(id="g", holder=who, devices=("gpu-0",), pods=pods))


def node(ledger: Ledger, *devices: Device, **known: Any) -> Node:
    kinds = known.pop("kinds", ())
    inventory = Inventory(devices=devices, kinds=kinds)
    return Node(inventory=inventory, ledger=ledger, health=known.pop("health", {}), **known)


def ill(reason: str = "it fell off the bus") -> Any:
    return observe({}, [Evidence(device="gpu-0", source="xid", state=UNHEALTHY, reason=reason)], 0.0, 30.0)


def seen(one: Node) -> Any:
    return states(one, RUNTIME.get)


@pytest.mark.parametrize(
    ("ledger", "pods"),
    [
        (held(DEVICE_PLUGIN, "uid-book", namespace="trading", pod="book"), (BOOK,)),
        (held(CLAIM, "uid-risk", namespace="trading", claim="c"), (RUNTIME["uid-risk"],)),
        (held(CLAIM, "uid-a", "uid-risk", namespace="trading", claim="c"), (RUNTIME["uid-risk"],)),
        (held(DEVICE_PLUGIN, namespace="trading", pod="book"), ()),
        (held(DEVICE_PLUGIN), ()),
    ],
    ids=["listed by kubelet", "named by the runtime", "one of two is named", "without a UID", "not listed yet"],
)
def test_a_device_is_reported_on_the_node_and_on_the_pods_whose_names_are_known(
    ledger: Ledger, pods: tuple[PodRef, ...]
) -> None:
    found = seen(node(ledger, GPU, health=ill()))["device gpu-0"].happening
    assert (found.reason, found.on_node, found.pods) == (Reason.DEVICE_UNHEALTHY, True, pods)


def test_a_device_that_is_not_found_is_lost_only_if_every_kind_could_be_looked_for() -> None:
    ledger = held(DEVICE_PLUGIN)
    assert seen(node(ledger))["device gpu-0"].happening.reason is Reason.DEVICE_LOST
    unread = (KindState(kind="gpu", state=DEGRADED, reason="NVML does not answer"),)
    found = seen(node(ledger, kinds=unread))["device gpu-0"].happening
    assert found.reason is Reason.DEVICE_HEALTH_UNKNOWN
    assert "gpu: NVML does not answer" in found.note


def test_a_held_device_that_is_degraded_is_a_warning_and_one_that_is_ill_says_what_to_do() -> None:
    """Ill counts for more; that it is well again is reported."""
    slow = observe({}, [Evidence(device="gpu-0", source="clocks", state=HEALTH_DEGRADED, reason="too hot")], 0.0, 30.0)
    reset = Evidence(device="gpu-0", source="rows", state=UNHEALTHY, reason="rows wait", remedy=Remedy.RESET)
    ledger = held(CLAIM, namespace="trading", claim="c")
    gpu = Device(kind="gpu", id="gpu-0", paths=("/dev/gpu0",))
    (degraded, worse, well) = (seen(node(ledger, gpu, health=one)) for one in (slow, observe(slow, [reset], 1.0), {}))
    found = degraded["device gpu-0"].happening
    assert (found.reason, RULES[found.reason].warns) == (Reason.DEVICE_DEGRADED, True)
    assert found.note == "device gpu-0 is degraded: too hot; held by claim trading/c"
    note = worse["device gpu-0"].happening.note
    assert note.startswith(
        "device gpu-0 is unhealthy: rows wait; held by claim trading/c; end all programs that use gpu-0"
    )
    (back,) = changes(degraded, well, found=False)
    assert back.reason is Reason.DEVICE_HEALTHY


def test_a_new_holder_of_an_ill_device_is_no_news() -> None:
    before = seen(node(held(DEVICE_PLUGIN), GPU, health=ill()))
    now = seen(node(held(DEVICE_PLUGIN, namespace="ns", pod="p"), GPU, health=ill("another cause")))
    assert list(changes(before, now, found=False)) == []


def test_a_device_that_nobody_holds_any_longer_is_no_news() -> None:
    before = seen(node(held(DEVICE_PLUGIN), GPU, health=ill()))
    assert list(changes(before, seen(node(Ledger(), GPU)), found=False)) == []


def test_what_is_bad_at_the_start_is_found_and_what_is_good_is_no_news() -> None:
    now = seen(node(Ledger(), refused={"gpu": "another plugin offers it", "cpu": ""}, loss="the file was damaged"))
    found = {one.reason: one.found for one in changes({}, now, found=True)}
    assert found == {Reason.RESOURCE_NOT_SERVED: True, Reason.LEDGER_INCOMPLETE: True}


TEXTS = st.sampled_from(["", "a", "b"])


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1))
def test_each_change_is_reported_once_and_a_state_that_lasts_never_again(history: list[tuple[str, str, str]]) -> None:
    """Against a plain oracle: what is bad is reported when its text changes, what is good when something was bad."""
    before: Any = {}
    last = {"resource cpu": "", "ledger": "", "configuration": ""}
    for refused, loss, error in history:
        now = seen(node(Ledger(), refused={"cpu": refused}, loss=loss, config_error=error))
        given_now = dict(zip(last, (refused, loss, error), strict=True))
        expected = {subject for subject, text in given_now.items() if text != last[subject]}
        reported = list(changes(before, now, found=False))
        assert {one.subject for one in reported} == expected
        assert all(RULES[one.reason].warns == bool(given_now[one.subject]) for one in reported)
        before, last = now, given_now


def test_a_claim_is_reported_on_its_pods_and_not_on_groups_of_pods() -> None:
    ref = ClaimRef(namespace="ns", name="c", uid="u")
    claim = Claim(ref=ref, reserved_for=("uid-group", "uid-p"), groups=("uid-group",), pods=("p",))
    assert claim_refused(ref, claim, "why").pods == (PodRef("ns", "p", "uid-p"),)


def test_a_drift_names_each_file_once() -> None:
    files = ["cpuset.cpus", "cpuset.cpus.effective", "cpuset.mems.effective"]
    assert drift("ns/p/c", files, BOOK).note == "another process changed cpuset.cpus, cpuset.mems of ns/p/c; repaired"
    assert drift("pod u", [], None, "cannot read").note == "another process changed the cgroup of pod u: cannot read"
