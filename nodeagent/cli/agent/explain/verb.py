"""`nodeagent explain`: the subject, and the answer as text or as a document."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nodeagent.cli.shared.facts import Facts, add_facts, facts_of
from nodeagent.cli.shared.node_state import NodeState, state_of
from nodeagent.cli.shared.request_options import add_request_options
from nodeagent.cli.shared.tables import print_document
from nodeagent.errors import InputError

EXAMPLES = (
    ("nodeagent explain pod shop/till", "what a pod holds and why, or why it was refused"),
    ("nodeagent explain cpu 7", "who holds a CPU"),
    ("nodeagent explain device 0000:41:00.0", "who holds a device, and what is known against it"),
    ("nodeagent explain --cpus 8 --devices gpu=2", "whether a request would fit now, and who stands in the way"),
)
EXIT_CODES = {3: "refused: the request does not fit"}
REPLAYABLE = True
DONE, REFUSED = 0, 3
Document = dict[str, Any]


class Subject(NamedTuple):
    """Something that can be explained: what to type, how to answer, how to print the answer."""

    word: str
    answer: Callable[[Facts, NodeState, str, str], Document]
    show: Callable[[Mapping[str, Any]], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `nodeagent explain`."""
    parser.add_argument("subject", nargs="?", metavar="SUBJECT", help="pod, claim, cpu or device; none: a request")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="NAMESPACE/NAME of a pod or claim, a CPU, a device's id"
    )
    parser.add_argument("--uid", metavar="UID", default="", help="which of several pods or claims of that name")
    add_facts(parser)
    add_request_options(parser)
    parser.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table", help="how to write it")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    subject = _subject(args) if args.subject is not None else None
    facts = facts_of(args)
    state = state_of(facts)
    if subject is None:
        return _request(args, state)
    document = subject.answer(facts, state, args.name, args.uid)
    if args.output == "table":
        subject.show(document)
    else:
        print_document(document, args.output)
    return DONE


def _subject(args: argparse.Namespace) -> Subject:
    """Return what is to be explained. Raise InputError if it is of no known sort, or has no name."""
    found = _subjects().get(args.subject)
    if found is None:
        raise InputError(f"cannot explain {args.subject!r}: expected {', '.join(_subjects())}, or options of a request")
    if not args.name:
        raise InputError(f"cannot explain a {args.subject} without its name: expected {found.word}")
    return found


def _subjects() -> dict[str, Subject]:
    from nodeagent.cli.agent.explain import cpu, device, pod

    return {
        "pod": Subject(
            "NAMESPACE/NAME",
            lambda facts, state, name, uid: pod.explain_pod(facts, state, pod.named(name, "pod"), uid),
            pod.print_holder,
        ),
        "claim": Subject(
            "NAMESPACE/NAME",
            lambda facts, state, name, uid: pod.explain_claim(facts, state, pod.named(name, "claim"), uid),
            pod.print_holder,
        ),
        "cpu": Subject("its number", lambda facts, state, name, uid: cpu.explain_cpu(state, name), cpu.print_cpu),
        "device": Subject(
            "its id", lambda facts, state, name, uid: device.explain_device(facts, state, name), device.print_device
        ),
    }


def _request(args: argparse.Namespace, state: NodeState) -> int:
    from nodeagent.cli.agent.explain.request import explain_request, print_request, requested

    document = explain_request(state, requested(args, state.inventory))
    if args.output == "table":
        return print_request(document)
    print_document(document, args.output)
    return DONE if document["fits"] else REFUSED
