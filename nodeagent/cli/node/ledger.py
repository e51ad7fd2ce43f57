"""`nodeagent ledger`: show the audit; transfer the grants of one ledger to another, between versions or machines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.output import forms
from nodeagent.cli.output.columns import Column
from nodeagent.errors import InputError, Refused, StateError

API_VERSION, KIND = "nodeagent.dev/v1alpha1", "Ledger"
LAST = 100
EXAMPLES = (
    ("nodeagent ledger audit --last 20", "what was granted, refused and released lately, and why"),
    ("nodeagent ledger audit -o jsonpath='{[?(@.action==\"refused\")].why}'", "the reasons of refusals"),
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
    audit = verbs.add_parser("audit", help="show what was granted, released and refused, and why; newest last")
    forms.add_output(audit)
    audit.add_argument("--last", metavar="N", type=int, default=LAST, help=f"at most N entries ({LAST}; 0: all)")
    for one in (export, load, audit):
        one.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
        one.add_argument("--state-dir", metavar="DIR", help="the ledger's folder (default: the configuration's)")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    folder = Path(args.state_dir) if args.state_dir else _state_dir(args.config)
    match args.what:
        case "audit":
            return _audit(folder, args)
        case "export":
            return _export(folder, args.output)
        case _:
            return _import(folder, args.file)


def _state_dir(config_file: str | None) -> Path:
    from nodeagent.config.load import load as load_config
    from nodeagent.config.schema import Config

    path = Path(config_file) if config_file else DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None
    return Path((load_config(path) if path is not None else Config()).state_dir)


def _audit(folder: Path, args: argparse.Namespace) -> int:
    """Print the newest entries of the audit; 0 or less means all."""
    from nodeagent.state.audit import newest
    from nodeagent.state.store import FILE

    entries = newest(folder / FILE, args.last if args.last > 0 else -1)
    forms.write_list(args, list(map(dataclasses.asdict, entries)), AUDIT, name=lambda one: one["grant"])
    return 0


def _action(entry: Mapping[str, Any]) -> str:
    return f"{entry['action']} ({entry['times']} times)" if entry["times"] > 1 else str(entry["action"])


AUDIT = (
    Column("TIME", lambda one: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one["at"]))),
    Column("ACTION", _action),
    Column("GRANT", lambda one: one["grant"]),
    Column("HOLDER", lambda one: one["holder"]),
    Column("WHAT", lambda one: one["what"]),
    Column("WHY", lambda one: one["why"]),
)


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
