"""`nodeagent top`: who holds CPUs and idles, who is throttled, and what is used of each NUMA node.

What is held comes from the agent, what is used from the kernel's files. While the agent is away a line says so, and
it goes on when the agent is back.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from nodeagent.cli.agent.top.sample import Sample, read
from nodeagent.cli.agent.top.show import document, print_uses
from nodeagent.cli.agent.top.usage import Held, node_uses, uses
from nodeagent.cli.shared.facts import Facts, add_facts, facts_of
from nodeagent.cli.shared.tables import print_document
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.quantity import parse_size
from nodeagent.errors import InputError, PeerError
from nodeagent.host.sysfs.sysfs import SysFs

EXAMPLES = (
    ("nodeagent top", "who uses what it holds, refreshed in place"),
    ("nodeagent top -b -n 1", "once, as text"),
    ("nodeagent top -o json", "one sample, for a program"),
)
DELAY_S, SHORTEST_S, LONGEST_S = 2.0, 0.1, 3600.0
TO_THE_TOP = "\x1b[H\x1b[J"
"""Moves to the upper left corner and clears what follows (ECMA-48)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent top`."""
    add_facts(parser)
    parser.add_argument(
        "-d", "--delay", metavar="SECONDS", type=float, default=DELAY_S, help=f"how long a reading covers ({DELAY_S:g})"
    )
    parser.add_argument("-n", "--count", metavar="COUNT", type=int, default=0, help="end after so many (0: never)")
    parser.add_argument(
        "-b", "--batch", action="store_true", help="print one below the other, as where there is no terminal"
    )
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="json: one sample")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if not SHORTEST_S <= args.delay <= LONGEST_S:
        raise InputError(f"cannot use --delay {args.delay:g}: expected {SHORTEST_S:g} to {LONGEST_S:g} seconds")
    if args.count < 0:
        raise InputError(f"cannot use --count {args.count}: expected 0 or more")
    in_place = sys.stdout.isatty() and not args.batch and args.output == "table"
    count = 1 if args.output == "json" else args.count
    frames = Watch(facts_of(args), lambda: time.sleep(args.delay)).frames(args.output)
    for number, frame in enumerate(frames, 1):
        _draw(sys.stdout, frame, in_place)
        if number == count:
            break
    return 0


def _draw(stream: TextIO, frame: str, in_place: bool) -> None:
    stream.write(TO_THE_TOP + frame if in_place else f"{frame}\n")
    stream.flush()


class Watch:
    """Reads again and again."""

    def __init__(self, facts: Facts, pause: Callable[[], None]) -> None:
        """pause: waits between two readings."""
        self._facts = facts
        self._sysfs = SysFs(facts.root)
        self._pause = pause
        self._inventory: Inventory | None = None

    def frames(self, form: str) -> Iterator[str]:
        """Yield what to show, each after a pause. The first reading must succeed: raise PeerError if no agent answers.
        Later, an agent that is away is one frame, until it is back."""
        before, said = self._sample(), ""
        while True:
            self._pause()
            try:
                after = self._sample()
                yield self._frame(form, before, after)
                before, said = after, ""
            except PeerError as error:
                self._inventory = None
                if str(error) != said:
                    yield f"{error}; waiting for it\n"
                said = str(error)

    def _sample(self) -> Sample:
        if self._inventory is None:
            self._inventory = self._facts.inventory()
        return read(self._sysfs, [one.id for one in self._inventory.numa_nodes])

    def _frame(self, form: str, before: Sample, after: Sample) -> str:
        assert self._inventory is not None
        every = held(self._facts.page("/v1/grants"), self._facts.page("/v1/status"))
        used = list(uses(every, self._inventory, before, after))
        nodes = list(node_uses(self._inventory, before, after))
        took_s = after.at_s - before.at_s
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            if form == "json":
                print_document(document(took_s, used, nodes), form)
            else:
                print(f"holders: {len(used)}, idle: {sum(one.idles for one in used)}; over {took_s:.1f} s\n")
                print_uses(used, nodes)
        return text.getvalue()


def held(grants: Any, status: Any) -> Iterator[Held]:
    """Yield what each holder has, from the pages /v1/grants and /v1/status; only those with CPUs or pages."""
    together: dict[tuple[str, ...], list[Any]] = {}
    for one in grants:
        key = tuple(str(one[part]) for part in ("namespace", "pod", "container", "claim", "uid"))
        together.setdefault(key if any(key) else (str(one["id"]),), []).append(one)
    ids = _container_ids(status)
    for key, some in together.items():
        cpus = CpuSet(cpu for one in some for cpu in CpuSet.parse(one["cpus"]))
        pages: dict[int, int] = {}
        for pool in (pool for one in some for pool in one["hugepages"]):
            size = parse_size(pool["size"])
            pages[size] = pages.get(size, 0) + pool["pages"]
        if cpus or pages:
            uids = tuple(dict.fromkeys(uid for one in some for uid in one["pod_uids"]))
            yield Held(holder=_holder(some[0]), pod_uids=uids, container=ids.get(key[:3], ""), cpus=cpus, pages=pages)


def _holder(grant: Any) -> str:
    if grant["claim"]:
        return f"claim {grant['namespace']}/{grant['claim']}"
    return "/".join(filter(None, (grant["namespace"], grant["pod"], grant["container"]))) or f"grant {grant['id']}"


def _container_ids(status: Any) -> dict[tuple[str, ...], str]:
    """Return the ids of pinned containers by namespace, pod and container."""
    pinned = (status.get("pinning") or {}).get("pinned") or ()
    return {(one["namespace"], one["pod"], one["container"]): str(one["id"]) for one in pinned}
