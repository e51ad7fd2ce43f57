"""`nodeagent config`: check a configuration, by itself or against this machine; print its schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nodeagent.admin.status_endpoint import status_readers
from nodeagent.cli.node.run import DEFAULT_CONFIG
from nodeagent.cli.shared.source import add_root, read_root, with_divided
from nodeagent.config.json_schema import json_schema
from nodeagent.config.load import load as load_config
from nodeagent.config.load import placed
from nodeagent.config.schema import Config
from nodeagent.core.model.inventory import Inventory
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.hugepages.manager import lacking
from nodeagent.managers.kubelet_conflicts import configured_cpus
from nodeagent.resources.offer import Offer, misspelt, offers, selectors

EXAMPLES = (
    ("nodeagent config check", f"whether {DEFAULT_CONFIG} is good, and what would be served on this machine"),
    ("nodeagent config check new.yaml --root /tmp/captured", "the same of a file, on a captured machine"),
    ("nodeagent config schema > nodeagent.schema.json", "the JSON schema, for editors"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent config`."""
    verbs = parser.add_subparsers(dest="what", metavar="check|schema", required=True)
    check = verbs.add_parser("check", help="read a configuration and say what is wrong with it")
    check.add_argument("file", nargs="?", default=str(DEFAULT_CONFIG), metavar="FILE")
    check.add_argument(
        "--here",
        action="store_true",
        help="also compare it with this machine, its kubelet and its runtime; exit code 1 if something will not work",
    )
    add_root(check)
    verbs.add_parser("schema", help="print the JSON schema")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.what == "schema":
        print(json.dumps(json_schema(), indent=1))
        return 0
    path = Path(args.file)
    config = load_config(path)
    sysfs = SysFs(args.root or "/")
    state_dir = Path(sysfs.path(config.state_dir.lstrip("/")))
    inventory = read_root(args.root, with_divided(selectors(config), state_dir, sysfs))
    with placed(path):
        every = offers(config, load_kinds())
        configured_cpus(config.reserved_cpus or "", inventory)
    names = [one.name for one in every if one.by_device_plugin]
    kinds = [f"{one.name} ({one.kind})" for one in config.served_by_dra]
    print(f"{args.file}: good")
    print(f"  device plugin: {', '.join(names) or 'nothing'}")
    print(f"  DRA, driver {config.dra.driver}: {', '.join(kinds) or 'nothing'}")
    for note in _notes(config, every, inventory):
        print(f"  note: {note}")
    return _compared(path, args.root) if args.here else 0


def _compared(path: Path, root: str | None) -> int:
    """Print what `nodeagent doctor` has against this configuration on this machine; return 1 if something fails."""
    from nodeagent.cli.node.doctor.verb import compare

    return compare(path, root)


def _notes(config: Config, every: Iterable[Offer], inventory: Inventory) -> Iterator[str]:
    """Yield what is configured and this machine lacks now: it may come later, so it is no mistake."""
    if missing := status_readers(config).missing:
        yield missing
    yield from misspelt(every, inventory)
    for i, rule in enumerate(config.hugepages):
        if why := lacking(rule, inventory):
            yield f"hugepages[{i}]: {rule.page_size} on node {rule.node}: {why}"
