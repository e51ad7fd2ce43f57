"""Placement of CPUs alone: translates the options and NUMA policy of a request for the compiled core."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import msgspec

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.request import BEST_EFFORT, SINGLE, Request
from nodeagent.core.placement.index import MachineIndex

if TYPE_CHECKING:
    from nodeagent._fastpath import Choice


class Limits(msgspec.Struct, frozen=True):
    """How far the CPUs of a request may spread; 0 means no limit."""

    packages: int = 0
    nodes: int = 0
    groups: int = 0


NO_LIMITS = Limits()


class CoreRules(TypedDict):
    """Options of a request as parameters of the compiled core."""

    whole_cores: bool
    spread_cores: bool
    spread_nodes: bool
    groups_first: bool


def search_cpus(machine: MachineIndex, free: int, request: Request, limits: Limits) -> Choice | None:
    """Search with the compiled core for the best CPUs, translating each option into its parameters.

    free: mask of free CPUs. Return None if no choice is possible within the limits.
    """
    found = machine.layout.choose(
        free & allowed(machine, request) | request.must_cpus.mask,
        request.cpus,
        must=request.must_cpus.mask,
        **core_rules(request),
        most_packages=limits.packages,
        most_nodes=limits.nodes,
        taste=tastes(machine, request.options),
    )
    if found is not None and limits.groups and found[6] > limits.groups:
        return None
    return found


def core_rules(request: Request) -> CoreRules:
    """Return the options as parameters of the compiled core."""
    chosen = request.options
    return {
        "whole_cores": opt.FULL_PCPUS in chosen,
        "spread_cores": opt.SPREAD_CORES in chosen,
        "spread_nodes": opt.SPREAD_NUMA in chosen,
        "groups_first": opt.REQUIRE_L3 in chosen,
    }


def allowed(machine: MachineIndex, request: Request) -> int:
    """Return a mask of the CPUs that the options and the NUMA policy permit.

    CPUs whose node is unknown comply with no policy but best effort: nothing shows how many nodes they are on.
    """
    chosen = request.options
    cpus = machine.usable if request.numa == BEST_EFFORT else machine.on_nodes
    for name, kind in opt.CORE_KINDS.items() if chosen else ():
        if f"require-{name}-cores" in chosen:
            cpus &= machine.of_kind(kind)
    if "require-isolated-cpus" in chosen:
        cpus &= machine.isolated
    return cpus


def tastes(machine: MachineIndex, chosen: frozenset[str]) -> list[tuple[int, int]]:
    """Return the CPUs that the options would rather avoid, each at a cost of 1."""
    if not chosen:
        return []
    tastes = [
        (machine.usable & ~machine.of_kind(kind), 1)
        for name, kind in opt.CORE_KINDS.items()
        if f"prefer-{name}-cores" in chosen
    ]
    if "prefer-isolated-cpus" in chosen:
        tastes.append((machine.usable & ~machine.isolated, 1))
    if "avoid-isolated-cpus" in chosen:
        tastes.append((machine.isolated, 1))
    return [taste for taste in tastes if taste[0]]


def limits_of(machine: MachineIndex, ledger: Ledger, request: Request) -> Limits:
    """Return how far the CPUs of a request may spread under its NUMA policy and options."""
    if request.numa == BEST_EFFORT and opt.REQUIRE_L3 not in request.options:
        return NO_LIMITS
    empty = _on_empty(machine, ledger, request) if request.cpus else None
    groups = empty[6] if empty and opt.REQUIRE_L3 in request.options else 0
    if request.numa == BEST_EFFORT:
        return Limits(groups=groups, nodes=groups, packages=groups)
    most = 1 if request.numa == SINGLE else 0
    if opt.ALIGN_SOCKET in request.options:
        return Limits(packages=most or (empty[3] if empty else 1), groups=groups)
    return Limits(nodes=most or (empty[4] if empty else 1), groups=groups)


def _on_empty(machine: MachineIndex, ledger: Ledger, request: Request) -> Choice | None:
    """Return what the compiled core would choose if nothing were held."""
    free = machine.usable & ~ledger.reserved.mask | request.must_cpus.mask
    return search_cpus(machine, free, request, NO_LIMITS)
