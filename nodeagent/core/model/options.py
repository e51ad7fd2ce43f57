"""The options of a request: their names, their meaning, and which of them are mutually exclusive.

Options that kubelet's CPU manager also has mean the same as there (KEP-2902 full-pcpus-only, KEP-2902
distribute-cpus-across-numa, KEP-4176 distribute-cpus-across-cores, KEP-3327 align-by-socket, KEP-4800
prefer-align-cpus-by-uncorecache, KEP-4540 strict-cpu-reservation).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from nodeagent.core.model.request import BEST_EFFORT, RESTRICTED, SINGLE
from nodeagent.core.model.topology import EFFICIENCY, PERFORMANCE
from nodeagent.errors import InputError

FULL_PCPUS = "full-pcpus-only"
SPREAD_NUMA = "distribute-cpus-across-numa"
SPREAD_CORES = "distribute-cpus-across-cores"
ALIGN_SOCKET = "align-by-socket"
PREFER_L3 = "prefer-align-cpus-by-uncorecache"
REQUIRE_L3 = "require-align-cpus-by-uncorecache"
STRICT_RESERVATION = "strict-cpu-reservation"
DISTRIBUTING = (SPREAD_NUMA, SPREAD_CORES)
"""Options that change the order of the cost."""

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        FULL_PCPUS: "whole cores only: every online sibling of every CPU taken",
        SPREAD_NUMA: "where one NUMA node is not enough, shares of the nodes used that differ as little as possible",
        SPREAD_CORES: "as few CPUs of one core as possible",
        ALIGN_SOCKET: "the NUMA policy counts sockets instead of NUMA nodes",
        PREFER_L3: "few L3 groups, behind NUMA nodes: always so, the option changes nothing",
        REQUIRE_L3: "as few L3 groups as an empty machine would need, or a refusal",
        STRICT_RESERVATION: "reserved CPUs are never granted: always so, the option changes nothing",
        "require-performance-cores": "performance cores only",
        "prefer-performance-cores": "as many performance cores as possible",
        "require-efficiency-cores": "efficiency cores only",
        "prefer-efficiency-cores": "as many efficiency cores as possible",
        "require-isolated-cpus": "isolated CPUs only (isolcpus=)",
        "prefer-isolated-cpus": "as many isolated CPUs as possible",
        "avoid-isolated-cpus": "no isolated CPU unless it must be",
    }
)
CORE_KINDS: Mapping[str, str] = MappingProxyType({"performance": PERFORMANCE, "efficiency": EFFICIENCY})
POLICIES = (SINGLE, RESTRICTED, BEST_EFFORT)

_EXCLUDE = (
    (FULL_PCPUS, SPREAD_CORES),
    (SPREAD_NUMA, REQUIRE_L3),
    ("require-performance-cores", "require-efficiency-cores"),
    ("require-performance-cores", "prefer-efficiency-cores"),
    ("require-efficiency-cores", "prefer-performance-cores"),
    ("prefer-performance-cores", "prefer-efficiency-cores"),
    ("require-isolated-cpus", "avoid-isolated-cpus"),
    ("prefer-isolated-cpus", "avoid-isolated-cpus"),
)


def check_options(names: Iterable[str]) -> frozenset[str]:
    """Return the options as a set. Raise InputError naming an unknown option, or two that exclude each other."""
    found = frozenset(names)
    for name in sorted(found - OPTIONS.keys()):
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"expected one of {', '.join(OPTIONS)}"
        raise InputError(f'cannot use option "{name}": unknown; {hint}')
    for one, other in _EXCLUDE:
        if one in found and other in found:
            raise InputError(f'cannot use option "{one}": it excludes "{other}"')
    return found


def check_policy(name: str) -> str:
    """Return the NUMA policy. Raise InputError if it is unknown."""
    if name not in POLICIES:
        raise InputError(f'cannot use NUMA policy "{name}": expected one of {", ".join(POLICIES)}')
    return name
