"""Manifests with anything in them: read, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as some

from nodeagent.cli.agent.planning.forecast import _beyond
from nodeagent.cli.shared.manifests import read_objects
from nodeagent.core.advice.pod_forecast import ContainerDemand
from nodeagent.errors import InputError
from nodeagent.kube.claim_spec import CLAIM, CLASS, TEMPLATE, read_claim
from nodeagent.kube.claim_spec import KINDS as CLAIM_KINDS
from nodeagent.kube.pod_demand import KINDS as POD_KINDS
from nodeagent.kube.pod_demand import demands, pod_spec

LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)  # fmt: skip
KEYS = (
    *("kind", "spec", "template", "jobTemplate", "containers", "initContainers", "name", "resources", "requests"),
    *("limits", "cpu", "nodeagent.dev/cpu", "restartPolicy", "items", "metadata", "devices", "exactly", "selectors"),
    *("cel", "expression", "deviceClassName", "count", "capacity", "config", "opaque", "parameters", "tolerations"),
)
SCALARS = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(-3, 2**70),
    some.floats(),
    some.text(max_size=8),
    some.sampled_from(["4", "-1", "100m", "9" * 30, "device.driver == 'x'", "((", "cpu.nodeagent.dev", "Always"]),
    some.dates(),
    some.binary(max_size=4),
)
ANYTHING = some.recursive(
    SCALARS,
    lambda inner: some.one_of(
        some.lists(inner, max_size=3),
        some.dictionaries(some.one_of(some.sampled_from(KEYS), some.integers(0, 3)), inner, max_size=4),
    ),
    max_leaves=12,
)


def nearly(good: Any) -> some.SearchStrategy[Any]:
    """A document of the right form, of which any part may be anything."""
    if isinstance(good, dict):
        whole: some.SearchStrategy[Any] = some.fixed_dictionaries({key: nearly(one) for key, one in good.items()})
    elif isinstance(good, list):
        whole = some.tuples(*map(nearly, good)).map(list)
    else:
        whole = some.just(good)
    return some.integers(0, 9).flatmap(lambda one: ANYTHING if one == 0 else whole)


CONTAINER = {"name": "main", "resources": {"limits": {"nodeagent.dev/cpu": "2"}, "requests": {"cpu": 1}}}
POD_SPEC = {"containers": [CONTAINER], "initContainers": [CONTAINER], "nodeSelector": {"a": "b"}}
REQUEST = {
    "name": "r",
    "exactly": {
        "deviceClassName": "c",
        "selectors": [{"cel": {"expression": "device.driver == 'x'"}}],
        "capacity": {"requests": {"cpus": "2"}},
        "tolerations": [{"key": "a", "operator": "Exists"}],
    },
}
DEVICES = {
    "requests": [REQUEST],
    "constraints": [{"requests": ["r"], "matchAttribute": "a/b"}],
    "config": [{"opaque": {"driver": "d", "parameters": {"kind": "X"}}}],
}
GOOD = (
    {"kind": "Pod", "spec": POD_SPEC},
    {"kind": "Deployment", "spec": {"template": {"spec": POD_SPEC}}},
    {"kind": "List", "items": [{"kind": CLAIM, "metadata": {"name": "c"}, "spec": {"devices": DEVICES}}]},
    {"kind": TEMPLATE, "spec": {"spec": {"devices": DEVICES}}},
    {"kind": CLASS, "metadata": {"name": "c"}, "spec": {"selectors": REQUEST["exactly"]["selectors"]}},  # type: ignore[index]
)
DOCUMENTS = some.lists(some.one_of(ANYTHING, *map(nearly, GOOD)), min_size=1, max_size=3)


def read(path: Path) -> list[Any]:
    """What the commands make of a file: its pods and its claims. InputError."""
    objects = read_objects(str(path), "--pod")
    found: list[Any] = []
    for one in (one for one in objects if one["kind"] in POD_KINDS):
        spec = pod_spec(one)
        found.append((demands(spec), list(_beyond(spec))))
    claims = [one for one in objects if one["kind"] in CLAIM_KINDS]
    return [*found, read_claim(claims)] if claims else found


@pytest.fixture(name="path", scope="module")
def _path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifests") / "manifest.yaml"


@given(documents=DOCUMENTS)
@example(documents=[{"kind": "Pod", "spec": {"containers": [{"name": "a", "resources": [1]}]}}])
@example(documents=[{"kind": "Pod", "spec": {"containers": [{"resources": {"limits": "x"}}]}}])
@example(documents=[{"kind": "Pod", "spec": {"containers": [{"resources": {"limits": {3: 1}}}]}}])
@example(documents=[{"kind": "Pod", "spec": {"containers": [], "initContainers": 3}}])
@example(documents=[{"kind": "PodList", "items": 3}])
def test_whatever_a_manifest_has_it_is_read_or_refused_in_one_line(path: Path, documents: list[Any]) -> None:
    path.write_text(yaml.safe_dump_all(documents))
    refused(path)


@given(text=some.one_of(some.text(), some.binary().map(lambda one: one.decode("latin-1"))))
@example(text="kind: !!bool x")
@example(text="&a {kind: List, items: [*a]}")
@example(text="? [a]\n: b")
@example(text="kind: !!set {a}")
@example(text="{" * 5000)
def test_what_is_no_yaml_is_refused_in_one_line(path: Path, text: str) -> None:
    path.write_text(text, errors="surrogatepass")
    refused(path)


def refused(path: Path) -> str:
    """Why a file is refused; "" where it is read."""
    try:
        read(path)
    except InputError as error:
        assert str(error).startswith("cannot ") and "\n" not in str(error), str(error)
        return str(error)
    return ""


def test_what_expands_to_billions_of_values_is_refused_before_it_does(path: Path) -> None:
    path.write_text(f"{LAUGHS}kind: Pod\n")
    assert "has more than 500000 values, aliases counted each time" in refused(path)


def test_what_is_good_is_read_as_it_is(path: Path) -> None:
    """Also as JSON, and in lists."""
    path.write_text(json.dumps({"kind": "List", "items": [{"kind": "PodList", "items": [GOOD[0]]}]}))
    ((containers, beyond),) = read(path)
    assert containers[-1] == ContainerDemand(name="main", amounts={"nodeagent.dev/cpu": 2})
    assert beyond == ["what the pod requests of the node itself: cpu", "where the pod may run: nodeSelector"]
    path.write_text(yaml.safe_dump_all([GOOD[2], GOOD[4]]))
    (claim,) = read(path)
    assert [[one.name for one in asks] for asks in claim.requests] == [["r"]]
