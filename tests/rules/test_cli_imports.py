"""What is typed often starts fast: no verb that asks an agent loads what is only for others."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "asyncio",
    "concurrent.futures",
    "dataclasses",
    "email",
    "grpc",
    "h2",
    "http.client",
    "inspect",
    "msgspec",
    "prometheus_client",
    "psutil",
    "rich",
    "sqlite3",
    "structlog",
    "yaml",
    "nodeagent.host",
    "nodeagent.daemon",
)
PROGRAM = """
import sys
before = set(sys.modules)
from nodeagent.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("status",),
        ("devices",),
        ("grants",),
        ("grants", "-o", "jsonpath={[*].id}"),
        ("health",),
        ("release", "g-1", "--yes"),
        ("reload",),
        ("wait", "--timeout=0"),
        ("__complete", "grants", "--po"),
    ],
    ids=" ".join,
)
def test_a_verb_that_asks_the_agent_loads_little(words: tuple[str, ...]) -> None:
    """No agent answers here; what is loaded for the answer's table is loaded before that."""
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "nodeagent.cli" in loaded
    assert not loaded & set(HEAVY)
