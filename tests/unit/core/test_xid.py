"""The table of Xids, row by row against NVIDIA's catalog, and as docs/health.md has it."""

from __future__ import annotations

import json
import re

import pytest

from nodeagent.core.model.health import Remedy
from nodeagent.core.model.xid import ASK_NVML, LASTING, SAYS_NOTHING, XIDS, XidEffect, describe, effect_of, remedy_of
from tests.support.paths import CHECKOUT

ACTIONS: dict[str, list[int]] = json.loads((CHECKOUT / "tests/data/nvidia/xids.json").read_text())["actions"]
APP, INFO, WARN, CONTAINED, FATAL, UNLISTED = XidEffect
EFFECTS = {
    "RESTART_APP": {APP},
    "IGNORE": {APP, INFO, WARN},
    "RESET_GPU": {FATAL},
    "RESTART_BM": {FATAL},
    "RESTART_VM": {FATAL},
    "WORKFLOW_XID_45": {APP},
    "WORKFLOW_XID_48": {FATAL},
    "WORKFLOW_NVLINK_ERR": {FATAL},
    "WORKFLOW_NVLINK5_ERR": {CONTAINED},
    "XID_154": {INFO},
    "CHECK_MECHANICALS": {UNLISTED},
    "UPDATE_SWFW": {UNLISTED},
    "CHECK_UVM": {UNLISTED},
    "CONTACT_SUPPORT": {UNLISTED},
    "": {INFO, WARN, UNLISTED},
    "unused": {UNLISTED},
}
"""What an action can mean."""
OTHERWISE = {94: CONTAINED, 61: FATAL, 109: APP}
"""An error in memory that ended its program; an error of GPUs before Ampere, which the catalog does not cover; an error
that a program can bring about, of which the driver says whether it takes a reset (docs/decisions/0016)."""
ROWS = [(code, action) for action, codes in ACTIONS.items() for code in codes]
SOFTWARE = {37, 38, 43, 44, 66, 67, 108, 137, 141, 152, 153}
TESTS = {14, 106, 107}


def test_the_catalog_has_each_code_once() -> None:
    assert sorted(code for code, _ in ROWS) == list(range(1, 173))
    assert EFFECTS.keys() == ACTIONS.keys()


@pytest.mark.parametrize(("code", "action"), ROWS)
def test_an_xid_has_the_effect_that_its_action_asks_for(code: int, action: str) -> None:
    wanted = {OTHERWISE[code]} if code in OTHERWISE else EFFECTS[action]
    assert effect_of(code) in wanted


def test_nothing_is_in_the_table_that_the_catalog_lacks() -> None:
    assert XIDS.keys() <= {code for code, _ in ROWS}


def test_what_is_to_be_ignored_is_softwares_a_test_or_a_warning() -> None:
    ignored = set(ACTIONS["IGNORE"])
    assert {code for code in ignored if effect_of(code) is APP} == SOFTWARE
    assert {code for code in ignored if effect_of(code) is INFO} == TESTS


@pytest.mark.parametrize(("code", "action"), ROWS)
def test_what_ends_it_is_what_the_catalog_asks_for(code: int, action: str) -> None:
    reboots = action in ("RESTART_BM", "RESTART_VM")
    expected = Remedy.NONE if effect_of(code) not in LASTING else Remedy.REBOOT if reboots else Remedy.RESET
    assert remedy_of(code) == expected


def test_nvml_is_asked_where_the_xid_alone_does_not_say_enough() -> None:
    assert {*ACTIONS["WORKFLOW_NVLINK5_ERR"], *ACTIONS["XID_154"], 63, 64} <= ASK_NVML
    assert {code for code in ASK_NVML if effect_of(code) is APP} == {109}


@pytest.mark.parametrize("code", [13, 31, 43, 45, 68, 109])
def test_what_a_program_brings_about_by_itself_is_no_evidence_against_its_gpu(code: int) -> None:
    """As in NVIDIA's device plugin: a pod could take a GPU from all others otherwise."""
    assert effect_of(code) in SAYS_NOTHING and remedy_of(code) is Remedy.NONE


@pytest.mark.parametrize("code", sorted(XIDS))
def test_an_xid_is_named(code: int) -> None:
    assert re.fullmatch(rf"Xid {code} \([^()]+(\([A-Z0-9_]+\))?\)", describe(code))


def test_the_page_has_the_same_table() -> None:
    page = (CHECKOUT / "docs/health.md").read_text()
    rows = re.findall(r"^\| (application|information|degraded|contained|fatal) \| ([0-9, -]+) \|", page, re.MULTILINE)
    shown = {code: effect for effect, codes in rows for one in codes.split(", ") for code in _expanded(one)}
    assert shown == {code: str(effect) for code, (effect, _) in XIDS.items()}


def _expanded(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)
