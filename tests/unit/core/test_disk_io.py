"""What claims and pods ask of disk I/O, and how cgroup v2 has it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict

from nodeagent.core.blockio.demand import IoClass, asks_of_claims, asks_of_pod, concerned
from nodeagent.core.blockio.limits import (
    BFQ_WEIGHT,
    FILES,
    LATENCY,
    NO_LIMITS,
    REMOVED,
    THROTTLE,
    WEIGHT,
    IoLimits,
    alike,
    lines_of,
    parse,
)
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.opaque.settings import OpaqueConfig, to_json
from nodeagent.errors import InputError
from nodeagent.host.cgroup.watch import IO_FILES
from tests.builders.io_files import IoDisks

CLASSES = {
    "batch": IoClass(name="batch", limits=IoLimits(write_bps=1000), disks=("sd*",)),
    "claims": IoClass(name="claims", limits=IoLimits(weight=50)),
}
amounts = st.none() | st.integers(2, 10**9)
limits = st.builds(
    IoLimits,
    read_bps=amounts,
    write_bps=amounts,
    read_iops=amounts,
    write_iops=amounts,
    weight=st.none() | st.integers(1, 1000),
    latency_us=st.none() | st.integers(1, 10**7),
)


def grant(api: str = CLAIM, **settings: Any) -> Grant:
    holder = Holder(api=api, namespace="default", claim="c", uid="c")
    return Grant(id="c-0", holder=holder, devices=("disk-a",), settings=to_json(OpaqueConfig(**settings)))


# ---------------------------------------------------------------- lines


@given(limits, st.sampled_from([WEIGHT, BFQ_WEIGHT]))
def test_the_kernel_takes_every_line_and_shows_it_as_it_is_wanted(some: IoLimits, weight_file: str) -> None:
    kernel = IoDisks({"8:0": "bfq" if weight_file == BFQ_WEIGHT else "iocost"})
    texts = kernel.initial()
    for file, line in lines_of(some, weight_file).items():
        texts[file] = kernel.write(file, texts[file], f"8:0 {line}")
        assert alike(parse(texts[file])["8:0"], line)
        assert parse(kernel.write(file, texts[file], f"8:0 {REMOVED[file]}")) == {}
    assert {file for file in FILES if parse(texts[file])} == lines_of(some, weight_file).keys()


def test_what_is_not_limited_has_no_line() -> None:
    assert lines_of(NO_LIMITS, WEIGHT) == {}
    assert lines_of(IoLimits(write_iops=5), WEIGHT) == {THROTTLE: "rbps=max wbps=max riops=max wiops=5"}
    assert lines_of(IoLimits(latency_us=75), WEIGHT) == {LATENCY: "target=75"}


def test_bfq_takes_smaller_weights() -> None:
    assert lines_of(IoLimits(weight=1000), BFQ_WEIGHT) == {BFQ_WEIGHT: "1000"}
    with pytest.raises(InputError, match="a weight of 1001: the scheduler bfq takes 1 to 1000"):
        lines_of(IoLimits(weight=1001), BFQ_WEIGHT)


def test_what_a_file_says_of_all_disks_is_not_of_one() -> None:
    assert parse("default 100\n8:0 200\n259:3 50\n") == {"8:0": "200", "259:3": "50"}
    assert parse("") == {}


def test_the_watch_knows_every_file_that_is_written() -> None:
    assert frozenset(FILES) == IO_FILES


# ---------------------------------------------------------------- several limits


def all_of(several: Iterable[IoLimits]) -> IoLimits:
    return functools.reduce(IoLimits.with_both, several, NO_LIMITS)


@given(st.lists(limits, max_size=4))
def test_of_several_limits_the_strictest_apply_in_any_order(several: list[IoLimits]) -> None:
    both = all_of(several)
    assert both == all_of(reversed(several)) == all_of([*several, *several])
    for name, value in asdict(both).items():
        given_values = [one for some in several if (one := getattr(some, name)) is not None]
        pick = max if name == "weight" else min
        assert value == pick(given_values, default=None)


@given(limits)
def test_a_limit_is_the_containers_or_the_pods(some: IoLimits) -> None:
    assert some.of_container.with_both(some.of_pod) == some
    assert some.of_container.of_pod == some.of_pod.of_container == NO_LIMITS


# ---------------------------------------------------------------- claims


def test_a_claim_asks_for_its_own_devices() -> None:
    (ask,) = asks_of_claims([grant(io_read_bps=7, io_weight=9)], None)
    assert (ask.devices, ask.limits) == (("disk-a",), IoLimits(read_bps=7, weight=9))


@pytest.mark.parametrize(
    "other", [grant(), grant(env={"A": "1"}), grant(env={"io_read": "1"}), grant(DEVICE_PLUGIN, io_read_bps=7)]
)
def test_others_ask_for_nothing(other: Grant) -> None:
    assert not concerned(other) and list(asks_of_claims([other], None)) == []


def test_a_claim_may_name_a_class_that_there_is() -> None:
    (ask,) = asks_of_claims([grant(io_class="claims")], CLASSES)
    assert (ask.devices, ask.disks, ask.limits) == (("disk-a",), (), IoLimits(weight=50))
    with pytest.raises(InputError, match=r"there is no I/O class 'bach' .*pinning.io.classes has batch, claims"):
        list(asks_of_claims([grant(io_class="bach")], CLASSES))
    with pytest.raises(InputError, match=r"pinning\.io is not set"):
        list(asks_of_claims([grant(io_class="batch")], None))


# ---------------------------------------------------------------- pods


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        ({}, []),
        ({"example.com/io-class": "batch"}, []),
        ({"nodeagent.dev/io-class": "batch"}, [("sd*",)]),
        ({"nodeagent.dev/io-class.main": "batch"}, [("sd*",)]),
        ({"nodeagent.dev/io-class.side": "batch"}, []),
        ({"nodeagent.dev/io-class": "batch", "nodeagent.dev/io-class.main": ""}, []),
    ],
)
def test_an_annotation_is_for_all_containers_or_for_one(annotations: dict[str, str], found: list[object]) -> None:
    assert [one.disks for one in asks_of_pod(annotations, "nodeagent.dev", "main", CLASSES)] == found


def test_an_annotation_needs_a_class_with_disks() -> None:
    with pytest.raises(InputError, match="'claims' of its pod's annotation names no disks"):
        list(asks_of_pod({"nodeagent.dev/io-class": "claims"}, "nodeagent.dev", "main", CLASSES))
