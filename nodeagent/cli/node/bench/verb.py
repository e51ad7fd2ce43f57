"""`nodeagent bench placement`: what a grant, or a good placement, is worth on this machine against the worst one.

It measures for some seconds, on the CPUs of the pod or on free CPUs, never on those of others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodeagent.admin.status import grant_document
from nodeagent.cli.node.bench.measure import Bench
from nodeagent.cli.node.bench.plan import Documents, held_by_others, plan
from nodeagent.cli.node.bench.show import document, print_measured
from nodeagent.cli.shared.facts import Facts, add_facts, facts_of
from nodeagent.cli.shared.source import read_root
from nodeagent.cli.shared.tables import print_document
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError, PeerError
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.kubelet import ROOT, look
from nodeagent.state.store import FILE, read_only

EXAMPLES = (
    ("nodeagent bench placement", "what a good placement is worth on this machine, on CPUs that no one holds"),
    ("nodeagent bench placement --pod shop/till", "on the CPUs of a pod"),
)
SECONDS, SHORTEST_S, LONGEST_S = 5.0, 0.5, 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent bench`."""
    verbs = parser.add_subparsers(dest="what", metavar="placement", required=True)
    one = verbs.add_parser("placement", help="measure memory and wake-ups on granted CPUs")
    add_facts(one)
    one.add_argument("--pod", metavar="NAMESPACE/NAME", default="", help="its CPUs (default: free CPUs)")
    one.add_argument(
        "--seconds", metavar="S", type=float, default=SECONDS, help=f"{SHORTEST_S:g} to {LONGEST_S:g} ({SECONDS:g})"
    )
    one.add_argument("--kubelet-dir", metavar="DIR", default=ROOT, help=f"kubelet's folder ({ROOT})")
    one.add_argument("-o", "--output", choices=["table", "json"], default="table", help="how to write it")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if not SHORTEST_S <= args.seconds <= LONGEST_S:
        raise InputError(f"cannot use --seconds {args.seconds:g}: expected {SHORTEST_S:g} to {LONGEST_S:g}")
    if args.pod and args.pod.count("/") != 1:
        raise InputError(f"cannot use --pod {args.pod}: expected NAMESPACE/NAME")
    if getattr(args, "facts", None) is not None:
        raise InputError("cannot measure a capture: it has no CPUs that run")
    facts, sysfs = facts_of(args), SysFs("/")
    holders = Holders(facts, sysfs, Path(args.kubelet_dir), args.pod)
    wanted = plan(holders.inventory(), holders.grants(), holders.others(), holders.reserved(), args.pod)
    found = Bench(wanted, sysfs, holders.others, _say).run(args.seconds)
    if args.output == "json":
        print_document(document(found), "json")
    else:
        print_measured(found)
    return 0


def _say(step: str) -> None:
    if sys.stderr.isatty():
        print(step, file=sys.stderr)


def _with_pods(grants: Sequence[Any], status: Any) -> Documents:
    """Return grants with the names of the pods that use claims, as far as their containers are known."""
    pinned = (status.get("pinning") or {}).get("pinned") or ()
    pods = {grant: (one["namespace"], one["pod"]) for one in pinned for grant in one["grants"]}
    lacking = {one["id"]: pods[one["id"]] for one in grants if not one["pod"] and one["id"] in pods}
    return [
        {**one, "namespace": lacking[one["id"]][0], "pod": lacking[one["id"]][1]} if one["id"] in lacking else one
        for one in grants
    ]


class Holders:
    """Who holds which CPUs now: from the agent, or from its ledger while it is away, and from kubelet."""

    def __init__(self, facts: Facts, sysfs: SysFs, kubelet_dir: Path, pod: str) -> None:
        self._facts = facts
        self._sysfs = sysfs
        self._kubelet_dir = kubelet_dir
        self._pod = pod

    def inventory(self) -> Inventory:
        """Return the machine."""
        try:
            return self._facts.inventory()
        except PeerError:
            return read_root(None)

    def grants(self) -> Documents:
        """Return the grants as the page of the status socket has them. Raise StateError if the ledger, of an agent that
        is away, cannot be read."""
        try:
            return _with_pods(self._facts.page("/v1/grants"), self._facts.page("/v1/status"))
        except PeerError:
            folder = self._facts.state_dir
            return [grant_document(one) for one in read_only(folder)] if (folder / FILE).exists() else []

    def others(self) -> CpuSet:
        """Return the CPUs that anybody but the pod holds. Raise PeerError if kubelet's own are not known."""
        known = look(self._sysfs, self._kubelet_dir).cpus
        if known is None:
            raise PeerError("cannot measure: which CPUs kubelet's CPU manager has given out cannot be read")
        assigned = union((*known.assigned.values(), *known.pods.values(), *known.unnamed.values()))
        return held_by_others(self.grants(), assigned, self._pod)

    def reserved(self) -> CpuSet:
        """Return the CPUs that are never granted; none if no agent says."""
        try:
            return CpuSet.parse(str(self._facts.page("/v1/status")["inventory"]["cpus_reserved"]))
        except PeerError:
            return CpuSet()
