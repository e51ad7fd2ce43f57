"""The rules of the house: linters, types, stubs, import layers, readable sizes, nothing that may not be said."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nodeagent

PACKAGE = Path(nodeagent.__file__).parent
CHECKOUT = PACKAGE.parent
LEAVES = {
    "errors",
    "version",
    "config",
    "ledgerlayout",
    "ledgermark",
    "log",
    "metrics",
    "notify",
    "http",
    "locks",
    "strict",
}
ROOMS = ("host", "kube", "nri", "store")
LEVELS = ("_fastpath", "core", "rooms", "agent", "status", "daemon", "cli")
"""Each may import those before it. `offer`, `catalog` and `handover` belong to the agent, `claims` and what serves and
follows to the daemon."""
LEVEL_OF = {
    "_fastpath": 0,
    "core": 1,
    **dict.fromkeys(ROOMS, 2),
    "pb": 2,
    "storedgrant": 2,
    "offer": 3,
    "catalog": 3,
    "handover": 3,
    "decisions": 3,
    "agent": 3,
    "status": 4,
    "beside": 5,
    "kubelet": 5,
    "parts": 5,
    "pagegrowth": 5,
    "pagerecords": 5,
    "pagesizes": 5,
    "provisioning": 5,
    "lazyapi": 5,
    "served": 5,
    "serving": 5,
    "claims": 5,
    "claimcare": 5,
    "rendering": 5,
    "draserving": 5,
    "places": 5,
    "lead": 5,
    "following": 5,
    "pindrifts": 5,
    "pinroom": 5,
    "podwitness": 5,
    "recovery": 5,
    "unasked": 5,
    "confining": 5,
    "ownership": 5,
    "slicetelling": 5,
    "pinhandler": 5,
    "pinserving": 5,
    "intruding": 5,
    "daemon": 5,
    "cli": 6,
    "__main__": 7,
}
LEAF_IMPORTS = {
    "config": {"errors", "strict"},
    "strict": set(),
    "metrics": {"errors", "version"},
    "http": {"errors"},
    "ledgerlayout": {"errors"},
    "ledgermark": {"errors", "locks"},
    "locks": {"errors"},
    "log": set(),
}

in_checkout = pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").exists(), reason="these look at the checkout; an installed package has none"
)


@in_checkout
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["mypy.stubtest", "nodeagent._fastpath"],
    ],
    ids=["ruff-check", "ruff-format", "mypy-strict", "stubtest"],
)
def test_the_tools_find_nothing(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "pb" and parts != ("__init__",):
            yield ".".join(parts), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of this package that a file imports, without the package's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "nodeagent":
            names = [f"nodeagent.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where things come from"
            names = [node.module or ""]
        else:
            continue
        yield from (name.removeprefix("nodeagent.") for name in names if name.startswith("nodeagent."))


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in modules():
        room = name.split(".")[0]
        for other in {one.split(".")[0] for one in imported(tree)} - {room}:
            if other in LEAVES:
                continue
            if room in LEAVES or LEVEL_OF[other] > LEVEL_OF[room] or {room, other} <= set(ROOMS):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_leaves_import_only_what_they_may() -> None:
    for name, tree in modules():
        if name in LEAVES:
            assert {one.split(".")[0] for one in imported(tree)} <= LEAF_IMPORTS.get(name, set()), name


def test_the_core_is_pure() -> None:
    """No I/O, no clock, no logging, no gRPC, no asyncio."""
    forbidden = {
        "asyncio",
        "grpc",
        "io",
        "logging",
        "os",
        "pathlib",
        "random",
        "socket",
        "structlog",
        "subprocess",
        "time",
    }
    for name, tree in modules():
        if name.split(".")[0] != "core":
            continue
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {one.split(".")[0] for one in names} & forbidden, name


def functions() -> Iterator[tuple[str, int]]:
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_the_median_function_is_under_ten_lines() -> None:
    lengths = sorted(length for _, length in functions())
    assert lengths[len(lengths) // 2] < 10


def test_files_can_be_read_in_one_sitting() -> None:
    long = {
        p.name: n
        for p in PACKAGE.rglob("*.p*")
        if (n := p.read_bytes().count(b"\n")) > 500 and p.suffix in (".py", ".pyx", ".pxi")
    }
    assert not {name: lines for name, lines in long.items() if "_pb2" not in name}


def test_every_module_and_public_function_says_what_it_is() -> None:
    for name, tree in modules():
        assert ast.get_docstring(tree), name


@in_checkout
def test_the_sources_speak_of_the_project_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    hosts = re.compile(r"(?i)\b(pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian\.org|proxy\.golang)\b|/work/")
    for path in (CHECKOUT / line for line in listed.stdout.splitlines()):
        if path.suffix in (".py", ".pyx", ".pxi", ".md", ".toml", ".sh", ".yaml", ".proto", "") and path.is_file():
            assert path.name == "test_house.py" or not hosts.search(path.read_text(errors="replace")), path


def test_the_compiled_core_is_what_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "nodeagent", "--version"], capture_output=True, text=True, check=True)
    assert "core: compiled" in done.stdout
