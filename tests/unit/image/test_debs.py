"""Which Debian packages an image needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image.debs import Deb, _parse, closure
from image.errors import ImageError

NONE: frozenset[str] = frozenset()


def archive(**depends: str) -> Mapping[str, Deb]:
    """Packages by name, with dependencies as Debian writes them."""
    stanzas = (f"Package: {name}\nVersion: 1\nDepends: {text}" for name, text in depends.items())
    return {deb.name: deb for deb in map(_parse, stanzas)}


def names(wanted: Iterable[str], packages: Mapping[str, Deb], left_out: frozenset[str] = NONE) -> list[str]:
    def lookup(asked: Iterable[str]) -> Mapping[str, Deb]:
        return {name: packages[name] for name in asked if name in packages}

    return [deb.name for deb in closure(wanted, left_out, lookup)]


def test_a_package_brings_what_it_depends_on() -> None:
    packages = archive(python="libc (>= 2.36), ssl:any | tls (<< 2)", libc="gcc-base", ssl="libc", **{"gcc-base": ""})
    assert names(["python"], packages) == ["gcc-base", "libc", "python", "ssl"]


def test_of_alternatives_the_first_that_exists_is_taken_unless_another_is_there_already() -> None:
    packages = archive(a="virtual | first | second", b="second | third", first="", second="", third="")
    assert names(["a"], packages) == ["a", "first"]
    assert names(["second", "a"], packages) == ["a", "second"]
    assert names(["b"], packages) == ["b", "second"]


def test_what_is_left_out_brings_nothing() -> None:
    packages = archive(readline="libc, common", common="dpkg | info", dpkg="tar", libc="", tar="", info="")
    assert names(["readline"], packages, frozenset({"common"})) == ["libc", "readline"]


def test_a_package_that_apt_does_not_know_is_named_with_who_needs_it() -> None:
    with pytest.raises(ImageError, match=r"apt knows no package ssl3 \| ssl1, which python needs: run apt-get update"):
        names(["python"], archive(python="ssl3 | ssl1"))


NAMES = "abcdef"


@given(
    packages=st.dictionaries(st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES), max_size=3)),
    wanted=st.lists(st.sampled_from(NAMES), max_size=3),
    left_out=st.frozensets(st.sampled_from(NAMES), max_size=2),
)
def test_without_alternatives_it_is_what_can_be_reached(
    packages: Mapping[str, list[str]], wanted: list[str], left_out: frozenset[str]
) -> None:
    """Circles of dependencies end; the order of the answer is fixed."""
    reached: set[str] = set()
    waiting = [*wanted]
    while waiting:
        if (name := waiting.pop()) not in reached | left_out:
            reached.add(name)
            waiting += packages.get(name, [])
    known = archive(**{name: ", ".join(needs) for name, needs in packages.items()})
    if reached - packages.keys():
        with pytest.raises(ImageError):
            names(wanted, known, left_out)
    else:
        assert names(wanted, known, left_out) == sorted(reached)
