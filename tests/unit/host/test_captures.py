"""The tables of recorded machines, against the captured trees that they were made from where these are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec

from nodeagent.host.devices.all_kinds import builtin_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders import captures, tables
from tests.conftest import shared_path


def read(tree: SysFs) -> dict[str, object]:
    """All that the agent reads; warnings without the root."""
    found = scan(tree, builtin_kinds())
    warnings = tuple(warning.replace(tree.root, "") for warning in found.warnings)
    return msgspec.structs.asdict(found) | {"warnings": warnings}


def test_the_agent_reads_the_same_from_a_table_as_from_the_capture(recorded_tree: Callable[[str], Path]) -> None:
    """And every capture still gives its table."""
    recorded, fields = shared_path("machines"), shared_path("cases/field")
    assert {path.stem for path in recorded.glob("*.json")} == set(tables.names())
    for name in tables.names(answered=False):
        table = tables.load(name)
        capture = captures.Capture((fields if table.hwloc is None else recorded) / table.source)
        listing = recorded / f"{name}.json"
        answers = None if table.hwloc is None else captures.answers_of(json.loads(listing.read_bytes()))
        assert captures.table_of(capture, table.source, answers) == table, name
        assert read(SysFs(recorded_tree(name))) == read(capture), name


def test_a_small_tree_is_the_one_that_was_captured() -> None:
    """Every file of it."""
    fields = shared_path("cases/field")
    for path in tables.TREES.glob("*.json"):
        table = tables.load(path.stem, tables.TREES)
        assert captures.Capture(fields / table.source).whole(table.source) == table, path.stem


def test_a_table_is_written_as_it_lies_there() -> None:
    """One line for each fact, so that a change can be read."""
    for path in (*tables.TABLES.glob("*.json"), *tables.TREES.glob("*.json")):
        assert captures.written(tables.load(path.stem, path.parent)) == path.read_text(), path
