"""How many more claims fit: each is allocated as the scheduler does it, and then prepared as the agent does it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from nodeagent.core.advice.allocation import Chosen, Published, allocate, results
from nodeagent.core.advice.claim_spec import ClaimSpec
from nodeagent.core.advice.pod_forecast import MOST_COPIES, Forecast, Tick, no_tick
from nodeagent.core.deviceplugin.allocate import Stamp
from nodeagent.core.dra.pool import Features, Pool
from nodeagent.core.dra.prepare import Catalog, prepare
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.claim import Claim, ClaimRef, Opaque
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError, Refused


class ClaimNode(msgspec.Struct, frozen=True, kw_only=True):
    """What copies of a claim are allocated from."""

    inventory: Inventory
    """With pages that holders use counted as granted only (hypothetical.untouched)."""
    health: Health
    catalog: Catalog
    features: Features
    """The fields of ResourceSlices that the API server keeps."""
    now_s: float
    """Seconds since the epoch."""

    def published(self, ledger: Ledger) -> tuple[Pool, ...]:
        """Return the pools as the agent publishes them."""
        every = self.catalog.kinds.values()
        return tuple(one.pool(self.inventory, ledger, self.health, self.features) for one in every)


def forecast_claims(
    node: ClaimNode, ledger: Ledger, spec: ClaimSpec, most: int = MOST_COPIES, tick: Tick = no_tick
) -> Forecast:
    """Return how many more claims like this fit, at most `most`. Raise InputError if a selector fails for a device, or
    the claim takes nothing of its devices."""
    if all(ask.admin for alternatives in spec.requests for ask in alternatives):
        raise InputError("cannot forecast a claim of adminAccess alone: it takes nothing, so any number fits")
    for count in range(most):
        tick(count)
        published = Published(node.catalog.driver, node.published(ledger), tuple(_taken(node.catalog, ledger)))
        try:
            chosen = allocate(published, spec)
        except Refused as refusal:
            return Forecast(count=count, why=str(refusal), ledger=ledger)
        uid = f"forecast-{len(ledger.grants)}"
        claim = Claim(
            ref=ClaimRef(namespace="forecast", name=uid, uid=uid),
            allocated=True,
            results=tuple(results(published, node.catalog.pool_name, chosen, uid)),
            configs=(*_of_classes(chosen), *spec.configs),
            reserved_for=(f"pod-of-{uid}",),
        )
        done = prepare(node.inventory, ledger, node.catalog, [claim], Stamp(new_id=lambda: "", at=node.now_s))
        if why := done.errors.get(uid):
            return Forecast(count=count, why=f"it would be allocated, and refused by the agent: {why}", ledger=ledger)
        ledger = done.ledger
    return Forecast(count=most, why="", ledger=ledger)


def _of_classes(chosen: list[Chosen]) -> Iterator[Opaque]:
    """Yield the configurations of the classes, each for its requests."""
    for ask in {one.ask.name: one.ask for one in chosen}.values():
        yield from ask.configs


def _taken(catalog: Catalog, ledger: Ledger) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Yield what the scheduler has allocated to claims, as far as they have been prepared."""
    for grant in ledger.grants.values():
        result = grant.result
        if grant.holder.api == CLAIM and result is not None and not result.admin:
            yield result.pool.rpartition("/")[2], result.device, dict(result.consumed)
