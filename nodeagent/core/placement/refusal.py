"""Why a request does not fit, in numbers, and the smallest change that would admit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from nodeagent.core.ledger.exclusion import blocked, most_together
from nodeagent.core.ledger.free import MEMORY, Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import BEST_EFFORT, Request
from nodeagent.core.model.topology import DRAM
from nodeagent.core.placement.index import MachineIndex
from nodeagent.errors import Refused

Fits = Callable[[Request], bool]


def explain(machine: MachineIndex, ledger: Ledger, request: Request, free: int, fits: Fits) -> Refused:
    """Return the refusal of a request that does not fit.

    free: mask of the CPUs that can be granted. fits: whether another request would fit.
    """
    return (
        _too_few_cpus(machine, ledger, request, free)
        or _too_few_devices(machine, ledger, request)
        or _too_few_pages(machine, ledger, request)
        or _forbidden(machine, request, fits)
    )


def _too_few_cpus(machine: MachineIndex, ledger: Ledger, request: Request, free: int) -> Refused | None:
    count = free.bit_count()
    if request.cpus <= count:
        return None
    why = f"cannot place {_cpus(request.cpus)}: {count} of {len(machine.inventory.cpus)} are free"
    held, reserved = len(ledger.cpus_held), len(ledger.reserved)
    details = [f"{held} held"] if held else []
    details += [f"{reserved} reserved"] if reserved else []
    if details:
        why += f" ({', '.join(details)})"
    return Refused(why, want=request.cpus, free=count, would_admit=f"{_more(request.cpus - count)} would admit it")


def _too_few_devices(machine: MachineIndex, ledger: Ledger, request: Request) -> Refused | None:
    for kind, want in sorted(request.devices.items()):
        there = [device.id for device in machine.inventory.devices if device.kind == kind]
        free = [one for one in there if one not in blocked(machine.inventory, ledger)]
        together = len(most_together(machine.inventory, free))
        if want > together:
            what = "are free" if together == len(free) else "can be given away together"
            why = f"cannot place {want} devices of kind {kind}: {together} of {len(there)} {what}"
            return Refused(why, want=want, free=together, would_admit=f"{want - together} more would admit it")
    return None


def _too_few_pages(machine: MachineIndex, ledger: Ledger, request: Request) -> Refused | None:
    stock = Stock.of(machine.inventory, ledger, request)
    for size, want in sorted(stock.want.items()):
        free = stock.sum(size)
        if want <= free:
            continue
        if size == MEMORY:
            why = (
                f"cannot place {format_size(want)} of {_of_kind(request, 'memory')}: {format_size(free)} can be granted"
            )
            return Refused(why, want=want, free=free, would_admit=f"{format_size(want - free)} more would admit it")
        name = format_size(size)
        what = _of_kind(request, f"hugepages of {name}")
        why = f"cannot place {want} {what}: {free} can be granted"
        return Refused(why, want=want, free=free, would_admit=f"{want - free} more pages of {name} would admit it")
    return None


def _of_kind(request: Request, what: str) -> str:
    """Return what is requested with its kind of memory, which ordinary requests do not name."""
    return what if request.memory_kind == DRAM else f"{request.memory_kind} {what}"


def _forbidden(machine: MachineIndex, request: Request, fits: Fits) -> Refused:
    """Explain a refusal although enough is free: find a change that would admit it, and how many CPUs would fit."""
    rules = [*sorted(request.options)]
    if request.numa != BEST_EFFORT:
        rules.insert(0, f"NUMA policy {request.numa}")
    threads = max((core.bit_count() for core in machine.cores.values()), default=1)
    most = _most_cpus(request, threads if opt.FULL_PCPUS in request.options else 1, fits)
    change = next((text for text, other in _relaxed(request) if fits(other)), "")
    what = _cpus(request.cpus) if request.cpus else "the request"
    why = f"cannot place {what} under {', '.join(rules) or 'these limits'}"
    if request.cpus:
        why += f": {_cpus(most)} would fit" if most else ": none would fit"
    return Refused(why, want=request.cpus, free=most, would_admit=change)


def _relaxed(request: Request) -> Iterator[tuple[str, Request]]:
    """Yield the request with fewer rules, the smallest changes first, each with its description."""
    loose = replace(request, numa=BEST_EFFORT)
    if request.numa != BEST_EFFORT:
        yield f"NUMA policy {BEST_EFFORT} would admit it", loose
    for name in sorted(request.options):
        yield f"without option {name} it would fit", replace(request, options=request.options - {name})
    if request.options and request.numa != BEST_EFFORT:
        yield f"NUMA policy {BEST_EFFORT} without options would admit it", replace(loose, options=frozenset())
    if request.cpus > 1 and opt.FULL_PCPUS in request.options:
        yield f"{_cpus(request.cpus + 1)} would fit", replace(request, cpus=request.cpus + 1)


def _most_cpus(request: Request, step: int, fits: Fits) -> int:
    """Return the largest number of CPUs below the request, in steps, that fits as requested; 0 if none does."""
    low, high = 0, (request.cpus - 1) // step
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(request, cpus=middle * step)):
            low = middle
        else:
            high = middle - 1
    return low * step


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"


def _more(count: int) -> str:
    return "1 more free CPU" if count == 1 else f"{count} more free CPUs"
