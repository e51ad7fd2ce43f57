"""The two recipes of the image, `Containerfile` and packaging/image, make the same image; the lock fits the project."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.rules.test_deploy import container
from tests.support.paths import CHECKOUT

pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "Containerfile").exists(), reason="the recipes lie in the checkout; an installed package has none"
)
if (CHECKOUT / "Containerfile").exists():
    from image import product, recipe
    from image.oci import REFERENCE
    from nodeagent.version import VERSION

PYTHON = "python3.11"
"""Of debian:bookworm, which Containerfile names."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The instructions from one FROM to the next, each with its operands."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [operand for instruction, operand in self.steps if instruction == name]

    def one(self, name: str) -> str:
        (found,) = self.all(name)
        return found

    def pairs(self, name: str) -> dict[str, str]:
        """The assignments of LABEL, ENV or ARG."""
        words = [word for operand in self.all(name) for word in shlex.split(operand)]
        return dict(word.split("=", 1) for word in words)


def stages() -> Sequence[Stage]:
    text = (CHECKOUT / "Containerfile").read_text()
    lines = (line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#"))
    found: list[Stage] = []
    for name, operand in (line.split(maxsplit=1) for line in lines):
        if name == "FROM":
            found.append(Stage(operand))
        else:
            found[-1].steps.append((name, operand))
    return found


def installed(stage: Stage) -> set[str]:
    """The packages of its apt-get install."""
    runs = [re.search(r"apt-get install (.*?)(?:&&|$)", one) for one in stage.all("RUN")]
    words = [word for one in runs if one for word in one[1].split()]
    return {word for word in words if not word.startswith("-")}


def as_in_bookworm(names: Sequence[str]) -> set[str]:
    return {name.replace(recipe.PYTHON, PYTHON) for name in names}


def test_both_install_the_same_packages_and_no_compiler() -> None:
    build, final = stages()
    assert installed(final) == as_in_bookworm(recipe.PACKAGES)
    assert {"gcc", "libc6-dev"} <= installed(build)
    assert build.base.removesuffix(" AS build") == final.base, "the wheel is built for the libraries that it meets"


def test_both_say_the_same_of_themselves() -> None:
    final = stages()[-1]
    given = {**final.pairs("ARG"), "SOURCE": "https://sources.example/nodeagent"}
    assert given["VERSION"] == VERSION
    labels = {
        key: re.sub(r"\$\{(\w+)\}", lambda name: given[name[1]], text) for key, text in final.pairs("LABEL").items()
    }
    assert labels == recipe.labels(given["SOURCE"])
    assert "org.opencontainers.image.source" not in recipe.labels("")


def test_both_start_the_same_command_as_the_same_user() -> None:
    final = stages()[-1]
    assert json.loads(final.one("ENTRYPOINT")) == list(recipe.ENTRYPOINT)
    assert json.loads(final.one("CMD")) == list(recipe.COMMAND)
    assert final.one("USER") == recipe.USER
    assert final.pairs("ENV") == recipe.ENVIRONMENT
    assert final.one("COPY").split()[1:] == [f"/{recipe.PREFIX}"] * 2


def test_both_build_the_wheel_from_the_same_sources() -> None:
    """And the context that an engine is sent has these alone."""
    copied = [word for operand in stages()[0].all("COPY") for word in operand.split()[:-1]]
    lock = str(product.LOCK.relative_to(CHECKOUT))
    assert {*copied} == {*product.SOURCES, lock}
    ignored = (CHECKOUT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == {*copied}


def test_the_daemonset_starts_what_the_image_starts() -> None:
    assert container()["command"] == [*recipe.ENTRYPOINT, *recipe.COMMAND]
    assert container()["securityContext"]["runAsUser"] == int(recipe.USER.partition(":")[0])
    assert container()["image"] == REFERENCE


def pins() -> Mapping[str, str]:
    """Version by canonical name."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", product.LOCK.read_text(), re.MULTILINE))


def test_the_lock_has_every_dependency_in_a_version_that_the_project_accepts() -> None:
    """`make image-lock` brings it up to date."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    locked = {canonicalize_name(name): version for name, version in pins().items()}
    for wanted in map(Requirement, project["dependencies"]):
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier, str(wanted)


def test_every_pin_has_hashes() -> None:
    text = product.LOCK.read_text()
    assert len(pins()) == len(re.findall(r"== *\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text))
