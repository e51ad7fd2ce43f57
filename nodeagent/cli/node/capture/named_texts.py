"""Names of pods, namespaces, containers, claims and nodes in what is written for people: the agent's log, reasons,
errors, command lines.

The forms are those in which the agent writes names: NAMESPACE/POD/CONTAINER, "claim NAMESPACE/NAME", "nodes NAME". A
name that stands alone is found by its key or by the words before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_NAME = r"[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?"
_CLAIM = re.compile(rf"\b(?:claim|resourceclaims) ({_NAME})/({_NAME})(?: of ({_NAME}(?:, {_NAME})*))?")
_POD = re.compile(rf"\bpods? ({_NAME})/({_NAME})(?:/({_NAME}))?")
_CONTAINER = re.compile(rf"\b(?:container|of|drift of) ({_NAME})/({_NAME})/({_NAME})")
_DRIFT = re.compile(rf"({_NAME})/({_NAME})/({_NAME}): ")
_NODE = re.compile(
    rf"\b(?:get|patch|apply|find|watch) (?:nodes|noderesourcetopologies) ({_NAME})"
    r"|--(?:hostname-override|node-name)[= \0]([^\s\0]+)|\bnode ([a-z0-9.-]+) does not exist"
)
_PROVIDER = re.compile(r"--provider-id[= \0]([^\s\0]+)")
_CONSOLE = re.compile(r"\b(whose|holder|pod|claim|container|namespace|node|name)=(\S+)")
"""A field of the log as it is written for a terminal."""
_KINDS = {"pod": "pod", "claim": "claim", "container": "container", "namespace": "namespace", "node": "node"}
"""What a field of the log names if it is one word."""
_SLASHED = ("whose", "holder", "holders", "name", *_KINDS)
"""Fields of the log whose values may be several names with slashes between them."""


class Named(NamedTuple):
    """Names that stand together, "" for those that are not there."""

    namespace: str = ""
    pod: str = ""
    container: str = ""
    claim: str = ""
    node: str = ""
    provider: str = ""


def is_cgroup(namespace: str) -> bool:
    """Return whether what looks like a namespace begins the path of a cgroup, as in kubepods/burstable/pod…"""
    return namespace.startswith("kubepods")


def in_text(text: str) -> Iterator[Named]:
    """Yield the names in a sentence or a command line."""
    for namespace, claim, pods in _CLAIM.findall(text):
        yield Named(namespace=namespace, claim=claim)
        yield from (Named(namespace=namespace, pod=pod) for pod in pods.split(", ") if pod)
    for pattern in (_POD, _CONTAINER, _DRIFT):
        for namespace, pod, container in pattern.findall(text):
            yield Named(namespace=namespace, pod=pod, container=container)
    for found in _NODE.findall(text):
        yield Named(node=next(filter(None, found)))
    yield from (Named(provider=one) for one in _PROVIDER.findall(text))


def in_log(text: str) -> Iterator[Named]:
    """Yield the names in lines of the agent's log, as JSON or as they are written for a terminal."""
    for line in text.splitlines():
        yield from in_text(line)
        fields = _fields(line)
        for key, value in fields.items() if fields else _CONSOLE.findall(line):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield from _in_field(str(key), one)


def _fields(line: str) -> dict[str, Any]:
    """Return the JSON at the end of a line, or nothing if there is none."""
    try:
        found = json.loads(line[line.index("{") :])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_field(key: str, value: str) -> Iterator[Named]:
    yield from in_text(value)
    parts = value.removeprefix("claim ").removeprefix("pod ").split("/")
    if key not in _SLASHED or not all(re.fullmatch(_NAME, one) for one in parts):
        return
    if len(parts) == 3:
        yield Named(namespace=parts[0], pod=parts[1], container=parts[2])
    elif len(parts) == 2:
        is_claim = key == "claim" or value.startswith("claim ")
        yield Named(namespace=parts[0], claim=parts[1]) if is_claim else Named(namespace=parts[0], pod=parts[1])
    elif key in _KINDS:
        yield Named(**{_KINDS[key]: parts[0]})
