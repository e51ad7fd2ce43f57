"""`nodeagent import`: from kubelet's own managers, NVIDIA's device plugin and DRA driver, and the SR-IOV plugin."""

from __future__ import annotations

import argparse

from nodeagent.cli.node.kubelet_state import verb as kubelet_state
from nodeagent.cli.node.nvidia import verb as nvidia
from nodeagent.cli.node.sriov import verb as sriov

EXAMPLES = (*kubelet_state.EXAMPLES, *nvidia.EXAMPLES, *sriov.EXAMPLES)
EXIT_CODES = {3: "refused: something cannot be taken over"}
_RUN = {"kubelet-state": kubelet_state.run, "nvidia": nvidia.run, "sriov": sriov.run}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `nodeagent import`."""
    verbs = parser.add_subparsers(dest="what", metavar="kubelet-state|nvidia|sriov", required=True)
    kubelet_state.add_verb(verbs)
    nvidia.add_verb(verbs)
    sriov.add_verb(verbs)


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    return _RUN[args.what](args)
