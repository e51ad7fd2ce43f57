"""The chart, without helm: what is derived of it is fresh, and its schema is strict.

tests/e2e/test_chart_e2e.py renders and applies it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.config.json_schema import json_schema
from nodeagent.host.cgroup.oci_bundle import FOLDERS
from nodeagent.version import VERSION
from tests.support.paths import CHECKOUT

pytestmark = pytest.mark.skipif(not (CHECKOUT / "deploy").exists(), reason="the chart lies in the checkout")
if (CHECKOUT / "deploy").exists():
    from deploy import generate

CHART = CHECKOUT / "deploy" / "chart"
FREE = {"global", "authorization", "tlsConfig", "nodeAffinity", "podAffinity", "podAntiAffinity"}
"""Values that are objects of another API: they are passed on as they are."""


def values_schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    return found


def objects(one: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each schema of an object in a schema, with the key that it is of."""
    if isinstance(one, dict):
        if one.get("type") == "object":
            yield name, one
        for key, value in one.items():
            yield from objects(value, key)
    elif isinstance(one, list):
        for value in one:
            yield from objects(value, name)


def test_versions_the_configuration_s_schema_and_the_keys_at_start_are_the_program_s() -> None:
    """make manifests writes them."""
    stale = [str(path) for path, text in generate.derived().items() if path.read_text() != text]
    assert stale == [], "run make manifests"
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)


def test_the_manifests_and_the_chart_have_changed_together() -> None:
    """Neither was edited after the manifests were made; where helm is, tests/e2e makes them again."""
    texts = {path: path.read_text() for path in (CHECKOUT / f"deploy/{name}.yaml" for name in generate.MANIFESTS)}
    assert (CHECKOUT / "deploy" / generate.DIGESTS).read_text() == generate.digests(texts), "run make manifests"


def test_every_template_is_a_manifest_or_optional() -> None:
    """One that is forgotten in the generator would be missing in the kustomization."""
    templates = {path.stem: path.read_text() for path in (CHART / "templates").glob("*.yaml")}
    assert templates.keys() - set(generate.MANIFESTS) == {"metrics"}
    assert templates["metrics"].startswith("{{- if .Values.metrics.enabled -}}")


def test_an_unknown_value_is_refused_wherever_it_stands() -> None:
    for name, one in objects(values_schema()):
        assert "additionalProperties" in one or name in FREE, f"{name}: {one}"
        assert one.get("additionalProperties") is not True, name


def test_the_configuration_in_the_values_is_checked_by_the_agent_s_own_schema() -> None:
    found = values_schema()
    assert found["properties"]["config"] == {"$ref": json_schema()["$ref"]}
    assert found["$defs"] == json_schema()["$defs"]


def test_the_folders_of_bundles_that_can_be_mounted_are_those_that_the_agent_reads() -> None:
    folders = {"", *(f"/{folder}" for folder in FOLDERS)}
    assert set(values_schema()["properties"]["runtimeBundles"]["enum"]) == folders


def test_every_reference_and_pattern_of_the_schema_can_be_used() -> None:
    """Helm's validator reads patterns as Go does: none looks ahead or refers back."""
    text = (CHART / "values.schema.json").read_text()
    found = values_schema()
    for where, name in re.findall(r'"\$ref": "#/([^/"]+)/([^"]+)"', text):
        assert name in found[where]
    patterns = [json.loads(f'"{one}"') for one in re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', text)]
    assert len(patterns) > 10
    for pattern in patterns:
        re.compile(pattern)
        assert not re.search(r"\(\?[=!<]|\\[1-9]", pattern), pattern


def test_every_value_has_a_default_and_a_comment_or_a_plain_name() -> None:
    """The schema and values.yaml name the same values, to the last level."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert names(values_schema(), defaults) == []


def names(form: Mapping[str, Any], found: Any, path: str = "") -> list[str]:
    """Paths of values that only one of the two names."""
    properties = form.get("properties", {})
    if not properties or not isinstance(found, dict) or "required" not in form:
        return []
    wrong = [f"{path}.{one}" for one in (properties.keys() ^ found.keys()) - {"global"}]
    return wrong + [
        one for key in properties.keys() & found.keys() for one in names(properties[key], found[key], f"{path}.{key}")
    ]


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "tests" / "data" / "chart").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_values_of_the_tests_name_only_values_that_there_are(path: Path) -> None:
    assert yaml.safe_load(path.read_text()).keys() <= values_schema()["properties"].keys()
