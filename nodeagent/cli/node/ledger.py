"""`nodeagent ledger`: transfer the grants of one ledger to another, between versions or machines."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.shared.facts import add_state_dir, state_dir_of
from nodeagent.errors import InputError, Refused, StateError

API_VERSION, KIND = "nodeagent.dev/v1alpha1", "Ledger"
EXAMPLES = (
    ("nodeagent ledger export -o grants.json", "all grants, for another version or machine"),
    ("nodeagent ledger import grants.json", "add them to the ledger of an agent that is stopped"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent ledger`."""
    verbs = parser.add_subparsers(dest="what", metavar="VERB", required=True)
    export = verbs.add_parser("export", help="write all grants as JSON; also while the agent runs")
    export.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    load = verbs.add_parser("import", help="add the grants of an export to the ledger; not while the agent runs")
    load.add_argument("file", metavar="FILE", help='"-": standard input')
    for one in (export, load):
        one.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
        add_state_dir(one)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    folder = state_dir_of(args)
    return _export(folder, args.output) if args.what == "export" else _import(folder, args.file)


def _export(folder: Path, output: str | None) -> int:
    from nodeagent.host.sysfs import atomic_file as files
    from nodeagent.state.grant_json import document
    from nodeagent.state.store import read_only

    grants = [document(one) for one in read_only(folder)]
    data = msgspec.json.encode({"apiVersion": API_VERSION, "kind": KIND, "grants": grants})
    text = msgspec.json.format(data, indent=2) + b"\n"
    if output:
        files.replace(Path(output), text)
    else:
        sys.stdout.write(text.decode())
    return 0


def _import(folder: Path, file: str) -> int:
    """Import all grants of a file or none. Grants that the ledger already has stay as they are."""
    from nodeagent.core.ledger import ledger as ledger_of
    from nodeagent.core.ledger.ledger import ADOPTED, Change, Ledger
    from nodeagent.state.grant_json import from_document
    from nodeagent.state.leader import LOCK
    from nodeagent.state.lock import FileLock
    from nodeagent.state.store import Store

    grants = [from_document(one, file) for one in _read(file)]
    with contextlib.ExitStack() as open_files:
        # Before the ledger is opened: one of a newer build, which the agent may be, would be moved aside.
        if not open_files.enter_context(contextlib.closing(FileLock(folder / LOCK))).try_take():
            raise StateError(f"cannot import {file}: an agent uses {folder}; stop it first")
        store = open_files.enter_context(contextlib.closing(Store(folder, accept_loss=True)))
        ledger = Ledger()
        for one in store.load():
            ledger = ledger_of.grant(ledger, one)
        added = [one for one in grants if ledger.grants.get(one.id) != one]
        for one in added:
            try:
                ledger = ledger_of.grant(ledger, one)
            except Refused as refusal:
                raise InputError(f"cannot import grant {one.id} of {file}: {refusal}") from None
        adopted = [Change(action=ADOPTED, grant=one, why=f"imported from {file}") for one in added]
        store.save(adopted, op="import", at=time.time())
    print(f"{len(added)} grants added, {len(grants) - len(added)} were there already")
    return 0


def _read(file: str) -> list[Any]:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        found = msgspec.json.decode(data)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    if not isinstance(found, dict) or (found.get("apiVersion"), found.get("kind")) != (API_VERSION, KIND):
        raise InputError(f'cannot read {file}: expected apiVersion "{API_VERSION}" and kind "{KIND}"')
    grants = found.get("grants")
    if not isinstance(grants, list):
        raise InputError(f"cannot read {file}: grants is {type(grants).__name__}, expected a list")
    return grants
