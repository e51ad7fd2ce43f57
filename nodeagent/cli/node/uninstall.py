"""`nodeagent uninstall`: undo on this host what the agent has left there.

Not while an agent runs, and not while pods hold something, unless --force is given: a container whose CPUs are widened
shares them from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.config.load import load as load_config
from nodeagent.config.schema import Config
from nodeagent.daemon.leftovers.leftover import Host
from nodeagent.daemon.leftovers.order import leftovers
from nodeagent.daemon.paths import STATUS_SOCKET, Paths, paths_of
from nodeagent.errors import StateError
from nodeagent.host.cdi import CdiFolder
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.pod_resources import given
from nodeagent.managers.deviceplugin.manager import PLUGINS
from nodeagent.state.leader import LOCK
from nodeagent.state.lock import FileLock
from nodeagent.state.store import FILE, read_only
from nodeagent.telemetry import log as log_of

EXAMPLES = (
    ("nodeagent uninstall --dry-run", "what would be undone on this host"),
    ("nodeagent uninstall --purge", "undo it, and remove the ledger"),
)
EXIT_CODES = {3: "refused: pods hold something"}
DONE, FAILED, REFUSED = 0, 1, 3
MOST_SHOWN = 5
"""Holders that a refusal names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent uninstall`."""
    parser.add_argument("--dry-run", action="store_true", help="only show what would be undone")
    parser.add_argument(
        "--force", action="store_true", help="also while pods hold something: their CPUs are shared then"
    )
    parser.add_argument("--purge", action="store_true", help="remove the ledger too")
    parser.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")
    parser.add_argument("--root", metavar="DIR", default="/", help="the machine below another root")
    parser.add_argument("--kubelet-dir", metavar="DIR", help="kubelet's folder (default: as configured)")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    path = Path(args.config) if args.config else DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None
    config = load_config(path) if path is not None else Config()
    log_of.configure("error", config.log.format)
    where = paths_of(config, config_file=path, root=args.root, kubelet_dir=args.kubelet_dir)
    host = Host(config=config, where=where)
    with _alone(where):
        why = "" if args.force else _held(host)
        if why and not args.dry_run:
            _say(f"cannot uninstall: {why}; with --force they share it from then on")
            return REFUSED
        failed = _undo(host, purge=args.purge, dry_run=args.dry_run)
    if why:
        _say(f"would be refused: {why}")
    return REFUSED if why else FAILED if failed else DONE


def _undo(host: Host, *, purge: bool, dry_run: bool) -> bool:
    """Undo everything, or only show it. Return whether something is left."""
    failed = False
    for one in leftovers(host, purge=purge):
        for line in one.lines:
            print(line)
        for note in one.notes:
            print(f"note: {note}")
        for error in (*([one.unread] if one.unread else ()), *(() if dry_run or not one.lines else one.undo())):
            _say(error)
            failed = True
    return failed


@contextlib.contextmanager
def _alone(where: Paths) -> Iterator[None]:
    """Hold the lead, so that no agent starts meanwhile. Raise StateError if one runs. Nothing is made for that."""
    socket, path = where.runtime_dir / STATUS_SOCKET, where.state_dir / LOCK
    if sockets.is_served(socket):
        raise StateError(f"cannot uninstall: an agent serves {socket}; stop it first")
    if not path.exists():
        yield
        return
    with contextlib.closing(FileLock(path)) as lead:
        if not lead.try_take():
            raise StateError(f"cannot uninstall: an agent uses {where.state_dir}; stop it first")
        yield


def _held(host: Host) -> str:
    """Return who holds something by the ledger, or, if it is gone, by the files of claims and kubelet's record; "" if
    nothing is held. Raise StateError or InputError if these cannot be read."""
    folder = host.where.state_dir
    if (folder / FILE).exists():
        holders = [str(one.holder) for one in read_only(folder)]
    else:
        holders = [*_claims(host), *_containers(host)]
    more = f" and {len(holders) - MOST_SHOWN} more" if len(holders) > MOST_SHOWN else ""
    return f"what the agent granted is held by {', '.join(holders[:MOST_SHOWN])}{more}" if holders else ""


def _claims(host: Host) -> list[str]:
    dra = host.config.dra
    found = CdiFolder(Path(dra.cdi_dir), dra.driver, host.where.sysfs).uids()
    return [f"claim {uid}" for uid in sorted(found)]


def _containers(host: Host) -> list[str]:
    """Return the containers to which kubelet's checkpoint gives resources of this configuration or its domain."""
    config, names = host.config, {host.config.full_name(one) for one in host.config.served}
    ours = {
        container
        for container, ids in (given(host.where.kubelet_dir / PLUGINS) or {}).items()
        for resource, _ in ids
        if resource in names or resource.partition("/")[0] == config.domain
    }
    return [f"container {name} of pod {uid}" for uid, name in sorted(ours)]


def _say(text: str) -> None:
    print(f"nodeagent: {text}", file=sys.stderr)
