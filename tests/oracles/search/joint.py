"""Joint placement of the devices, CPUs, hugepages and memory of one request.

First the devices with the best links are chosen (every best set, one for each set of places where they are), then the
CPUs nearest to them, then as few packages and NUMA nodes as possible for CPUs, pages and memory together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from nodeagent.core.ledger.exclusion import blocked, most_together
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.device import Device
from nodeagent.core.model.request import BEST_EFFORT, SINGLE, Pages, Placement, PlacementCost, Request
from nodeagent.core.model.topology import NodeId
from nodeagent.core.placement.cpu_choice import NO_LIMITS, Limits, allowed, limits_of
from nodeagent.core.placement.index import MachineIndex
from nodeagent.core.placement.proximity import Place
from tests.oracles.search.device_choice import Pick, device_of, pick_devices
from tests.oracles.search.machine import Near, cpus_of, nodes_of, search_cpus, spread
from tests.oracles.search.node_sets import Cover, Steps, Unit
from tests.oracles.search.stock import Stock

if TYPE_CHECKING:
    from nodeagent._fastpath import Choice

MOST_UNIVERSES = 128
"""Highest number of sets of NUMA nodes, as allowed by a NUMA policy, that are searched one by one."""
Sets = list[tuple[NodeId, ...]]


@dataclass(frozen=True, slots=True)
class _Found:
    """A placement and its sort key: its cost as the options rank it, and how far its CPUs alone are spread."""

    placement: Placement
    key: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Task:
    """One request on one machine, with everything that is the same wherever it is tried."""

    machine: MachineIndex
    ledger: Ledger
    request: Request
    free: int
    stock: Stock
    fixed: tuple[Place, ...]
    limits: Limits
    steps: Steps


def place_joint(machine: MachineIndex, free: int, ledger: Ledger, request: Request) -> Placement | None:
    """Return the cheapest placement, or None if nothing fits. free: mask of the CPUs that can be granted."""
    needs_l3 = opt.REQUIRE_L3 in request.options
    limits = limits_of(machine, ledger, request) if needs_l3 else NO_LIMITS
    stock = Stock.of(machine.inventory, ledger, request)
    task = _Task(machine, ledger, request, free, stock, _fixed_places(machine, request), limits, Steps())
    found = _place_within(task, None)
    if found is not None and request.numa != BEST_EFFORT:
        found = _under_policy(task, found)
    if found is None:
        return None
    return found.placement._replace(exact=found.placement.exact and not task.steps.cut)


def _fixed_places(machine: MachineIndex, request: Request) -> tuple[Place, ...]:
    """Return the places that the whole request should be close to."""
    places = [machine.proximity.place(device_of(machine, one)) for one in request.near]
    places += [(0, node) for node in request.near_nodes]
    if request.near_cpus:
        places.append(machine.place(request.near_cpus))
    return tuple(places)


# ---------------------------------------------------------------- NUMA policies


def _under_policy(task: _Task, loose: _Found) -> _Found | None:
    """Return the best placement that the policy allows; often the best placement of all complies."""
    units = _units(task)
    most = 1 if task.request.numa == SINGLE else _least_units(task, units)
    if _lies_in(task, loose.placement, units, most):
        return loose
    free = task.free & allowed(task.machine, task.request) | task.request.must_cpus.mask
    taken = blocked(task.machine.inventory, task.ledger)
    cover = Cover(_measured(task, units, free, task.stock, taken), _wanted(task, taken), task.steps)
    best: _Found | None = None
    universes = cover.of_size(most)
    for combination in itertools.islice(universes, MOST_UNIVERSES):
        best = _better(best, _place_within(task, frozenset(n for unit in combination for n in unit.nodes)))
    if next(universes, None) is not None:
        task.steps.cut = True
    return best


def _units(task: _Task) -> list[frozenset[NodeId]]:
    """Return what the policy counts: NUMA nodes, or the nodes of a socket."""
    if opt.ALIGN_SOCKET in task.request.options:
        return task.machine.nodes_of_packages()
    return [frozenset({node}) for node in task.machine.nodes]


def _least_units(task: _Task, units: Sequence[frozenset[NodeId]]) -> int:
    """Return how many units an empty machine needs for the request."""
    stock = Stock.of(task.machine.inventory, Ledger(reserved=task.ledger.reserved), task.request, empty=True)
    cpus = task.machine.usable & ~task.ledger.reserved.mask & allowed(task.machine, task.request)
    nothing: frozenset[str] = frozenset()
    cover = Cover(_measured(task, units, cpus, stock, nothing), _wanted(task, nothing), Steps())
    sizes = range(max(1, cover.least()), len(units) + 1)
    return next((count for count in sizes if _holds(task, cover, count)), len(units))


def _holds(task: _Task, cover: Cover, count: int) -> bool:
    """Return whether some units hold the request on an empty machine, with devices that may exclude each other."""
    sets = cover.of_size(count)
    if not task.machine.inventory.excluded_by:
        return next(sets, None) is not None
    empty = Ledger(reserved=task.ledger.reserved)
    for units in itertools.islice(sets, MOST_UNIVERSES):
        nodes = frozenset(node for unit in units for node in unit.nodes)
        if pick_devices(task.machine, empty, task.request, nodes):
            return True
    return False


def _wanted(task: _Task, taken: frozenset[str]) -> tuple[int, ...]:
    """The request as a vector: CPUs, each page size and memory, devices of each kind. Devices whose node is not known
    are there wherever the rest goes."""
    known = task.machine.inventory.device_by_id
    anywhere = [one for one in known.values() if one.numa_node is None and one.id not in taken]
    devices = (count - _together(task, anywhere, kind) for kind, count in task.request.devices.items())
    return (task.request.cpus, *task.stock.want.values(), *devices)


def _together(task: _Task, devices: Iterable[Device], kind: str) -> int:
    """How many of some devices are of a kind and can be given away together."""
    mine = [one.id for one in devices if one.kind == kind]
    return len(most_together(task.machine.inventory, mine)) if task.machine.inventory.excluded_by else len(mine)


def _measured(
    task: _Task, units: Iterable[frozenset[NodeId]], cpus: int, stock: Stock, taken: frozenset[str]
) -> list[Unit]:
    """Return what each unit gives of every component of the vector."""
    devices = [one for one in task.machine.inventory.devices if one.id not in taken]
    return [
        Unit(
            tuple(sorted(nodes)),
            (
                (cpus & cpus_of(task.machine, nodes)).bit_count(),
                *(stock.sum(size, nodes) for size in stock.want),
                *(
                    _together(task, (one for one in devices if one.numa_node in nodes), kind)
                    for kind in task.request.devices
                ),
            ),
            task.machine.packages_of(nodes),
        )
        for nodes in units
    ]


def _lies_in(task: _Task, placement: Placement, units: Sequence[frozenset[NodeId]], most: int) -> bool:
    """Return whether all parts of a placement are in at most `most` units."""
    used = set(nodes_of(task.machine, placement.cpus.mask))
    used |= {pages.node for pages in placement.hugepages} | {node for node, _ in placement.memory}
    nodes = (task.machine.inventory.device_by_id[one].numa_node for one in placement.devices)
    used |= {node for node in nodes if node is not None}
    touched = [unit for unit in units if unit & used]
    return len(touched) <= most and used <= frozenset().union(*touched)


# ---------------------------------------------------------------- one set of NUMA nodes


def _place_within(task: _Task, nodes: frozenset[NodeId] | None) -> _Found | None:
    """Return the best placement on some nodes (None: on all), over all equally good sets of devices."""
    usable = task.free if nodes is None else task.free & cpus_of(task.machine, nodes) | task.request.must_cpus.mask
    if task.request.cpus > usable.bit_count() or not task.stock.enough(nodes):
        return None
    stock = task.stock.within(nodes)
    picks = pick_devices(task.machine, task.ledger, task.request, nodes)
    best: _Found | None = None
    if not task.request.cpus:
        for pick in picks:
            best = _better(best, _span_pages(task, pick, stock))
        return best
    sets = _Once(_node_sets(task, usable, stock))
    for pick, near, cpus in _nearest(task, usable, picks):
        if best is not None and best.key <= _least_key(task, pick, cpus):
            break
        best = _better(best, _span(task, usable, pick, near, cpus, stock, sets))
    return best


def _better(one: _Found | None, other: _Found | None) -> _Found | None:
    if one is None or other is None:
        return one or other
    return other if other.key < one.key else one


def _nearest(task: _Task, usable: int, picks: Iterable[Pick]) -> list[tuple[Pick, Near, Choice]]:
    """Return the best sets of devices whose CPUs can be nearest, each with its distances and the nearest CPUs."""
    found = []
    for pick in picks:
        near = task.machine.proximity.cpu_weights((*task.fixed, *pick.places))
        cpus = search_cpus(task.machine, usable, task.request, near, task.limits)
        if cpus is not None:
            found.append((leading(cpus), pick, near, cpus))
    least = min((lead for lead, *_ in found), default=None)
    nearest = ((pick, near, cpus) for lead, pick, near, cpus in found if lead == least)
    return sorted(nearest, key=lambda one: _least_key(task, one[0], one[2]))


def _least_key(task: _Task, pick: Pick, cpus: Choice) -> tuple[int, ...]:
    """Return the key of a placement with these devices if pages and memory fit on the nodes of its best CPUs.

    If they do not fit there, the actual key is larger.
    """
    first, last = (pick.links, *cpus[1:6]), (*cpus[6:11], pick.cut, cpus[11])
    return _key(task.request, first, cpus[3:6], last, cpus[13])


def _key(
    request: Request, first: tuple[int, ...], own: tuple[int, ...], last: tuple[int, ...], uneven: int
) -> tuple[int, ...]:
    """Return the parts of a cost as the options rank them.

    first: device_links to numa_distance. own: packages, nodes and distance of the CPUs alone. last: l3 to cpu_ids.
    uneven: by how much the CPUs' shares of NUMA nodes differ.
    """
    if request.options.isdisjoint(opt.DISTRIBUTING):
        return first + own + last
    spread = (*first[3:5], uneven, first[5], *own)
    return (first[0], uneven > 0, *first[1:3], *spread, *ordered(request, *last[:2]), *last[2:])


# ---------------------------------------------------------------- pages and memory


def _span(
    task: _Task, usable: int, pick: Pick, near: Near, cpus: Choice, stock: Stock, node_sets: Iterable[Sets]
) -> _Found:
    """Place pages and memory together with CPUs that are as near as `cpus`, all on as few nodes as possible."""
    if stock.nothing_wanted:
        return _answer(task, cpus, (), pick)
    home = nodes_of(task.machine, cpus[0])
    if stock.enough(home):
        # The nodes of the overall best CPUs have enough of everything else: nothing can be better.
        return _filled(task, cpus, sorted(home), pick, stock)
    for sets in node_sets:
        found = _best_set(task, usable, near, sets, cpus)
        if found is not None:
            return _filled(task, found[0], found[1], pick, stock)
    # Too many sets to examine: keep the CPUs, and take pages from their nodes first, then from any.
    task.steps.cut = True
    return _filled(task, cpus, sorted(stock.nodes), pick, stock)


def _best_set(
    task: _Task, usable: int, near: Near, sets: Sets, nearest: Choice
) -> tuple[Choice, tuple[NodeId, ...]] | None:
    """Return the best of equally small sets of nodes.

    It is the most compact set whose CPUs can be as near, and match the preferences as well, as anywhere; among equals,
    the one with the best CPUs.
    """
    if len(sets[0]) == 1:
        # One search for all single nodes: the compiled core compares them itself.
        union = cpus_of(task.machine, (node for some in sets for node in some))
        here = search_cpus(task.machine, usable & union, task.request, near, replace(task.limits, nodes=1))
        if here is None or leading(here) != leading(nearest):
            return None
        return here, tuple(nodes_of(task.machine, here[0]))
    return _closest(task, usable, near, sets, nearest)


def _closest(
    task: _Task, usable: int, near: Near, sets: Sets, nearest: Choice
) -> tuple[Choice, tuple[NodeId, ...]] | None:
    """Return the same for sets of several nodes, skipping every set that is less compact than one that will do."""
    best: tuple[Choice, tuple[NodeId, ...]] | None = None
    least: tuple[int, ...] = ()
    for distance, nodes in sorted((spread(task.machine, nodes), nodes) for nodes in sets):
        if best is not None and (0, distance) > least[:2]:
            break
        here = search_cpus(task.machine, usable & cpus_of(task.machine, nodes), task.request, near, task.limits)
        if here is None or leading(here) != leading(nearest):
            continue
        rank = (here[13], distance, *here[3:6], *ordered(task.request, *here[6:8]), *here[8:12])
        if best is None or rank < least:
            best, least = (here, nodes), rank
    return best


def _filled(task: _Task, cpus: Choice, nodes: Sequence[NodeId], pick: Pick, stock: Stock) -> _Found:
    """Return the placement with pages and memory taken from some nodes, starting with those of the CPUs."""
    taken = nodes_of(task.machine, cpus[0])
    pages, memory = stock.take(sorted(nodes, key=lambda node: (node not in taken, node)))
    used = {one.node for one in pages} | {node for node, _ in memory}
    return _answer(task, cpus, used, pick, pages, memory)


def _span_pages(task: _Task, pick: Pick, stock: Stock) -> _Found | None:
    """Place pages and memory without CPUs: on the nodes nearest to the devices, then on as few as possible."""
    if stock.nothing_wanted:
        return _answer(task, None, (), pick)
    places = (*task.fixed, *pick.places)
    weights = {node: task.machine.proximity.node_weight(node, places) for node in stock.nodes}
    for bound in sorted(set(weights.values())):
        near = stock.within(frozenset(node for node in stock.nodes if weights[node] <= bound))
        if near.enough(None):
            nodes = _closest_pages(task, near)
            pages, memory = near.take(sorted(nodes, key=lambda node: (weights[node], node)))
            used = {one.node for one in pages} | {node for node, _ in memory}
            return _answer(task, None, used, pick, pages, memory, bound)
    return None


def _closest_pages(task: _Task, stock: Stock) -> Sequence[NodeId]:
    """Return the smallest, most compact set of nodes with enough, or all nodes if there are too many sets."""
    for sets in _node_sets(task, 0, stock):
        return min(sets, key=lambda one: (spread(task.machine, one), one))
    task.steps.cut = True
    return sorted(stock.nodes)


class _Once:
    """An iterable over an iterator that can be repeated; each item is computed once, and only when it is needed."""

    def __init__(self, source: Iterator[Sets]) -> None:
        self._source = source
        self._seen: list[Sets] = []

    def __iter__(self) -> Iterator[Sets]:
        yield from list(self._seen)
        for one in self._source:
            self._seen.append(one)
            yield one


def _node_sets(task: _Task, usable: int, stock: Stock) -> Iterator[Sets]:
    """Yield sets of nodes with enough of everything: all with the fewest packages and nodes, then the next fewest."""
    machine = task.machine
    nodes = sorted(stock.nodes | nodes_of(machine, usable))
    want = (task.request.cpus, *stock.want.values())
    units = []
    for node in nodes:
        there: Mapping[int, int] = stock.there.get(node, {})
        gives = ((usable & cpus_of(machine, (node,))).bit_count(), *(there.get(size, 0) for size in stock.want))
        units.append(Unit((node,), gives, machine.packages_of((node,))))
    needed = nodes_of(machine, task.request.must_cpus.mask)
    for level in Cover(units, want, task.steps).by_size():
        if sets := [some for units in level if needed <= set(some := tuple(unit.nodes[0] for unit in units))]:
            yield sets


# ---------------------------------------------------------------- result

_NOTHING: Choice = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, True, 0)


def _answer(
    task: _Task,
    cpus: Choice | None,
    nodes: Iterable[NodeId],
    pick: Pick,
    pages: Sequence[Pages] = (),
    memory: Sequence[tuple[NodeId, int]] = (),
    pages_near: int = 0,
) -> _Found:
    """Assemble the result; packages, nodes and distance include the nodes of pages and memory."""
    mask, near, taste, packages, spanned, distance, *rest, ids, exact, uneven = cpus or _NOTHING
    own = packages, spanned, distance
    used = nodes_of(task.machine, mask) | frozenset(nodes)
    if len(used) > spanned:
        spanned, distance = len(used), spread(task.machine, used)
        packages = max(packages, task.machine.packages_of(used).bit_count())
    first = (pick.links, near or pages_near, taste, packages, spanned, distance)
    last = (*rest, pick.cut, ids)
    cost = PlacementCost(*first, *last)
    placement = Placement(
        CpuSet.of_mask(mask), tuple(pages), tuple(memory), pick.devices, cost, bool(exact) and pick.exact
    )
    return _Found(placement, _key(task.request, first, own, last, uneven))


def leading(choice: Choice) -> tuple[int, ...]:
    """Return the parts of a choice's cost before packages: whether it is uneven, near, preference."""
    return choice[13] > 0, *choice[1:3]


def ordered(request: Request, l3: int, split_cores: int) -> tuple[int, int]:
    """Return two parts of a cost in the order in which the options rank them."""
    return (split_cores, l3) if opt.SPREAD_CORES in request.options else (l3, split_cores)
