"""The project's rules: linters, types, stubs, import layers, readable sizes, nothing that may not be said."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

import nodeagent

PACKAGE = Path(nodeagent.__file__).parent
CHECKOUT = PACKAGE.parent
PACKAGING = CHECKOUT / "packaging"
BASE = ("errors", "version", "config", "telemetry", "aio", "pb", "_fastpath")
"""Below everything: they know nothing of the rest."""
ROOMS = ("host", "kube", "nri")
"""They never import each other."""
ORDER = (
    BASE,
    ("core.model",),
    ("core.ledger",),
    ("core.placement",),
    ("core",),
    ROOMS,
    ("resources",),
    ("state",),
    ("managers",),
    ("admin",),
    ("daemon",),
    ("cli", "kinds", "__main__"),
)
"""Packages from the bottom to the top: each may import those before it, and what is in it."""
BASE_IMPORTS = {
    "errors": set(),
    "version": set(),
    "aio": {"errors"},
    "config": {"errors"},
    "telemetry": {"errors", "version"},
}
MOST_MODULES = 14
"""In one folder."""

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
        ["mypy.stubtest", "nodeagent._fastpath", "nodeagent.cli.node.bench._probe"],
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


def sources() -> Iterator[tuple[str, ast.Module]]:
    """The package's modules, and those that make what is installed of it, which an installed package does not have."""
    yield from modules()
    for path in sorted(PACKAGING.rglob("*.py")):
        yield str(path.relative_to(CHECKOUT)), ast.parse(path.read_text())


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


def package(module: str) -> tuple[int, str]:
    """Where in ORDER a module lies, and in which of its packages: the longest that fits."""
    found = [
        (number, one)
        for number, group in enumerate(ORDER)
        for one in group
        if module == one or module.startswith(f"{one}.")
    ]
    assert found, f"{module} is in no package of ORDER"
    return max(found, key=lambda one: len(one[1]))


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in modules():
        level, mine = package(name)
        for other in imported(tree):
            its, theirs = package(other)
            alongside = its == level and mine != theirs and mine in (*ROOMS, *BASE)
            if mine in BASE_IMPORTS:
                alongside = theirs not in {mine, *BASE_IMPORTS[mine]}
            if its > level or alongside:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_what_makes_the_packages_knows_little_of_the_product() -> None:
    """The version alone for the image; for Debian's manuals the commands and the schema of the configuration."""
    known = {
        "image": {"version"},
        "debian": {"version", "cli", "cli.help.parser", "cli.completion.scripts", "config.schema"},
    }
    makers = ((name, tree) for name, tree in sources() if "/" in name)
    assert not [
        f"{name} imports {other}"
        for name, tree in makers
        for other in imported(tree)
        if other not in known[name.split("/")[1]]
    ]


def test_no_folder_is_crowded() -> None:
    files = (*PACKAGE.rglob("*.py"), *PACKAGING.rglob("*.py"))
    folders = Counter(path.parent for path in files if path.name != "__init__.py")
    crowded = {str(one.relative_to(CHECKOUT)): count for one, count in folders.items() if count > MOST_MODULES}
    crowded.pop("nodeagent/pb", None)
    assert not crowded


def test_no_module_imports_itself_through_others() -> None:
    """Imports at the top of files form no cycle."""
    graph = {name: {*imported_modules(tree)} for name, tree in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """The same as files, as `from package import module` names them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nodeagent"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("nodeagent.")
                is_module = (PACKAGE / Path(*whole.split("."))).with_suffix(".py").exists()
                yield whole if is_module else node.module.removeprefix("nodeagent.")


def test_the_core_is_pure() -> None:
    """No I/O, no clock, no logging, no gRPC, no asyncio."""
    forbidden = {
        "asyncio",
        "grpc",
        "h2",
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


def test_values_are_structs_where_they_can_be() -> None:
    """A dataclass costs each start what a Struct does not; only fields outside comparison or repr need one."""
    needless = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
                text = ast.unparse(node)
                if "compare=False" not in text and "repr=False" not in text:
                    needless.append(f"{path.relative_to(PACKAGE)}: {node.name}")
    assert needless == []


def test_no_wait_can_swallow_a_cancellation() -> None:
    """Before Python 3.12 `asyncio.wait_for` returns as if nothing had happened if its caller is cancelled in the very
    moment in which the work is done: whatever waits for the cancelled task then waits indefinitely. asyncio.timeout
    does not."""
    calls = [name for name, tree in modules() for node in ast.walk(tree) if _is_wait_for(node)]
    assert calls == []


def _is_wait_for(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.alias) and ast.unparse(node).split(".")[-1] == "wait_for"


def test_the_state_knows_no_configuration_and_no_hardware() -> None:
    """What it decides on comes as core values; what a container gets is rendered by the caller."""
    known = {other for name, tree in modules() if package(name)[1] == "state" for other in imported(tree)}
    assert not {one for one in known if package(one)[1] in ("config", "resources", *ROOMS)}


def test_the_revisions_of_the_state_rise_in_the_state_alone() -> None:
    """Others have revisions of their own."""
    for name, tree in modules():
        raised = {ast.unparse(node.value) for node in ast.walk(tree) if _is_bump(node)}
        assert package(name)[1] == "state" or not any("revisions" in one for one in raised), (name, raised)


def _is_bump(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr == "bump"


def functions() -> Iterator[tuple[str, int]]:
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_the_median_function_is_under_ten_lines() -> None:
    lengths = sorted(length for _, length in functions())
    assert lengths[len(lengths) // 2] < 10


def test_files_can_be_read_in_one_sitting() -> None:
    long = {
        p.name: n
        for p in (*PACKAGE.rglob("*.p*"), *PACKAGING.rglob("*.p*"))
        if (n := p.read_bytes().count(b"\n")) > 500 and p.suffix in (".py", ".pyx", ".pxi")
    }
    assert not {name: lines for name, lines in long.items() if "_pb2" not in name}


def test_every_module_class_and_public_function_says_what_it_is() -> None:
    """A method that says nothing implements one that another class documents, such as a protocol."""
    every = [(name, *found) for name, tree in sources() for found in _public(tree, "")]
    documented = {node.name for _, owner, node in every if owner and ast.get_docstring(node)}
    silent = [
        f"{name}: {owner}.{node.name}"
        for name, owner, node in every
        if not ast.get_docstring(node) and not (owner and node.name in documented)
    ]
    assert not silent
    assert not [name for name, tree in sources() if not ast.get_docstring(tree)]


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public(parent: ast.Module | ast.ClassDef, owner: str) -> Iterator[tuple[str, Definition]]:
    """The public classes and functions of a module, and the methods of the classes: (class or "", definition)."""
    for node in parent.body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        yield owner, node
        if isinstance(node, ast.ClassDef):
            yield from _public(node, node.name)


@in_checkout
def test_the_sources_speak_of_the_project_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    hosts = re.compile(r"(?i)\b(pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian\.org|proxy\.golang)\b|/work/")
    for path in (CHECKOUT / line for line in listed.stdout.splitlines()):
        if path.suffix in (".py", ".pyx", ".pxi", ".md", ".toml", ".sh", ".yaml", ".proto", "") and path.is_file():
            assert path.name == "test_layout.py" or not hosts.search(path.read_text(errors="replace")), path


def test_the_compiled_core_is_what_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "nodeagent", "--version"], capture_output=True, text=True, check=True)
    assert "core: compiled" in done.stdout
