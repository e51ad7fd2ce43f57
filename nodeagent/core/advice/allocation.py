"""Devices of the published pools allocated to one claim, as the scheduler does it: request by request, device by device
in the order in which they are published, going back where a later request finds none.

Counted are what devices have (capacity that is shared, counters that parts and wholes have in common), taints and
constraints. Pools are searched in the order of the configuration; the scheduler's order of pools is not fixed. Source:
Kubernetes 1.37, k8s.io/dynamic-resource-allocation/structured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from nodeagent.core.advice.cel import CelError, Quantity
from nodeagent.core.advice.claim_spec import ClaimSpec, Constraint, DeviceAsk, Toleration
from nodeagent.core.dra.pool import Capacity, Pool, PoolDevice, Taint
from nodeagent.core.model.claim import Result
from nodeagent.errors import InputError, Refused

MOST_STEPS = 100_000
"""How many devices are tried for one claim before the search is given up."""


class Chosen(NamedTuple):
    """A device for one request, and what of it is consumed; None if it is not shared."""

    ask: DeviceAsk
    pool: str
    device: PoolDevice
    consumed: Mapping[str, int] | None


class Published(msgspec.Struct, frozen=True):
    """What the driver publishes, and what claims have been allocated of it."""

    driver: str
    pools: tuple[Pool, ...]
    taken: tuple[tuple[str, str, Mapping[str, int]], ...]
    """(kind, device, consumed) of every result that is not of admin access."""


def allocate(published: Published, claim: ClaimSpec) -> list[Chosen]:
    """Return the devices for a claim, in the order of its requests. Raise Refused if there are none; InputError if an
    expression fails for a device, as the scheduler then does."""
    return _Search(published, claim).run()


def variables(driver: str, device: PoolDevice) -> dict[str, Any]:
    """Return a device as selectors see it."""
    found: dict[str, Any] = {"driver": driver, "attributes": {}, "capacity": {}}
    found["allowMultipleAllocations"] = device.shared
    for name, value in device.attributes.items():
        domain, own = _qualified(name, driver)
        found["attributes"].setdefault(domain, {})[own] = value
    for name, capacity in device.capacity.items():
        domain, own = _qualified(name, driver)
        found["capacity"].setdefault(domain, {})[own] = Quantity(capacity.value)
    return found


def _qualified(name: str, driver: str) -> tuple[str, str]:
    domain, slash, own = name.rpartition("/")
    return (domain, own) if slash else (driver, name)


def _named(name: str, driver: str) -> str:
    """Return a name without the driver's own domain, as pools have it."""
    return name.removeprefix(f"{driver}/")


class _Search:
    def __init__(self, published: Published, claim: ClaimSpec) -> None:
        self._driver = published.driver
        self._claim = claim
        self._devices = [(pool.kind, one) for pool in published.pools for one in pool.devices]
        self._counters = {
            (pool.kind, one.name): dict(one.counters) for pool in published.pools for one in pool.counters
        }
        self._whole: set[tuple[str, str]] = set()
        self._used: dict[tuple[str, str], dict[str, int]] = {}
        self._seen: dict[str, list[tuple[str, PoolDevice]]] = {}
        self._steps = 0
        self._deepest = 0
        known = {(kind, one.name): one for kind, one in self._devices}
        for kind, name, consumed in published.taken:
            if (device := known.get((kind, name))) is not None:
                self._take(kind, device, consumed if device.shared else None)
            self._whole |= {(kind, name)} if device is None else set()

    def run(self) -> list[Chosen]:
        found = self._request(0, [])
        if found is None:
            name = self._claim.requests[self._deepest][0].name.partition("/")[0]
            given_up = "; not every combination was tried" if self._steps >= MOST_STEPS else ""
            why = f'cannot allocate request "{name}": {self._why(self._claim.requests[self._deepest])}{given_up}'
            raise Refused(why, want=1, free=0, unit="devices")
        return found

    def _why(self, alternatives: Sequence[DeviceAsk]) -> str:
        counts = [len(self._matching(one)) for one in alternatives]
        if not any(counts):
            return "no published device matches"
        return f"of {max(counts)} devices that match, too few are free, untainted and meet the constraints"

    def _request(self, index: int, chosen: list[Chosen]) -> list[Chosen] | None:
        if index == len(self._claim.requests):
            return chosen
        self._deepest = max(self._deepest, index)
        for ask in self._claim.requests[index]:
            count = ask.count or len(self._matching(ask))
            found = self._slots(index, ask, count, 0, chosen) if count else None
            if found is not None:
                return found
        return None

    def _slots(self, index: int, ask: DeviceAsk, left: int, start: int, chosen: list[Chosen]) -> list[Chosen] | None:
        """Choose the remaining devices of a request, and then the other requests. start: first device to look at, as
        devices of one request are interchangeable."""
        if not left:
            return self._request(index + 1, chosen)
        matching = self._matching(ask)
        for number in range(start, len(matching)):
            self._steps += 1
            if self._steps >= MOST_STEPS:
                return None
            kind, device = matching[number]
            one = self._chosen(ask, kind, device)
            if one is None or not self._meets(one, chosen):
                continue
            undo = self._take(kind, device, one.consumed) if not ask.admin else lambda: None
            again = number if device.shared and not ask.admin else number + 1
            found = self._slots(index, ask, left - 1, again, [*chosen, one])
            if found is not None:
                return found
            undo()
        return None

    def _matching(self, ask: DeviceAsk) -> list[tuple[str, PoolDevice]]:
        if ask.name not in self._seen:
            self._seen[ask.name] = [one for one in self._devices if self._selects(ask, *one)]
        return self._seen[ask.name]

    def _selects(self, ask: DeviceAsk, kind: str, device: PoolDevice) -> bool:
        seen = variables(self._driver, device)
        for selector in ask.selectors:
            try:
                if not selector.matches(seen):
                    return False
            except CelError as error:
                why = f"the scheduler fails it on device {kind}/{device.name}: {selector.text!r}: {error}"
                raise InputError(f'cannot allocate request "{ask.name}": {why}') from None
        return True

    def _chosen(self, ask: DeviceAsk, kind: str, device: PoolDevice) -> Chosen | None:
        """Return a device for a request, or None if it cannot be had."""
        if not all(_tolerated(taint, ask.tolerations) for taint in device.taints):
            return None
        wanted = {_named(name, self._driver): amount for name, amount in ask.capacity.items()}
        if not wanted.keys() <= device.capacity.keys():
            return None
        if not device.shared or ask.admin:
            enough = all(device.capacity[name].value >= amount for name, amount in wanted.items())
            free = ask.admin or ((kind, device.name) not in self._whole and self._has_counters(kind, device))
            return Chosen(ask, kind, device, None) if enough and free else None
        used = self._used.get((kind, device.name), {})
        consumed = {name: _consumption(one, wanted.get(name)) for name, one in device.capacity.items()}
        fits = all(used.get(name, 0) + amount <= device.capacity[name].value for name, amount in consumed.items())
        return Chosen(ask, kind, device, consumed) if fits and self._has_counters(kind, device) else None

    def _has_counters(self, kind: str, device: PoolDevice) -> bool:
        if device.shared and (kind, device.name) in self._used:
            return True  # a shared device takes its counters once
        return all(
            self._counters.get((kind, name), {}).get(counter, 0) >= amount
            for name, counters in device.consumes.items()
            for counter, amount in counters.items()
        )

    def _take(self, kind: str, device: PoolDevice, consumed: Mapping[str, int] | None) -> Callable[[], None]:
        """Take a device, or of a shared one what is consumed. Return what undoes it."""
        key = kind, device.name
        first = key not in self._used and key not in self._whole
        before = dict(self._used.get(key, {}))
        if consumed is None:
            self._whole.add(key)
        else:
            self._used[key] = {name: before.get(name, 0) + amount for name, amount in consumed.items()}
        if first:
            self._count(kind, device, -1)

        def undo() -> None:
            if consumed is None:
                self._whole.discard(key)
            elif first:
                del self._used[key]
            else:
                self._used[key] = before
            if first:
                self._count(kind, device, 1)

        return undo

    def _count(self, kind: str, device: PoolDevice, sign: int) -> None:
        for name, counters in device.consumes.items():
            left = self._counters.get((kind, name), {})
            for counter, amount in counters.items():
                left[counter] = left.get(counter, 0) + sign * amount

    def _meets(self, one: Chosen, chosen: Iterable[Chosen]) -> bool:
        return all(self._meets_constraint(rule, one, chosen) for rule in self._claim.constraints)

    def _meets_constraint(self, rule: Constraint, one: Chosen, chosen: Iterable[Chosen]) -> bool:
        if not _covers(rule, one.ask):
            return True
        mine = self._values(rule, one.device)
        if mine is None:
            return False
        others = [self._values(rule, other.device) for other in chosen if _covers(rule, other.ask)]
        if rule.distinct:
            return all(other is not None and mine.isdisjoint(other) for other in others)
        for other in others:
            mine = mine & (other or frozenset())
        return bool(mine)

    def _values(self, rule: Constraint, device: PoolDevice) -> frozenset[Any] | None:
        """Return the values of a constraint's attribute, each with its type; None if the device lacks it."""
        value = device.attributes.get(_named(rule.attribute, self._driver))
        if value is None:
            return None
        return frozenset((type(one), one) for one in (value if isinstance(value, tuple) else (value,)))


def _consumption(capacity: Capacity, wanted: int | None) -> int:
    """Return what a claim consumes of a shared device: the default, or at least the smallest amount, in whole steps."""
    if wanted is None:
        return capacity.default
    if wanted <= capacity.least:
        return capacity.least
    return capacity.least + -(-(wanted - capacity.least) // capacity.step) * capacity.step


def _covers(rule: Constraint, ask: DeviceAsk) -> bool:
    return not rule.requests or ask.name in rule.requests or ask.name.partition("/")[0] in rule.requests


def _tolerated(taint: Taint, tolerations: Iterable[Toleration]) -> bool:
    return any(
        one.effect in ("", taint.effect)
        and (one.key == taint.key or (one.exists and not one.key))
        and (one.exists or one.value == taint.value)
        for one in tolerations
    )


def results(
    published: Published, pool_name: Callable[[str], str], chosen: Sequence[Chosen], share: str
) -> Iterator[Result]:
    """Yield what the scheduler writes into the claim. pool_name: returns the name of a pool by its kind. share: what
    the ids of shares begin with."""
    for number, one in enumerate(chosen):
        yield Result(
            request=one.ask.name,
            driver=published.driver,
            pool=pool_name(one.pool),
            device=one.device.name,
            share_id=f"{share}-{number}" if one.consumed is not None else "",
            admin=one.ask.admin,
            consumed=one.consumed or {},
        )
