"""`nodeagent metrics`: the metrics of a running agent, to standard output or as a file for node_exporter."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from nodeagent.cli.shared import ask
from nodeagent.cli.shared.facts import facts_of
from nodeagent.host.sysfs import atomic_file

EXAMPLES = (
    ("nodeagent metrics", "the page that Prometheus scrapes"),
    ("nodeagent metrics --textfile /var/lib/node_exporter/textfile/nodeagent.prom", "a file for node_exporter"),
)
REPLAYABLE = True
OWN = "nodeagent_"
_ABOUT = re.compile(r"# (?:HELP|TYPE) (\S+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent metrics`."""
    ask.add_socket(parser)
    parser.add_argument("--textfile", metavar="FILE", help="write the agent's own metrics for node_exporter to a file")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    text = facts_of(args).text("/metrics")
    if args.textfile is None:
        sys.stdout.write(text)
        return 0
    path = Path(args.textfile)
    if not atomic_file.replace(path, "".join(own(text)).encode(), durable=False):
        path.touch()  # its age shows whether it is still written
    return 0


def own(text: str) -> Iterator[str]:
    """Yield the lines of a page that are about the agent, each with its end. What is about its process has names that
    node_exporter uses for itself."""
    for line in text.splitlines(keepends=True):
        about = _ABOUT.match(line)
        if (about[1] if about else line).startswith(OWN):
            yield line
