"""The configuration of NVIDIA's device plugin, and the values of its DRA driver's chart, as configurations of the
agent."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.config.load import parse
from nodeagent.core.imports.findings import State, Translation, leaves, shown
from nodeagent.core.imports.nvidia import chart, plugin
from nodeagent.core.imports.nvidia.plugin import may_both_match
from nodeagent.errors import InputError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.resources.offer import offers
from tests.support.paths import DATA

KEYS: dict[str, Any] = json.loads((DATA / "nvidia" / "keys.json").read_text())
WHOLE = {"vendor": "10de", "parent": ""}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DATA / "nvidia" / name).read_text())
    return found


def checked(found: Translation) -> dict[str, dict[str, Any]]:
    """The resources by name, after the agent's own check of the whole configuration."""
    config = parse(yaml.safe_dump(dict(found.config)), source="c")
    assert len(offers(config, load_kinds())) == len(config.served)
    return {one["name"]: one for one in found.config["resources"]}


def said(found: Translation, place: str) -> tuple[str, str]:
    (one,) = [one.said for one in found.findings if one.place == place]
    return one.state, one.why


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return {**one, **other, **both}


def test_whole_gpus_are_shared_under_their_new_name_and_instances_have_resources_of_their_own() -> None:
    found = plugin.translate(read("plugin-shared.yaml"), profiles=["1g.5gb", "1g.5gb+me", "3g.20gb"])
    assert checked(found) == {
        "nvidia.com/gpu.shared": {"name": "nvidia.com/gpu.shared", "kind": "gpu", "match": WHOLE, "replicas": 4},
        **{
            f"nvidia.com/mig-{name}": {
                "name": f"nvidia.com/mig-{name}",
                "kind": "gpu",
                "match": {"vendor": "10de", "mig_profile": name.replace(".me", "+me")},
            }
            for name in ("1g.5gb", "1g.5gb.me", "3g.20gb")
        },
    }
    assert found.config["nvidia"] == {"driverRoot": "/run/nvidia/driver"}
    assert {one.said.state for one in found.findings} == {State.TRANSLATED, State.BUILT_IN}


def test_a_node_without_instances_says_that_their_profiles_are_missing() -> None:
    state, why = said(plugin.translate(read("plugin-shared.yaml")), "$.flags.migStrategy")
    assert (state, "--mig-profile" in why) == (State.LOST, True)


def test_the_single_strategy_offers_whatever_there_is_under_one_name() -> None:
    found = plugin.translate({"version": "v1", "flags": {"migStrategy": "single"}})
    assert checked(found) == {
        "nvidia.com/gpu": {"name": "nvidia.com/gpu", "kind": "gpu", "match": {"vendor": "10de", "uuid": "?*"}}
    }


def test_mps_of_the_plugin_divides_and_makes_a_class_in_which_it_is_enforced() -> None:
    document = {"sharing": {"mps": {"resources": [{"name": "gpu", "replicas": 10}]}, "timeSlicing": None}}
    found = plugin.translate(document)
    (one,) = checked(found).values()
    assert (one["replicas"], one["serve"]) == (10, "both")
    assert said(found, "$.sharing.mps.resources[0].replicas")[0] == State.PARTLY
    assert said(found, "$.sharing.mps.failRequestsGreaterThanOne")[0] == State.LOST
    (made,) = found.objects
    assert made["metadata"]["name"] == "mps-gpu.nodeagent.dev"
    assert made["spec"]["config"][0]["opaque"]["parameters"]["mps"] == {}


SHARED = {"resources": [{"name": "gpu", "rename": "half", "devices": [0], "replicas": 2}]}


def test_what_the_plugin_reads_and_ignores_is_ignored_unless_it_is_asked_for() -> None:
    """Pods ask for the names that the plugin has really given."""
    named = {"gpus": [{"pattern": "*H100*", "name": "h100"}, {"pattern": "*", "name": "gpu"}]}
    document = {"version": "v1", "resources": named, "sharing": {"timeSlicing": SHARED}}
    found = plugin.translate(document)
    assert list(checked(found)) == ["nvidia.com/gpu"]
    for place in ("resources.gpus[0].name", "sharing.timeSlicing.resources[0].rename"):
        assert said(found, f"$.{place}")[0] == State.IGNORED
    assert said(found, "$.sharing.timeSlicing.resources[0].devices")[0] == State.IGNORED
    found = plugin.translate(document, as_written=True)
    assert {name: one["match"]["product"] for name, one in checked(found).items()} == {
        "nvidia.com/h100": "*H100*",
        "nvidia.com/gpu": "*",
    }
    assert said(found, "$.resources.gpus[0].name")[0] == State.TRANSLATED
    assert said(found, "$.resources.gpus[1].name")[0] == State.PARTLY
    assert said(found, "$.sharing.timeSlicing.resources[0].replicas")[0] == State.LOST


def test_as_written_a_resource_is_renamed_and_a_pattern_stays_a_pattern() -> None:
    """NVIDIA's patterns know only the star."""
    named = {"gpus": [{"pattern": "A[1]?*", "name": "odd"}, {"pattern": "B*", "name": "b"}]}
    shared = {"resources": [{"name": "odd", "rename": "even", "replicas": 2}]}
    found = plugin.translate({"resources": named, "sharing": {"timeSlicing": shared}}, as_written=True)
    assert list(checked(found)) == ["nvidia.com/even", "nvidia.com/b"]
    pattern = found.config["resources"][0]["match"]["product"]
    assert [fnmatch.fnmatchcase(one, pattern) for one in ("A[1]?x", "A1yx")] == [True, False]
    last = found.findings[-1].said
    assert (last.state, "add a resource for it" in last.why) == (State.LOST, True)


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"version": "v2"}, r"Invalid enum value 'v2' - at `\$.version`"),
        ({"flags": {"migStrategy": "dynamic"}}, r"\$.flags.migStrategy"),
        ({"sharing": {"mps": {"resources": []}}}, r"\$.sharing.mps.resources"),
        (
            {"sharing": {"mps": {"resources": [{"name": "gpu", "replicas": 1}]}}},
            r"resources\[0\].replicas|resources\[\.\.\.\].replicas",
        ),
        ({"imex": {"channelIDs": [1]}}, r"channel 1 at \$.imex.channelIDs"),
    ],
)
def test_what_the_plugin_does_not_start_with_is_an_error(document: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error):
        plugin.translate(document)


def test_the_chart_s_values_become_resources_for_claims() -> None:
    found = chart.translate(read("dra-values.yaml"))
    resources = checked(found)
    assert resources["gpu"]["match"] == WHOLE
    assert (resources["mig"]["mig"], resources["mig"]["serve"]) == ({"mode": "dynamic"}, "dra")
    assert found.config["dra"] == {"passthroughDrivers": ["vfio-pci"]}
    assert found.config["kubeletDir"] == "/var/snap/kubelet"
    assert said(found, "$.kubeletPlugin.tolerations[0].key")[0] == State.ELSEWHERE
    assert not [one for one in found.findings if one.said.state in (State.LOST, State.UNKNOWN)]


def test_domains_of_several_nodes_are_named_as_missing() -> None:
    found = chart.translate({"resources": {"computeDomains": {"enabled": True}}})
    assert said(found, "$.resources.computeDomains.enabled")[0] == State.LOST
    assert chart.translate({"resources": {"gpus": {"enabled": False}}}).config["resources"] == []


@pytest.mark.parametrize("key", KEYS["plugin"])
def test_every_key_of_the_plugin_s_configuration_is_known(key: str) -> None:
    found = plugin.translate(nested(key, KEYS["plugin"][key]))
    assert State.UNKNOWN not in {one.said.state for one in found.findings}
    assert all(one.said.to or one.said.why for one in found.findings)


@pytest.mark.parametrize("key", KEYS["chart"])
def test_every_value_of_the_chart_is_known(key: str) -> None:
    found = chart.translate(nested(key, KEYS["chart"][key]))
    assert State.UNKNOWN not in {one.said.state for one in found.findings}
    assert all(one.said.to or one.said.why for one in found.findings)


NAMES = st.sampled_from(["gpu", "nvidia.com/gpu", "mig-1g.5gb", "other", "a.shared", "x" * 60, "Bad", "-"])
ENTRY = st.fixed_dictionaries(
    {"name": NAMES, "replicas": st.integers(2, 5000)},
    optional={
        "rename": NAMES,
        "devices": st.one_of(st.just("all"), st.integers(1, 9), st.lists(st.sampled_from([0, 1, "0:1"]), max_size=3)),
    },
)
SHARES = st.fixed_dictionaries(
    {"resources": st.lists(ENTRY, min_size=1, max_size=4)},
    optional={"renameByDefault": st.booleans(), "failRequestsGreaterThanOne": st.none() | st.booleans()},
)
NAMED = st.lists(st.fixed_dictionaries({"pattern": st.text("*A1[?", max_size=5), "name": NAMES}), max_size=4)
UNKNOWN_KEY = st.text("abcXYZ\n*[", min_size=1, max_size=6).map(lambda text: f"zz{text}")


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {"version": "v1"}
    for key in draw(st.sets(st.sampled_from(sorted(one for one in KEYS["plugin"] if one.startswith("flags"))))):
        found = merged(found, nested(key, draw(st.sampled_from([KEYS["plugin"][key], None]))))
    found["flags"] = {**(found.get("flags") or {}), "migStrategy": draw(st.sampled_from(["none", "single", "mixed"]))}
    ways = draw(st.sets(st.sampled_from(["timeSlicing", "mps"])))
    found["sharing"] = {way: draw(SHARES) for way in sorted(ways)}
    found["resources"] = {key: draw(NAMED) for key in draw(st.sets(st.sampled_from(["gpus", "mig"])))}
    found["imex"] = draw(st.sampled_from([{}, {"channelIDs": []}, {"channelIDs": [0], "required": True}]))
    for part in (found, found["flags"], found["sharing"], *found["sharing"].values()):
        if draw(st.booleans()):
            part[draw(UNKNOWN_KEY)] = draw(st.sampled_from([1, None, "text", [], {"deep": [{"er": 2}]}]))
    return found


@given(documents(), st.booleans(), st.sets(st.sampled_from(["1g.5gb", "1g.5gb+me", "7g.80gb"])))
def test_every_value_is_translated_or_named_and_the_agent_takes_what_is_written(
    document: dict[str, Any], as_written: bool, profiles: set[str]
) -> None:
    found = plugin.translate(document, as_written=as_written, profiles=sorted(profiles))
    every = list(leaves(document))
    assert [(one.place, one.value) for one in found.findings[: len(every)]] == [
        (one.path, shown(one.value)) for one in every
    ]
    unknown = {one.place for one in found.findings if one.said.state == State.UNKNOWN}
    assert unknown == {one.path for one in every if ".zz" in one.path}
    assert all(one.said.to or one.said.why for one in found.findings)
    checked(found)
    classes = [one["metadata"]["name"] for one in found.objects]
    assert len(set(classes)) == len(classes)


@given(st.text("ab*", max_size=6), st.text("ab*", max_size=6), st.text("ab", max_size=8))
def test_patterns_that_one_text_fits_may_both_match(one: str, other: str, text: str) -> None:
    if fnmatch.fnmatchcase(text, one) and fnmatch.fnmatchcase(text, other):
        assert may_both_match(one, other)


@given(st.text("ab*", max_size=4), st.text("ab*", max_size=4))
def test_patterns_that_may_both_match_have_a_text_that_fits_both(one: str, other: str) -> None:
    texts = {""}
    for _ in range(8):
        texts |= {text + letter for text in texts for letter in "ab"}
    both = any(fnmatch.fnmatchcase(text, one) and fnmatch.fnmatchcase(text, other) for text in texts)
    assert may_both_match(one, other) == both
