"""docs/compatibility.md against the feature gates of Kubernetes, and against what the agent publishes and shows."""

from __future__ import annotations

import json
import re

import pytest

from nodeagent.core.dra.pool import FEATURES, Features
from tests.support.paths import CHECKOUT

PAGE = CHECKOUT / "docs" / "compatibility.md"
VERSIONS = ("1.34", "1.35", "1.36", "1.37", "1.38")
OFF, ON, NONE = "gate", "on", "–"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation lies in the checkout")


def gates() -> dict[str, dict[str, bool]]:
    """The default of each gate by the version from which on it holds."""
    return json.loads((CHECKOUT / "tests/data/feature_gates.json").read_text())["gates"]  # type: ignore[no-any-return]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    (part,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def states(gate: str) -> list[str]:
    """What holds of a gate in each version."""
    known = {tuple(map(int, version.split("."))): on for version, on in gates()[gate].items()}
    found = []
    for version in VERSIONS:
        since = [one for one in known if one <= tuple(map(int, version.split(".")))]
        found.append(NONE if not since else ON if known[max(since)] else OFF)
    return found


def test_every_feature_that_the_agent_looks_for_has_its_line() -> None:
    """Under the name that the status shows, and the gate that the code names."""
    table = {cells[0].strip("`"): cells[1] for cells in rows("What is published")}
    assert list(table) == list(FEATURES) == list(Features.__struct_fields__)
    source = (CHECKOUT / "nodeagent/core/dra/pool.py").read_text()
    assert all(f"({gate})" in source for gate in table.values())


@pytest.mark.parametrize(("heading", "column"), [("What is published", 1), ("What claims and pods can use", 0)])
def test_the_tables_agree_with_the_gates_of_kubernetes(heading: str, column: int) -> None:
    table = rows(heading)
    assert table
    for cells in table:
        assert cells[column + 1 : column + 6] == states(cells[column]), cells[column]
