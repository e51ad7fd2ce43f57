"""`nodeagent history`: what was granted, refused and released, and who held what at a moment.

It reads the ledger file: while the agent runs, after it has stopped, and of a capture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from nodeagent.cli.shared.facts import Facts, add_state_dir, facts_of
from nodeagent.cli.shared.moments import local, moment, rfc3339
from nodeagent.cli.shared.places import DEFAULT_CONFIG
from nodeagent.cli.shared.tables import print_document, print_table
from nodeagent.core.ledger.tenure import Decided, Tenure, tenures
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.grant import CLAIM, Grant, Holder, describe
from nodeagent.errors import InputError, StateError

if TYPE_CHECKING:
    from nodeagent.state.audit import AuditEntry

EXAMPLES = (
    ("nodeagent history --last 20", "what was granted, refused and released lately, by whom and why"),
    ("nodeagent history --cpu 7 --at 03:12", "who held a CPU at a moment"),
    ("nodeagent history --pod shop/till --since 2h", "what happened to a pod"),
    ("nodeagent history --since 1d -o jsonl", "one JSON object a line, for a collector"),
)
REPLAYABLE = True
LAST = 100
COLUMNS = ("TIME", "ACTION", "HOLDER", "WHAT", "WHY", "GRANT")
DRIFT = "drift"
"""Action of the audit; its module is loaded only when it is read."""
NO_GRANT = Grant(id="", holder=Holder(api=""))
HELD_COLUMNS = ("HOLDER", "HOLDS", "SINCE", "UNTIL", "GRANT")


class Wanted(msgspec.Struct, frozen=True):
    """Whose history is asked for; what is empty selects everything."""

    pod: str = ""
    claim: str = ""
    cpus: CpuSet = EMPTY
    device: str = ""

    def __bool__(self) -> bool:
        return bool(self.pod or self.claim or self.cpus or self.device)

    def has(self, entry: AuditEntry) -> bool:
        """Return whether an entry is about it. Of a refusal only the words are known."""
        if entry.held is not None:
            return self.holds(entry.held)
        if entry.action == DRIFT:
            return not self or (not (self.claim or self.cpus or self.device) and _drifted_pod(entry.what, self.pod))
        names = f"{entry.holder} {entry.what} ".replace(",", " ").replace(";", " ").split()
        return not self or not (self.cpus or (self.device and self.device not in names) or not self._named(entry))

    def _named(self, entry: AuditEntry) -> bool:
        of_claim = f"claim {self.claim}" in (entry.holder, entry.holder.partition(" of ")[0])
        return (not self.claim or of_claim) and (not self.pod or _refused_pod(entry.holder, self.pod))

    def holds(self, grant: Grant) -> bool:
        """Return whether a grant is about it."""
        parts = (*grant.devices, *grant.shares, *grant.ids)
        return (
            (not self.pod or _is_of(grant, self.pod))
            and (not self.claim or self.claim in (_claim(grant), grant.holder.uid))
            and (not self.cpus or bool(self.cpus & grant.cpus))
            and (not self.device or self.device in parts)
        )

    def __str__(self) -> str:
        named = (("pod", self.pod), ("claim", self.claim), ("CPU", str(self.cpus)), ("device", self.device))
        return ", ".join(f"{what} {which}" for what, which in named if which)


def _claim(grant: Grant) -> str:
    return f"{grant.holder.namespace}/{grant.holder.claim}" if grant.holder.api == CLAIM else ""


def _is_of(grant: Grant, pod: str) -> bool:
    """Return whether a pod, given as NS/NAME or UID, holds a grant. A claim names its pods by UID, and by name only if
    it was made from the pod's template: then it is NAME-CLAIM-SUFFIX."""
    holder, (namespace, _, name) = grant.holder, pod.partition("/")
    if pod in grant.pod_uids or not name:
        return pod in grant.pod_uids
    own = bool(holder.pod_claim) and holder.claim.startswith(f"{name}-{holder.pod_claim}-")
    return holder.namespace == namespace and (holder.pod == name or own)


def _refused_pod(holder: str, pod: str) -> bool:
    """Return whether a refusal names a pod: "claim NS/CLAIM of POD, POD"."""
    claim, _, pods = holder.partition(" of ")
    namespace, _, name = pod.partition("/")
    return bool(name) and claim.startswith(f"claim {namespace}/") and name in pods.split(", ")


def _drifted_pod(what: str, pod: str) -> bool:
    """Return whether a drift is of a pod, NAMESPACE/NAME or a UID, or of one of its containers: "NS/POD/CONTAINER: …",
    "pod NS/POD: …", or "pod UID: …" where no name is known."""
    return f"{what.removeprefix('pod ')}/".startswith((f"{pod}/", f"{pod}: "))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent history`."""
    parser.add_argument("--pod", metavar="NS/NAME", default="", help="only what concerns a pod, or its UID")
    parser.add_argument("--claim", metavar="NS/NAME", default="", help="only what concerns a claim, or its UID")
    parser.add_argument("--cpu", metavar="LIST", default="", help="only what concerns CPUs, such as 7 or 0-3")
    parser.add_argument("--device", metavar="ID", default="", help="only what concerns a device")
    parser.add_argument("--at", metavar="WHEN", help="who held it at a moment, such as 03:12")
    parser.add_argument("--since", metavar="WHEN", help="from a moment on, such as 2h or '2026-11-28 03:00'")
    parser.add_argument("--until", metavar="WHEN", help="up to a moment")
    parser.add_argument(
        "--last", metavar="N", type=int, help=f"at most N entries ({LAST}, or with --since all; 0: all)"
    )
    parser.add_argument("-o", "--output", choices=["table", "json", "jsonl"], default="table", help="how to write it")
    add_state_dir(parser)
    parser.add_argument("--config", metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG}, if it exists)")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    facts, wanted = facts_of(args), _wanted(args)
    if args.at is not None:
        if args.since is not None or args.until is not None or args.last is not None:
            raise InputError("cannot use --at with --since, --until or --last: it names one moment")
        return _show_held(facts, wanted, moment(args.at, facts.now_s, option="--at"), args.output)
    entries = [one for one in _window(facts, args) if wanted.has(one)]
    most = args.last if args.last is not None else 0 if args.since is not None else LAST
    _print(entries[-most:] if most > 0 else entries, args.output, entry_document, _print_entries)
    return 0


def _wanted(args: argparse.Namespace) -> Wanted:
    for option, value in (("--pod", args.pod), ("--claim", args.claim)):
        if value.startswith("/") or value.endswith("/") or value.count("/") > 1:
            raise InputError(f"cannot use {option} {value!r}: expected NAMESPACE/NAME or a UID")
    return Wanted(args.pod, args.claim, CpuSet.parse(args.cpu, source="--cpu"), args.device)


def _window(facts: Facts, args: argparse.Namespace) -> Iterable[AuditEntry]:
    """Return the entries of a period; those that count several refusals if any of these lies in it."""
    since = None if args.since is None else moment(args.since, facts.now_s, option="--since")
    until = None if args.until is None else moment(args.until, facts.now_s, option="--until")
    if since is not None and until is not None and until < since:
        raise InputError(f"cannot use --until {args.until}: it is before --since {args.since}")
    entries = _entries(facts)
    return [one for one in entries if (since is None or one.at >= since) and (until is None or one.first_at <= until)]


def _entries(facts: Facts) -> list[AuditEntry]:
    from nodeagent.state.audit import newest
    from nodeagent.state.store import FILE

    return newest(facts.state_dir / FILE, -1)


# ---------------------------------------------------------------- entries


def entry_document(entry: AuditEntry) -> dict[str, Any]:
    """Return an entry in its documented form: every field is always there, and none changes its type."""
    return {
        "time": rfc3339(entry.at),
        "first_time": rfc3339(entry.first_at),
        "times": entry.times,
        "action": entry.action,
        "holder": entry.holder,
        "what": entry.what,
        "why": entry.why,
        "op": entry.op,
        **grant_fields(entry.held),
    }


def grant_fields(grant: Grant | None) -> dict[str, Any]:
    """Return what an entry says of a grant; of none, the same fields, empty."""
    if grant is None:
        grant = NO_GRANT
    holder = grant.holder
    return {
        "grant": grant.id,
        "api": holder.api,
        "resource": holder.resource,
        "namespace": holder.namespace,
        "pod": holder.pod,
        "container": holder.container,
        "claim": holder.claim,
        "uid": holder.uid,
        "pod_uids": list(grant.pod_uids),
        "cpus": str(grant.cpus),
        "hugepages": [{"bytes": one.page_bytes, "numa_node": one.node, "pages": one.pages} for one in grant.hugepages],
        "memory": [{"bytes": size, "numa_node": node} for node, size in grant.memory],
        "devices": [*grant.devices, *grant.shares],
    }


def _print_entries(entries: Sequence[AuditEntry]) -> None:
    print_table(COLUMNS, map(_row, entries))


def _row(entry: AuditEntry) -> tuple[str, ...]:
    times = f" ({entry.times} times)" if entry.times > 1 else ""
    return local(entry.at), f"{entry.action}{times}", entry.holder, entry.what, entry.why, entry.grant


def _print(
    found: Sequence[Any], form: str, document: Callable[[Any], dict[str, Any]], table: Callable[[Sequence[Any]], None]
) -> None:
    if form == "table":
        table(found)
    elif form == "json":
        print_document([document(one) for one in found], form)
    else:
        for one in found:
            print(json.dumps(document(one)))


# ---------------------------------------------------------------- who held it


def _show_held(facts: Facts, wanted: Wanted, at: float, form: str) -> int:
    if at > facts.now_s:
        raise InputError(f"cannot say who holds what at {local(at)}: it is {local(facts.now_s)}")
    from nodeagent.state.store import read_only

    held = read_only(facts.state_dir)  # before the decisions: one that is released meanwhile is among them
    entries = _entries(facts)
    decisions = map(_decided, sorted((one for one in entries if one.held), key=lambda one: one.number))
    every = tenures(decisions, held, facts.now_s)
    about = [one for one in every if wanted.holds(one.grant)]
    found = [one for one in about if one.covers(at)]
    certain = [one for one in found if one.until is None or one.doubted is None]
    if not certain and (why := _doubt(about, at) or ("" if found else _unknown(entries, every, at))):
        raise StateError(f"cannot say who held {wanted or 'what'} at {local(at)}: {why}")
    _print(found, form, tenure_document, lambda some: _print_held(some, about, wanted, at))
    return 0


def _doubt(about: Iterable[Tenure], at: float) -> str:
    """Return why the clock leaves open who held something at a moment, or "" if it does not."""
    maybe = next((one for one in about if one.may_cover(at)), None)
    if maybe is None:
        return ""
    whose = f"grant {maybe.grant.id} of {maybe.grant.holder} may have held it"
    return f"{whose}: the clock was not right when its beginning was recorded ({local(maybe.since)})"


def _unknown(entries: Sequence[AuditEntry], every: Iterable[Tenure], at: float) -> str:
    """Return why it is not known that something was free at a moment, or "" if it is known."""
    begins = min((one.first_at for one in entries), default=None)
    if begins is None:
        return "the history is empty"
    if at < begins:
        return f"the history begins at {local(begins)}"
    more = [one for one in every if one.at_least and one.covers(at)]
    return (
        f"grant {more[0].grant.id} of {more[0].grant.holder} may have held it; its beginning is deleted" if more else ""
    )


def _decided(entry: AuditEntry) -> Decided:
    from nodeagent.core.ledger.ledger import Action

    assert entry.held is not None
    return Decided(at=entry.at, action=Action(entry.action), grant=entry.held, why=entry.why)


def tenure_document(tenure: Tenure) -> dict[str, Any]:
    """Return a period in its documented form; "until" is null while it lasts."""
    return {
        "since": rfc3339(tenure.since),
        "until": None if tenure.until is None else rfc3339(tenure.until),
        "ended_by": tenure.ended_by,
        "holder": str(tenure.grant.holder),
        "what": describe(tenure.grant),
        **grant_fields(tenure.grant),
    }


def _print_held(found: Sequence[Tenure], about: Sequence[Tenure], wanted: Wanted, at: float) -> None:
    """Answer in a sentence for each holder, or in a table if everything is asked for."""
    if not wanted:
        print_table(HELD_COLUMNS, map(_held_row, found))
        return
    for one in found:
        print(f"{_asked(wanted, one.grant)} at {local(at)}: {_sentence(one)}")
    if not found:
        print(f"{wanted} at {local(at)}: no grant held it{_around(about, at)}")


def _asked(wanted: Wanted, grant: Grant) -> str:
    """Return what was asked for, of several CPUs those of the grant."""
    if not wanted.cpus:
        return str(wanted)
    shared = wanted.cpus & grant.cpus
    return f"{'CPU' if len(shared) == 1 else 'CPUs'} {shared}"


def _sentence(one: Tenure) -> str:
    until = "and holds it" if one.until is None else f"until {local(one.until)} ({one.ended_by})"
    by_clock = " (by a clock that was not right)" if one.doubted else ""
    since = f"since {local(one.since)}{by_clock}"
    return f"{one.grant.holder} held {describe(one.grant)} {since} {until}; grant {one.grant.id}"


def _around(about: Sequence[Tenure], at: float) -> str:
    """Return who held it last before a moment, and first after it."""
    ended = [(one.until, one) for one in about if one.until is not None and one.until <= at]
    begun = [one for one in about if one.since > at]
    before = max(ended, key=lambda one: one[0], default=None)
    said = f"; before: {before[1].grant.holder} until {local(before[0])}" if before else ""
    return said + (f"; after: {begun[0].grant.holder} since {local(begun[0].since)}" if begun else "")


def _held_row(one: Tenure) -> tuple[str, ...]:
    until = "" if one.until is None else local(one.until)
    return str(one.grant.holder), describe(one.grant), local(one.since), until, one.grant.id
