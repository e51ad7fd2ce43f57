"""What is shipped: the wheel and the sdist have what they need, and the wheel works outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import nodeagent
from tests.support.paths import SHARED

CHECKOUT = Path(nodeagent.__file__).parent.parent
TESTS = CHECKOUT / "tests"
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").exists(), reason="an installed package is not built again"
)
OUTSIDE = (
    "core/test_fastpath.py",
    "host/test_topology.py",
    "kube/test_device_plugin.py",
    "state/test_store.py",
    "config/test_config.py",
)
"""Unit tests that together touch every package."""
NEEDED_FILES = {
    "Makefile",
    "setup.sh",
    "pyproject.toml",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Containerfile",
    ".dockerignore",
    ".gitignore",
}
NEEDED_FOLDERS = (".ci", "benchmarks", "demo", "deploy", "docs", "findings", "packaging", "protos", "systemd", "tests")
PARTS_OF_TESTS = {
    "builders",
    "data",
    "doubles",
    "e2e",
    "image",
    "integration",
    "oracles",
    "rules",
    "support",
    "unit",
    "vm",
    "web",
}


@pytest.fixture(scope="session")
def sdist(built: Path) -> frozenset[str]:
    """The files of the sdist, below its one folder."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar:
        return frozenset(one.name.partition("/")[2] for one in tar if one.isfile())


@pytest.fixture(scope="session")
def venv(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and the libraries of this one."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python, libraries = venv / "bin" / "python", Path(sysconfig.get_paths()["purelib"])
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", next(built.glob("*.whl"))], check=True)
    # Behind the environment's own packages; no link from there leads to the checkout (.pth files are read here only).
    (Path(site) / "libraries.pth").write_text(f"{libraries}\n")
    return venv


def test_the_sdist_has_all_sources(sdist: frozenset[str]) -> None:
    wanted = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "nodeagent").rglob("*.p*") if _source(path)}
    wanted |= {"LICENSE", "README.md", "setup.py"}
    assert not wanted - sdist


def test_the_sdist_has_all_that_its_tests_need(sdist: frozenset[str]) -> None:
    """Once it is unpacked, `make test` can run; it has nothing that a build or a test left behind."""
    folders = (path for name in NEEDED_FOLDERS for path in (CHECKOUT / name).rglob("*"))
    wanted = {str(path.relative_to(CHECKOUT)) for path in folders if path.is_file() and "__pycache__" not in path.parts}
    assert not (wanted | NEEDED_FILES) - sdist
    assert {path.split("/")[1] for path in wanted if path.startswith("tests/")} >= PARTS_OF_TESTS
    assert not [name for name in sdist if "__pycache__" in name or name.endswith((".so", ".pyc"))]


def test_the_wheel_has_the_files_of_the_page(built: Path) -> None:
    assets = (CHECKOUT / "nodeagent" / "admin" / "web" / "assets").iterdir()
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert {str(path.relative_to(CHECKOUT)) for path in assets} <= set(wheel.namelist())


def test_the_wheel_has_what_is_compiled_and_its_types(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {f"nodeagent/_fastpath{suffix}", "nodeagent/_fastpath.pyi", "nodeagent/py.typed"} <= names
    probe = "nodeagent/cli/node/bench/_probe"
    assert {f"{probe}{suffix}", f"{probe}.pyi"} <= names
    assert "nodeagent/pb/deviceplugin_pb2.py" in names
    assert not [name for name in names if name.startswith(("tests", "demo", "benchmarks"))]


def test_wheels_are_made_for_every_python_and_processor_that_is_supported() -> None:
    """One wheel for each, by cibuildwheel; the versions are those of the classifiers."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    wheels, classifiers = project["tool"]["cibuildwheel"], project["project"]["classifiers"]
    versions = [one.rpartition(" ")[2] for one in classifiers if re.search(r"Python :: 3\.\d+$", one)]
    assert wheels["build"] == [f"cp{one.replace('.', '')}-manylinux_*" for one in versions]
    assert wheels["linux"]["archs"] == ["x86_64", "aarch64"]
    assert wheels["test-command"].startswith("nodeagent --version")


def test_the_wheel_of_the_sdist_runs_the_example_configuration(built: Path, sdist: frozenset[str], venv: Path) -> None:
    """In an environment that has nothing but it and its libraries."""
    assert "systemd/config.example.yaml" in sdist
    nodeagent = venv / "bin" / "nodeagent"
    for words in (["--version"], ["config", "check", str(CHECKOUT / "systemd" / "config.example.yaml")]):
        done = subprocess.run([nodeagent, *words], cwd=venv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert str(venv) in done.stdout or "config.example.yaml: good" in done.stdout


def test_the_wheel_works_outside_the_checkout(venv: Path, tmp_path: Path) -> None:
    """Installed in an environment of its own, with the libraries of this one, it passes tests of every package."""
    python = venv / "bin" / "python"
    # pytest puts the folder above the package of tests into sys.path: it must not be the checkout.
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "e2e", "vm"))
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/unit/{name}" for name in OUTSIDE)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"NODEAGENT_SHARED": str(SHARED)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    where = subprocess.run(
        [python, "-m", "nodeagent", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(venv) in where.stdout


def _source(path: Path) -> bool:
    return path.suffix in (".py", ".pyx", ".pxi", ".pyi")
