"""What claims and pods ask of utilization clamps, and how cgroup v2 has it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.quantity import parse_percent
from nodeagent.core.opaque.settings import OpaqueConfig, to_json
from nodeagent.core.uclamp.clamps import FILES, INITIAL, MAX, MIN, NO_CLAMP, Clamp, alike, hundredths_of, text_of
from nodeagent.core.uclamp.demand import Classes, clamp_of, concerned
from nodeagent.errors import InputError
from nodeagent.host.cgroup.watch import UCLAMP_FILES
from tests.builders import uclamp_files

FAST, SLOW = Clamp(min_hundredths=8000), Clamp(max_hundredths=2500)
CLASSES = Classes(clamps={"fast": FAST, "slow": SLOW})
hundredths = st.integers(0, 10_000)


def grant(api: str = CLAIM, cpus: str = "2-3", **settings: Any) -> Grant:
    holder = Holder(api=api, namespace="default", claim="c", uid="c")
    return Grant(id="c-0", holder=holder, cpus=CpuSet.parse(cpus), settings=to_json(OpaqueConfig(**settings)))


def asked(*grants: Grant, classes: Classes | None = CLASSES, **annotations: str) -> Clamp:
    """What container "main" of a pod asks for."""
    said = {f"nodeagent.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return clamp_of(grants, said, "nodeagent.dev", "main", classes)


# ---------------------------------------------------------------- texts


@given(hundredths)
def test_the_kernel_shows_every_value_as_it_is_wanted(value: int) -> None:
    shown = uclamp_files.write(text_of(value))
    assert shown == text_of(value) and alike(shown, text_of(value))
    assert hundredths_of(shown) == value or (shown == "max" and value >= 9995)


@given(hundredths, hundredths)
def test_texts_are_alike_if_the_kernel_shows_the_same(one: int, other: int) -> None:
    shown = [uclamp_files.write(f"{value / 100:.2f}") for value in (one, other)]
    assert alike(*shown) == (shown[0] == shown[1])


@pytest.mark.parametrize(
    ("said", "value"),
    [(0, 0), (20, 2000), (100, 10_000), ("max", 10_000), ("12.5", 1250), ("0.07", 7), ("100.0", 10_000)],
)
def test_a_percentage_has_up_to_two_decimals(said: int | str, value: int) -> None:
    assert parse_percent(said) == value


@pytest.mark.parametrize("said", [101, -1, "100.01", "12.345", "", "1e1", "50%", "maximum", ".5", "5."])
def test_anything_else_is_no_percentage(said: int | str) -> None:
    with pytest.raises(InputError, match="cannot read percentage"):
        parse_percent(said)


def test_the_files_are_those_of_a_new_cgroup_and_are_watched() -> None:
    assert (MIN, MAX) == FILES and dict(INITIAL) == uclamp_files.INITIAL and set(FILES) == UCLAMP_FILES
    assert NO_CLAMP.values == {}
    assert Clamp(min_hundredths=5, max_hundredths=10_000).values == {MIN: "0.05", MAX: "max"}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("100.01", errno.ERANGE),
        ("101", errno.ERANGE),
        ("-1", errno.ERANGE),
        ("", errno.EINVAL),
        ("fast", errno.EINVAL),
        ("5.-1", errno.EINVAL),
    ],
)
def test_the_double_refuses_as_the_kernel_does(value: str, code: int) -> None:
    with pytest.raises(OSError) as raised:
        uclamp_files.write(value)
    assert raised.value.errno == code


@pytest.mark.parametrize(
    ("value", "shown"), [("50", "50.00"), ("7.1\n", "7.10"), ("1.239", "1.24"), ("99.95", "99.95"), ("99.96", "max")]
)
def test_the_double_shows_as_the_kernel_does(value: str, shown: str) -> None:
    assert uclamp_files.write(value) == shown


# ---------------------------------------------------------------- who asks for what


@pytest.mark.parametrize(
    ("settings", "annotations", "default", "expected"),
    [
        ({}, {}, "", NO_CLAMP),
        ({}, {}, "slow", SLOW),
        ({}, {"uclamp_class": "fast"}, "slow", FAST),
        ({}, {"uclamp_class": "slow", "uclamp_class.main": "fast"}, "", FAST),
        ({}, {"uclamp_class": "slow", "uclamp_class.side": "fast"}, "", SLOW),
        ({"uclamp_class": "slow"}, {"uclamp_class": "fast"}, "fast", SLOW),
        ({"uclamp_min_hundredths": 0}, {"uclamp_class": "fast"}, "fast", Clamp(min_hundredths=0)),
    ],
)
def test_a_claim_comes_before_the_annotation_and_this_before_the_default(
    settings: Mapping[str, Any], annotations: Mapping[str, str], default: str, expected: Clamp
) -> None:
    classes = Classes(clamps=CLASSES.clamps, default=default)
    assert asked(grant(**settings), classes=classes, **annotations) == expected


def test_only_containers_with_exclusive_cpus_are_clamped() -> None:
    classes = Classes(clamps=CLASSES.clamps, default="fast")
    assert asked(classes=classes, uclamp_class="fast") == NO_CLAMP
    assert asked(grant(cpus=""), classes=classes) == NO_CLAMP
    assert asked(grant(named_pool="web"), classes=classes, uclamp_class="fast") == NO_CLAMP
    assert asked(grant(DEVICE_PLUGIN), classes=classes) == FAST


def test_what_several_claims_ask_for_is_all_satisfied() -> None:
    some = [grant(uclamp_min_hundredths=100), grant(uclamp_min_hundredths=300, uclamp_max_hundredths=900)]
    assert asked(*some, grant(uclamp_class="slow")) == Clamp(min_hundredths=300, max_hundredths=900)


def test_annotations_mean_nothing_on_a_node_without_classes() -> None:
    assert asked(grant(), classes=None, uclamp_class="gold") == NO_CLAMP
    assert asked(grant(uclamp_min_hundredths=5), classes=None) == Clamp(min_hundredths=5)


def test_a_class_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"no uclamp class 'gold' on this node .*classes has fast, slow"):
        asked(grant(), uclamp_class="gold")
    with pytest.raises(InputError, match=r"no uclamp classes on this node \(pinning.uclamp is not set\): 'gold'"):
        asked(grant(uclamp_class="gold"), classes=None)


def test_a_grant_without_settings_or_of_the_device_plugin_is_not_concerned() -> None:
    assert not concerned(grant()) and not concerned(grant(cache_ways=2))
    assert not concerned(grant(DEVICE_PLUGIN, uclamp_min_hundredths=5))
    assert concerned(grant(uclamp_class="fast")) and concerned(grant(uclamp_max_hundredths=0))
