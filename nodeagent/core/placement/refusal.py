"""Why a request does not fit, in numbers, and the smallest change that would admit it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from msgspec.structs import replace

from nodeagent.core.ledger.exclusion import blocked, most_together
from nodeagent.core.ledger.free import MEMORY, Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import BEST_EFFORT, Request
from nodeagent.core.model.topology import DRAM
from nodeagent.core.placement.index import MachineIndex, may_have
from nodeagent.errors import Refused

Fits = Callable[[Request], bool]
CPUS = "CPUs"


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
    inventory = machine.inventory
    reserved = len(ledger.reserved & inventory.cpus_online)
    held = len((ledger.cpus_held & inventory.cpus_online) - ledger.reserved)
    details = [f"{held} held"] if held else []
    details += [f"{reserved} reserved"] if reserved else []
    if details:
        why += f" ({', '.join(details)})"
    possible = len((inventory.cpus_possible | inventory.cpus_online) - inventory.cpus_outside)
    change = f"{_more(request.cpus - count)} would admit it" if request.cpus <= possible else ""
    return Refused(why, want=request.cpus, free=count, unit=CPUS, would_admit=change)


def _too_few_devices(machine: MachineIndex, ledger: Ledger, request: Request) -> Refused | None:
    for kind, want in sorted(request.devices.items()):
        meant = [device for device in machine.inventory.devices if device.kind == kind and _is_meant(request, device)]
        there = [one.id for one in meant if may_have(request, one)]
        free = [one for one in there if one not in blocked(machine.inventory, ledger)]
        together = len(most_together(machine.inventory, free))
        if want > together:
            what = "are free" if together == len(free) else "can be given away together"
            why = f"cannot place {want} devices of kind {kind}: {together} of {len(meant)} {what}"
            why += _left_out(request, meant)
            change = (
                f"{want - together} more would admit it" if want <= len(most_together(machine.inventory, there)) else ""
            )
            return Refused(why, want=want, free=together, unit="devices", would_admit=change)
    return None


def _is_meant(request: Request, device: Device) -> bool:
    """Return whether a request for devices of its kind could have a device if the host did not use it."""
    return may_have(request, device) or set(device.withheld_for) <= {*HOST_USES}


def _left_out(request: Request, meant: Iterable[Device]) -> str:
    """Return in parentheses how many devices a request cannot have, whoever gives some back; "" if there are none."""
    out = [one for one in meant if not may_have(request, one)]
    used = sum(one.used_by_host for one in out)
    counts = ((used, "in use by the node"), (len(out) - used, "not offered"))
    words = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f" ({words})" if words else ""


def _too_few_pages(machine: MachineIndex, ledger: Ledger, request: Request) -> Refused | None:
    stock = Stock.of(machine.inventory, ledger, request)
    for size, want in sorted(stock.want.items()):
        free = stock.sum(size)
        if want <= free:
            continue
        if size == MEMORY:
            what = _of_kind(request, "memory")
            why = f"cannot place {format_size(want)} of {what}: {format_size(free)} can be granted"
            change = f"{format_size(want - free)} more would admit it" if _has_memory(machine, request, want) else ""
            return Refused(why, want=want, free=free, unit="bytes", would_admit=change)
        name = format_size(size)
        why = f"cannot place {want} {_of_kind(request, f'hugepages of {name}')}: {free} can be granted"
        change = (
            f"{want - free} more pages of {name} would admit it" if _has_memory(machine, request, want * size) else ""
        )
        return Refused(why, want=want, free=free, unit="pages", would_admit=change)
    return None


def _has_memory(machine: MachineIndex, request: Request, size_bytes: int) -> bool:
    """Return whether the machine has so much memory of the requested kind at all, as far as its size is known."""
    sizes = [node.memory_bytes for node in machine.inventory.numa_nodes if node.serves(request.memory_kind)]
    return bool(sizes) and (not all(sizes) or size_bytes <= sum(sizes))


def _of_kind(request: Request, what: str) -> str:
    """Return what is requested with its kind of memory, which ordinary requests do not name."""
    return what if request.memory_kind == DRAM else f"{request.memory_kind} {what}"


def _forbidden(machine: MachineIndex, request: Request, fits: Fits) -> Refused:
    """Explain a refusal although enough is free: find a change that would admit it, and how many CPUs would fit."""
    rules = [*sorted(request.options)]
    if request.numa != BEST_EFFORT:
        rules.insert(0, f"NUMA policy {request.numa}")
    change = next((text for text, other in _relaxed(request) if fits(other)), "")
    under = ", ".join(rules) or "these limits"
    if request.cpus:
        threads = max((core.bit_count() for core in machine.cores.values()), default=1)
        most = _most_cpus(request, threads if opt.FULL_PCPUS in request.options else 1, fits)
        would = f"{_cpus(most)} would fit" if most else "none would fit"
        why = f"cannot place {_cpus(request.cpus)} under {under}: {would}"
        return Refused(why, want=request.cpus, free=most, unit=CPUS, would_admit=change)
    what, want, most, unit = _most_of_rest(request, fits)
    why = f"cannot place {want} {what} under {under}: {most or 'none'} would fit"
    return Refused(why, want=want, free=most, unit=unit, would_admit=change)


def _most_of_rest(request: Request, fits: Fits) -> tuple[str, int, int, str]:
    """Return the first part of a request without CPUs of which less would fit: (name, want, most, unit)."""
    for kind, want in sorted(request.devices.items()):
        most = _largest(want, functools.partial(_with_devices, request, kind), fits)
        if most < want:
            return f"devices of kind {kind}", want, most, "devices"
    for size, want in sorted(request.hugepages.items()):
        most = _largest(want, functools.partial(_with_pages, request, size), fits)
        if most < want:
            return f"hugepages of {format_size(size)}", want, most, "pages"
    most = _largest(request.memory_bytes, lambda size: replace(request, memory_bytes=size), fits)
    return "bytes of memory", request.memory_bytes, most, "bytes"


def _with_devices(request: Request, kind: str, count: int) -> Request:
    return replace(request, devices={**request.devices, kind: count})


def _with_pages(request: Request, page_bytes: int, count: int) -> Request:
    return replace(request, hugepages={**request.hugepages, page_bytes: count})


def _largest(want: int, asked: Callable[[int], Request], fits: Fits) -> int:
    """Return the largest number below `want` with which a request fits; 0 if there is none."""
    low, high = 0, max(0, want - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(asked(middle)) else (low, middle - 1)
    return low


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
    steps = (request.cpus - 1) // step + 1
    return _largest(steps, lambda count: replace(request, cpus=count * step), fits) * step


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"


def _more(count: int) -> str:
    return "1 more free CPU" if count == 1 else f"{count} more free CPUs"
