"""`nodeagent config`: check a configuration, print its schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from nodeagent.cli.run import DEFAULT_CONFIG
from nodeagent.config.load import load as load_config
from nodeagent.config.schema import Config, schema
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.daemon.paths import status_readers
from nodeagent.errors import HostError
from nodeagent.host.devices.all_kinds import load_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.hugepages.manager import lacking
from nodeagent.resources.offer import offers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent config`."""
    verbs = parser.add_subparsers(dest="what", metavar="check|schema", required=True)
    check = verbs.add_parser("check", help="read a configuration and say what is wrong with it")
    check.add_argument("file", nargs="?", default=str(DEFAULT_CONFIG), metavar="FILE")
    verbs.add_parser("schema", help="print the JSON schema")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.what == "schema":
        print(json.dumps(schema(), indent=1))
        return 0
    config = load_config(Path(args.file))
    CpuSet.parse(config.reserved_cpus or "", source=f"reservedCpus of {args.file}")
    names = [one.name for one in offers(config, load_kinds()) if one.by_device_plugin]
    kinds = [f"{one.name} ({one.kind})" for one in config.served_by_dra]
    print(f"{args.file}: good")
    print(f"  device plugin: {', '.join(names) or 'nothing'}")
    print(f"  DRA, driver {config.dra.driver}: {', '.join(kinds) or 'nothing'}")
    for note in _notes(config):
        print(f"  note: {note}")
    return 0


def _notes(config: Config) -> Iterator[str]:
    """Yield what is configured and this machine lacks now: it may come later, so it is no mistake."""
    if missing := status_readers(config).missing:
        yield missing
    if not config.hugepages:
        return
    try:
        inventory = scan(SysFs("/"), ())
    except HostError as error:
        yield f"hugepages: cannot compare them with the machine: {error}"
        return
    for i, rule in enumerate(config.hugepages):
        if why := lacking(rule, inventory):
            yield f"hugepages[{i}]: {rule.page_size} on node {rule.node}: {why}"
