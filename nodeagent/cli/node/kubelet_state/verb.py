"""`nodeagent import kubelet-state`: take over what kubelet's own managers assigned. A dry run unless --apply is given.

Works while an agent runs: the ledger is read, decided on and written in one turn, all or nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nodeagent.cli.node.kubelet_state.report import Managers, Report
from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.output import forms
from nodeagent.config.load import load as load_config
from nodeagent.config.schema import Config
from nodeagent.core.kubelet import imports
from nodeagent.core.kubelet.imports import ImportPlan
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.errors import InputError, StateError
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import BOOT_ID, SysFs
from nodeagent.kube.kubelet_files import cpu_state as kubelet_state
from nodeagent.kube.kubelet_files.checkpoints import pods_there
from nodeagent.managers import kubelet_conflicts
from nodeagent.managers.kubelet import Kubelet, look
from nodeagent.state.leader import tell
from nodeagent.state.store import FILE, Store
from nodeagent.telemetry import log as log_of
from nodeagent.telemetry.log import new_op

EXAMPLES = (
    ("nodeagent import kubelet-state", "what would be taken over, what not and why, and the next steps"),
    ("nodeagent import kubelet-state --apply", "take it over; pods keep what they have"),
)
DONE, REFUSED = 0, 3


def add_verb(verbs: argparse._SubParsersAction[Any]) -> None:
    """Add `kubelet-state` with its options to the verbs of `nodeagent import`."""
    text = "take over what cpu_manager_state and memory_manager_state have; a dry run without --apply"
    verb = verbs.add_parser("kubelet-state", help=text, description=text)
    verb.add_argument("--apply", action="store_true", help="write it to the ledger")
    verb.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
    verb.add_argument("--kubelet-dir", metavar="DIR", help="kubelet's folder (default: as configured)")
    verb.add_argument("--state-dir", metavar="DIR", help="the ledger's folder (default: as configured)")
    verb.add_argument("--root", metavar="DIR", default="/", help="read the machine from a captured tree")
    forms.add_output(verb, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    path = Path(args.config) if args.config else DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None
    config = load_config(path) if path is not None else Config()
    log_of.configure("error", config.log.format)
    state_dir, sysfs = Path(args.state_dir or config.state_dir), SysFs(args.root)
    folder = Path(args.kubelet_dir or config.kubelet_dir).absolute()
    known = look(sysfs, folder, config.kubelet_config)
    kubelet = _managers(folder, known)
    # After kubelet's state: a pod that has just arrived and is in that state then already has its folder.
    there = pods_there(folder)
    inventory = scan(sysfs, ())
    reserved = kubelet_conflicts.reserved_cpus(config, known, inventory)
    with _turn(state_dir, make=args.apply) as store:
        grants = {one.id: one for one in store.load()} if store is not None else {}
        ledger = Ledger(grants=MappingProxyType(grants), reserved=reserved)
        now = time.time()
        plan = imports.plan(inventory, ledger, kubelet.said, there, at=now, boot_id=sysfs.text(BOOT_ID, ""))
        applied = args.apply and store is not None and _save(store, plan, ledger, now)
    if applied and plan.changes:
        tell(state_dir)
    Report(kubelet, plan, applied=applied).show(args)
    return REFUSED if plan.refused else DONE


def _managers(folder: Path, known: Kubelet) -> Managers:
    """Return kubelet's managers. Raise InputError if a state is in an unknown format:
    importing half of it would be worse."""
    if known.cpus is None or known.memory is None:
        raise InputError(known.cpus_error or known.memory_error)
    path = folder / kubelet_state.STATE_FILE
    if known.cpus.static and known.cpus.shared is None and path.exists():
        raise InputError(f"cannot import {path}: it has no defaultCpuSet, expected one where the policy is static")
    return Managers(folder=folder, cpus=known.cpus, memory=known.memory, places=known.config.places)


@contextlib.contextmanager
def _turn(state_dir: Path, *, make: bool) -> Iterator[Store | None]:
    """Yield the ledger, during a turn in which no agent decides anything, or None if there is none and `make` is False.
    Raise StateError if it was damaged: then only an agent can rebuild what is held."""
    if not make and not (state_dir / FILE).exists():
        yield None
        return
    with contextlib.closing(Store(state_dir)) as store:
        if store.note:
            raise StateError(f"{store.note}; start the agent, which fills it, and run this again")
        store.begin()
        try:
            yield store
        finally:
            store.end()


def _save(store: Store, plan: ImportPlan, before: Ledger, at: float) -> bool:
    """Write the whole plan, or nothing if any of it is refused. Return whether it was written."""
    if plan.refused:
        return False
    if plan.changes:
        store.save(plan.changes, op=f"import-{new_op()}", at=at, held=before.grants.values())
    return True
