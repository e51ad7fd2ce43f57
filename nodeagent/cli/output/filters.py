"""The options that narrow a list: by holder, by what is held, by NUMA node. Values are shell patterns."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from nodeagent.core.model.cpuset import CpuSet

HOLDER = ("pod", "namespace", "claim")


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the options that narrow a list of grants, or of what can be granted."""
    parser.add_argument("--pod", metavar="POD", help="what a pod holds through the device plugin: NAME or NS/NAME")
    parser.add_argument("-n", "--namespace", metavar="NAMESPACE", help="what a namespace holds")
    parser.add_argument("--claim", metavar="CLAIM", help="what a ResourceClaim holds: NAME or NS/NAME")
    parser.add_argument(
        "--device", metavar="DEVICE", help="id of a device, of a part or share of it, or of a CPU: cpu7"
    )
    parser.add_argument("--numa", metavar="LIST", type=_nodes, help="on NUMA nodes, such as 0-1")
    parser.add_argument("--resource", metavar="RESOURCE", help="of a resource, such as nodeagent.dev/gpu or gpu")


def _nodes(text: str) -> CpuSet:
    return CpuSet.parse(text)


def by_holder(args: argparse.Namespace) -> bool:
    """Return whether the list is narrowed to certain holders."""
    return any(getattr(args, name) is not None for name in HOLDER)


def held_by(args: argparse.Namespace, grant: Mapping[str, Any]) -> bool:
    """Return whether a grant, as /v1/grants has it, is of the holder that was asked for."""
    space = grant["namespace"]
    return (
        _fits(args.namespace, (space,))
        and _fits(args.pod, (grant["pod"], f"{space}/{grant['pod']}") if grant["pod"] else ())
        and _fits(args.claim, (grant["claim"], f"{space}/{grant['claim']}") if grant["claim"] else ())
    )


def of_resource(args: argparse.Namespace, name: str) -> bool:
    """Return whether a resource is the one that was asked for, with or without its domain."""
    return _fits(args.resource, (name, name.rpartition("/")[2]))


def of_device(args: argparse.Namespace, names: Callable[[], Iterable[str]]) -> bool:
    """Return whether one of the names of devices is the one that was asked for."""
    return args.device is None or _fits(args.device, names())


def on_nodes(args: argparse.Namespace, nodes: Callable[[], Collection[int]]) -> bool:
    """Return whether one of the NUMA nodes is among those that were asked for."""
    return args.numa is None or any(node in args.numa for node in nodes())


def _fits(pattern: str | None, names: Iterable[str]) -> bool:
    return pattern is None or any(fnmatch.fnmatchcase(name, pattern) for name in names)
