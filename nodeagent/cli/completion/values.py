"""What the running agent knows and a word can be: pods, claims, grants, devices. Silent where no agent answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nodeagent.cli.shared.ask import ask
from nodeagent.errors import ConfigError, PeerError

DEADLINE_S = 0.5
"""For the agent's answer: the user waits at a keyboard."""
Page = Callable[[str], Any]
Candidates = Iterator[tuple[str, str]]


def values(metavar: str, socket: str) -> dict[str, str]:
    """Return what an argument can be, with what each means, by the name that the help gives it."""
    source = SOURCES.get(metavar)
    if source is None:
        return {}
    try:
        return dict(source(lambda page: ask(socket, page, timeout_s=DEADLINE_S)))
    except (PeerError, ConfigError, KeyError, TypeError):
        return {}


def _pods(page: Page) -> Candidates:
    for one in page("/v1/grants"):
        if one["pod"]:
            yield f"{one['namespace']}/{one['pod']}", "pod"


def _namespaces(page: Page) -> Candidates:
    yield from ((one["namespace"], "namespace") for one in page("/v1/grants") if one["namespace"])


def _claims(page: Page) -> Candidates:
    yield from ((f"{one['namespace']}/{one['claim']}", "claim") for one in page("/v1/grants") if one["claim"])


def _grants(page: Page) -> Candidates:
    for one in page("/v1/grants"):
        where = one["claim"] or one["pod"]
        yield one["id"], f"{one['namespace']}/{where}" if where else one["resource"]


def _devices(page: Page) -> Candidates:
    yield from ((one["id"], one["holder"] or one["resource"]) for one in page("/v1/devices"))


def _resources(page: Page) -> Candidates:
    yield from ((one["name"], one["kind"]) for one in page("/v1/status")["resources"])


SOURCES: Mapping[str, Callable[[Page], Candidates]] = {
    "POD": _pods,
    "NS/NAME": _pods,
    "NAMESPACE": _namespaces,
    "CLAIM": _claims,
    "GRANT": _grants,
    "DEVICE": _devices,
    "RESOURCE": _resources,
}
"""By the name of an argument in the help (its metavar)."""
