"""`nodeagent import nvidia`: the configuration of NVIDIA's device plugin and DRA driver as one of the agent, and claims
for it. A dry run unless --out is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nodeagent.cli.node.nvidia.report import Report
from nodeagent.cli.node.nvidia.sources import Asked, take
from nodeagent.cli.output import forms
from nodeagent.cli.shared.source import add_root, read_root

EXAMPLES = (
    ("nodeagent import nvidia config.yaml", "what becomes of each key of the device plugin's configuration, and why"),
    ("nodeagent import nvidia config.yaml claims.yaml --out /tmp/new", "write a configuration, and the claims for it"),
    ("nodeagent import nvidia config.yaml --mig-profile 1g.10gb", "for a node whose instances are not there yet"),
    ("helm get values nvidia-dra-driver-gpu -o yaml | nodeagent import nvidia -", "the same of the DRA driver's chart"),
)
DONE, REFUSED = 0, 3


def add_verb(verbs: argparse._SubParsersAction[Any]) -> None:
    """Add `nvidia` with its options to the verbs of `nodeagent import`."""
    text = "translate the configuration of NVIDIA's device plugin or DRA driver, and claims; a dry run without --out"
    verb = verbs.add_parser("nvidia", help=text, description=text)
    verb.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="the device plugin's configuration, a ConfigMap with it, values of the DRA driver's chart, or claims, "
        "templates and classes; - for standard input",
    )
    verb.add_argument("--out", metavar="DIR", help="write what comes out into this folder")
    verb.add_argument("--entry", metavar="NAME", default="", help="the entry of a ConfigMap that has several")
    verb.add_argument(
        "--mig-profile",
        action="append",
        metavar="PROFILE",
        help="a profile of the node's MIG instances, such as 3g.40gb (default: those that are on this machine)",
    )
    verb.add_argument(
        "--as-written",
        action="store_true",
        help="use names and patterns of resources, rename and devices, which NVIDIA's plugin reads and ignores",
    )
    add_root(verb)
    forms.add_output(verb, forms.ANSWER_FORMS)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    profiles = args.mig_profile or _profiles_here(args.root)
    taken = take(args.files, Asked(profiles=profiles, as_written=args.as_written, entry=args.entry))
    report = Report(taken, Path(args.out) if args.out else None)
    report.write()
    report.show(args)
    return REFUSED if report.incomplete else DONE


def _profiles_here(root: str | None) -> list[str]:
    """Return the profiles of the MIG instances of this machine."""
    every = (one.attributes.get("mig_profile") for one in read_root(root).devices if one.partition is None)
    return sorted({str(one) for one in every if one})
