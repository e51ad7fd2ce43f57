"""docs/doctor.md, and what the checks of `nodeagent doctor` point to."""

from __future__ import annotations

import re

import pytest

from nodeagent.cli.node.doctor.registry import CHECKS
from tests.rules.test_docs_links import anchors
from tests.support.paths import CHECKOUT

DOCS = CHECKOUT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the documentation lies in the checkout")


def test_every_check_points_to_a_place_that_exists() -> None:
    wrong = [
        check.name
        for check in CHECKS
        if check.anchor.partition("#")[2] not in anchors(DOCS / check.anchor.partition("#")[0])
    ]
    assert not wrong


def test_every_check_has_a_line_in_the_documents_and_there_is_no_other() -> None:
    named = re.findall(r"^\| `([a-z]+\.[a-z-]+)` \|", (DOCS / "doctor.md").read_text(), re.MULTILINE)
    assert named == [check.name for check in CHECKS]


def test_what_a_capture_cannot_answer_is_marked() -> None:
    """By an asterisk behind the name."""
    lines = re.findall(r"^\| `([a-z]+\.[a-z-]+)` \| (\*?)", (DOCS / "doctor.md").read_text(), re.MULTILINE)
    assert {name for name, mark in lines if mark} == {check.name for check in CHECKS if check.live}
