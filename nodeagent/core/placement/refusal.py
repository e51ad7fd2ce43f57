"""Why a request does not fit, in numbers: the part of it that is short, and the smallest change that would admit it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import msgspec
from msgspec.structs import replace

from nodeagent.core.ledger.exclusion import blocked, most_together
from nodeagent.core.ledger.free import MEMORY, Stock
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model import options as opt
from nodeagent.core.model.cpuset import EMPTY
from nodeagent.core.model.device import HOST_USES, Device
from nodeagent.core.model.quantity import format_size
from nodeagent.core.model.request import BEST_EFFORT, Request
from nodeagent.core.model.topology import DRAM
from nodeagent.core.placement import would_admit
from nodeagent.core.placement.index import MachineIndex, may_have
from nodeagent.core.placement.would_admit import Find, Question, advice
from nodeagent.errors import Refused

CPUS = "CPUs"


def explain(machine: MachineIndex, ledger: Ledger, request: Request, free: int, find: Find) -> Refused:
    """Return the refusal of a request that does not fit.

    free: mask of the CPUs that can be granted. find: where another request would go on another state.
    """
    question = Question(machine=machine, ledger=ledger, request=request, free=free, find=find)
    return _too_few_cpus(question) or _too_few_devices(question) or _too_few_pages(question) or _forbidden(question)


def _too_few_cpus(question: Question) -> Refused | None:
    request, inventory, ledger = question.request, question.machine.inventory, question.ledger
    count = question.free.bit_count()
    if request.cpus <= count:
        return None
    why = f"cannot place {_cpus(request.cpus)}: {count} of {len(inventory.cpus)} are free"
    reserved = len(ledger.reserved & inventory.cpus_online)
    held = len((ledger.cpus_held & inventory.cpus_online) - ledger.reserved)
    details = [f"{held} held"] if held else []
    details += [f"{reserved} reserved"] if reserved else []
    if details:
        why += f" ({', '.join(details)})"
    change = advice(question, _more(request.cpus - count), functools.partial(would_admit.with_cpus, question))
    return Refused(why, want=request.cpus, free=count, unit=CPUS, would_admit=change)


def _too_few_devices(question: Question) -> Refused | None:
    request, inventory = question.request, question.machine.inventory
    for kind, want in sorted(request.devices.items()):
        meant = [device for device in inventory.devices if device.kind == kind and _is_meant(request, device)]
        there = [one.id for one in meant if may_have(request, one)]
        free = [one for one in there if one not in blocked(inventory, question.ledger)]
        together = len(most_together(inventory, free))
        if want > together:
            what = "are free" if together == len(free) else "can be given away together"
            why = f"cannot place {want} devices of kind {kind}: {together} of {len(meant)} {what}"
            why += _left_out(request, meant)
            freed = functools.partial(would_admit.with_devices, question, kind)
            change = advice(question, f"{want - together} more", freed)
            return Refused(why, want=want, free=together, unit="devices", would_admit=change)
    return None


def _is_meant(request: Request, device: Device) -> bool:
    """Return whether a request for devices of its kind could have a device if the host did not use it."""
    return may_have(request, device) or set(device.withheld_for) <= {*HOST_USES}


def _left_out(request: Request, meant: Iterable[Device]) -> str:
    """Return in parentheses how many devices a request cannot have, whatever pods give back; "" if there are none."""
    out = [one for one in meant if not may_have(request, one)]
    used = sum(one.used_by_host for one in out)
    counts = ((used, "in use by the node"), (len(out) - used, "not offered"))
    words = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f" ({words})" if words else ""


def _too_few_pages(question: Question) -> Refused | None:
    request = question.request
    stock = Stock.of(question.machine.inventory, question.ledger, request)
    for size, want in sorted(stock.want.items()):
        free = stock.sum(size)
        if want <= free:
            continue
        freed = functools.partial(would_admit.with_pages, question, size, want - free)
        if size == MEMORY:
            what = _of_kind(request, "memory")
            why = f"cannot place {format_size(want)} of {what}: {format_size(free)} can be granted"
            change = advice(question, f"{format_size(want - free)} more", freed)
            return Refused(why, want=want, free=free, unit="bytes", would_admit=change)
        name = format_size(size)
        why = f"cannot place {want} {_of_kind(request, f'hugepages of {name}')}: {free} can be granted"
        change = advice(question, f"{want - free} more pages of {name}", freed)
        return Refused(why, want=want, free=free, unit="pages", would_admit=change)
    return None


def _of_kind(request: Request, what: str) -> str:
    """Return what is requested with its kind of memory, which ordinary requests do not name."""
    return what if request.memory_kind == DRAM else f"{request.memory_kind} {what}"


# ---------------------------------------------------------------- enough is free, but not as asked


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a request, of which less could be asked for."""

    want: int
    unit: str
    words: Callable[[int], str]
    """Names a number of it."""
    less: Callable[[Request, int], Request]
    """Returns a request with another number of it."""
    step: int = 1

    def without(self, request: Request) -> Request:
        """Return a request without this part."""
        return self.less(request, 0)

    def most(self, request: Request, fits: Callable[[Request], bool]) -> int:
        """Return the largest number below `want` with which a request fits; 0 if there is none."""
        steps = (self.want - 1) // self.step
        low, high = 0, max(0, steps)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(self.less(request, middle * self.step)) else (low, middle - 1)
        return low * self.step


def _forbidden(question: Question) -> Refused:
    """Explain a refusal although enough is free: name a part of which there is too little as it is asked for, how much
    of it would fit, and a change that would admit the request."""
    request = question.request
    rules = [*sorted(request.options)]
    if request.numa != BEST_EFFORT:
        rules.insert(0, f"NUMA policy {request.numa}")
    under = ", ".join(rules) or "these limits"
    change = next((text for text, other in would_admit.relaxed(request) if question.fits(other)), "")
    part, rest = _short(question, [*_parts(question)])
    most = part.most(rest, question.fits)
    why = f"cannot place {part.words(part.want)} under {under}: {_would_fit(part, most)}"
    return Refused(why, want=part.want, free=most, unit=part.unit, would_admit=change)


def _would_fit(part: _Part, most: int) -> str:
    number = _cpus(most) if part.unit == CPUS else f"{most}"
    return f"{number} would fit" if most else "none would fit"


def _short(question: Question, parts: list[_Part]) -> tuple[_Part, Request]:
    """Return a part that is short, and the request of which less of it would fit: the whole request if one part alone
    is in the way, else that part by itself if it alone does not fit, else what is left once others are left out."""
    request = question.request
    for part in parts:
        if question.fits(part.without(request)):
            return part, request
    for part in parts:
        alone = _without(request, [one for one in parts if one is not part])
        if not question.fits(alone):
            return part, alone
    for number, part in enumerate(parts):
        rest = _without(request, parts[:number])
        if question.fits(part.without(rest)):
            return part, rest
    return parts[0], request


def _without(request: Request, parts: Iterable[_Part]) -> Request:
    return functools.reduce(lambda rest, part: part.without(rest), parts, request)


def _parts(question: Question) -> Iterator[_Part]:
    """Yield the parts of the request, in the order in which they are tried."""
    request = question.request
    if request.cpus:
        threads = max((core.bit_count() for core in question.machine.cores.values()), default=1)
        step = threads if opt.FULL_PCPUS in request.options else 1
        yield _Part(want=request.cpus, unit=CPUS, words=_cpus, less=_with_cpus, step=step)
    for kind, want in sorted(request.devices.items()):
        of_kind = functools.partial(_with_devices, kind)
        yield _Part(want=want, unit="devices", words=functools.partial(_devices, kind), less=of_kind)
    for size, want in sorted(request.hugepages.items()):
        of_size = functools.partial(_with_pages, size)
        yield _Part(want=want, unit="pages", words=functools.partial(_pages, size), less=of_size)
    if request.memory_bytes or not (request.cpus or request.devices or request.hugepages):
        yield _Part(want=request.memory_bytes, unit="bytes", words="{} bytes of memory".format, less=_with_memory)


def _with_cpus(request: Request, count: int) -> Request:
    return replace(request, cpus=count) if count else replace(request, cpus=0, must_cpus=EMPTY)


def _with_devices(kind: str, request: Request, count: int) -> Request:
    if count:
        return replace(request, devices={**request.devices, kind: count})
    return replace(request, devices={one: some for one, some in request.devices.items() if one != kind})


def _with_pages(page_bytes: int, request: Request, count: int) -> Request:
    return replace(request, hugepages={**request.hugepages, page_bytes: count})


def _with_memory(request: Request, size_bytes: int) -> Request:
    return replace(request, memory_bytes=size_bytes)


def _cpus(count: int) -> str:
    return "1 CPU" if count == 1 else f"{count} CPUs"


def _devices(kind: str, count: int) -> str:
    return f"{count} devices of kind {kind}"


def _pages(page_bytes: int, count: int) -> str:
    return f"{count} hugepages of {format_size(page_bytes)}"


def _more(count: int) -> str:
    return "1 more free CPU" if count == 1 else f"{count} more free CPUs"
