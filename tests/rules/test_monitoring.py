"""The dashboard, the alerts and the objectives ask for what the agent exports, and for nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.admin.state_gauges import STATE_GAUGES
from nodeagent.telemetry import metrics
from tests.support.paths import CHECKOUT

FOLDER, CHART, DOCS = CHECKOUT / "deploy" / "monitoring", CHECKOUT / "deploy" / "chart", CHECKOUT / "docs"
TARGET = frozenset({"instance", "job"})
"""Labels that Prometheus adds to what it scrapes."""
ALERTS = 11
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the dashboard and the rules lie in the checkout")


# ---------------------------------------------------------------- what is exported


def exported() -> dict[str, frozenset[str]]:
    """The labels of each series, by its name, as the agent's registry and gauges declare them."""
    found = {one.name: frozenset(one.labels) for one in STATE_GAUGES}
    for name, kind, labels in declared():
        if kind == "histogram":
            found[f"{name}_bucket"] = labels | {"le"}
            found |= {f"{name}_{end}": labels for end in ("count", "sum")}
        else:
            found[f"{name}_total" if kind == "counter" else name] = labels
    return found


def declared() -> Iterator[tuple[str, str, frozenset[str]]]:
    for collector in list(metrics.REGISTRY._collector_to_names):
        if hasattr(collector, "_labelnames"):
            yield collector._name, collector._type, frozenset(collector._labelnames)


def bounds(histogram: str) -> frozenset[str]:
    (found,) = (one for one in metrics.REGISTRY._collector_to_names if getattr(one, "_name", "") == histogram)
    return frozenset(str(float(one)) for one in found._kwargs["buckets"])


def test_what_is_taken_for_exported_is_what_a_scrape_shows() -> None:
    """Every name of the registry's page, and its labels where it has a sample."""
    names = exported()
    for family in metrics.REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("nodeagent_") and not sample.name.endswith("_created"):
                assert names[sample.name] == sample.labels.keys(), sample.name
    assert "nodeagent_allocate_seconds_bucket" in names and "nodeagent_pin_drift_total" in names


# ---------------------------------------------------------------- what is asked for


def dashboard() -> dict[str, Any]:
    found = json.loads((FOLDER / "dashboard.json").read_text())
    assert isinstance(found, dict)
    return found


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [one for one in group["rules"] if "alert" in one]


def queries() -> Iterator[tuple[str, str]]:
    """Each query, with where it stands."""
    for panel in dashboard()["panels"]:
        yield from ((f"panel {panel['title']}", one["expr"]) for one in panel.get("targets", ()))
    for one in dashboard()["templating"]["list"]:
        if one["type"] == "query":
            yield f"variable {one['name']}", one["definition"]
    yield from ((f"alert {one['alert']}", one["expr"]) for one in alerts())
    (block,) = re.findall(r"^```promql\n(.*?)^```", (DOCS / "slo.md").read_text(), re.M | re.S)
    yield from (("slo.md", line) for line in block.splitlines() if not line.startswith("#"))


def used(query: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The names of the agent's series in a query, with the labels that are matched."""
    for name, matchers in re.findall(r"\b(nodeagent_\w+)(?:\{([^}]*)\})?", query):
        yield name, dict(re.findall(r'(\w+)\s*=~?\s*"([^"]*)"', matchers))


@pytest.mark.parametrize(("where", "query"), tuple(queries()))
def test_a_query_names_series_and_labels_that_there_are(where: str, query: str) -> None:
    names = exported()
    found = list(used(query))
    assert found or "up{" in query
    labels = set[str]()
    for name, matchers in found:
        assert name in names, f"{where}: there is no {name}"
        labels |= names[name]
        assert matchers.keys() <= names[name] | TARGET, f"{where}: {name} has no such label"
        if "le" in matchers:
            assert matchers["le"] in bounds(name.removesuffix("_bucket")), f"{where}: {name} has no such bucket"
    by = {one.strip() for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query) for one in group.split(",")}
    assert by - {""} <= labels | TARGET, f"{where}: {by - labels} are no labels of what is summed"


def test_every_legend_and_column_shows_a_label_that_there_is() -> None:
    names = exported()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            labels = {label for name, _ in used(target["expr"]) for label in names[name]} | TARGET
            assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= labels, panel["title"]
            for one in panel.get("transformations", ()):
                assert one["options"]["indexByName"].keys() <= labels, panel["title"]


def test_every_histogram_of_the_agent_has_an_objective_or_is_no_service() -> None:
    text = (DOCS / "slo.md").read_text()
    histograms = {name for name, kind, _ in declared() if kind == "histogram"}
    assert {one for one in histograms if f"`{one}`" not in text} == {"nodeagent_scan_seconds"}


# ---------------------------------------------------------------- alerts and runbooks


def test_there_are_eleven_alerts_and_each_says_what_it_means() -> None:
    found = alerts()
    assert len({one["alert"] for one in found}) == len(found) == ALERTS
    for one in found:
        assert one["labels"]["severity"] in ("warning", "critical"), one["alert"]
        assert one["annotations"].keys() == {"summary", "description", "runbook_url"}, one["alert"]


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    """Each says what it means, how to check it and what to do; its anchor is where the alert points to."""
    parts = re.split(r"^## (\w+)\n", (DOCS / "runbooks.md").read_text(), flags=re.M)[1:]
    runbooks = dict(zip(parts[::2], parts[1::2], strict=True))
    assert runbooks.keys() == {one["alert"] for one in alerts()}
    address = yaml.safe_load((CHART / "values.yaml").read_text())["metrics"]["prometheusRule"]["runbookUrl"]
    assert address.startswith("https://") and address.endswith("/docs/runbooks.md")
    for one in alerts():
        assert one["annotations"]["runbook_url"] == f"{address}#{one['alert'].lower()}"
        assert re.findall(r"^\*\*(\w+)\.\*\*", runbooks[one["alert"]], re.M) == ["Meaning", "Check", "Do"]


def test_labels_in_the_text_of_an_alert_are_those_of_its_query() -> None:
    names = exported()
    for one in alerts():
        grouped = re.findall(r"\bby\s*\(([^)]*)\)", one["expr"])
        labels = {label for name, _ in used(one["expr"]) for label in names[name]} | TARGET
        labels = {part.strip() for group in grouped for part in group.split(",")} if grouped else labels
        text = " ".join(one["annotations"].values())
        assert {*re.findall(r"\$labels\.(\w+)", text)} <= labels, one["alert"]


def promtool() -> str | None:
    folder = os.environ.get("NODEAGENT_E2E_BIN", "")
    return (
        shutil.which("promtool", path=folder)
        if folder and (Path(folder) / "promtool").exists()
        else shutil.which("promtool")
    )


@pytest.mark.skipif(promtool() is None, reason="promtool is neither in NODEAGENT_E2E_BIN nor in PATH")
@pytest.mark.parametrize("words", [["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]])
def test_prometheus_takes_the_rules_and_each_fires_when_it_should(words: list[str]) -> None:
    """And not otherwise."""
    command = [promtool() or "", *words]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(promtool() is None, reason="promtool is neither in NODEAGENT_E2E_BIN nor in PATH")
def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    """Those of the dashboard with what Grafana puts in place of its variables."""
    known = (("$__rate_interval", "5m"), ("$instance", ".*"))
    rules = []
    for number, (_, query) in enumerate(one for one in queries() if not one[0].startswith("variable")):
        for name, value in known:
            query = query.replace(name, value)
        rules.append({"record": f"query_{number}", "expr": query})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    command = [promtool() or "", "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    cases = [case for one in tests for case in one["alert_rule_test"]]
    assert {one["alertname"] for one in cases if one.get("exp_alerts")} == {one["alert"] for one in alerts()}
