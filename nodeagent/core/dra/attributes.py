"""Attributes of single devices of a pool, as published, whatever is held of them or how healthy they are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from nodeagent.core.dra.cpu_pool import PoolKind
from nodeagent.core.dra.pool import Features, Value
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by

_FORMS = (Features(lists=False), Features(consumable=False, counters=False, lists=False))
"""Under which all names are published: devices that are shared, and in their place those that are had whole."""
NO_ATTRIBUTES: Mapping[str, Value] = MappingProxyType({})


def attributes_of(kind: PoolKind, inventory: Inventory, device: str) -> Mapping[str, Value]:
    """Return the attributes of a pool's device by qualified name; none if the pool does not have it now."""
    every = kept_by(inventory, f"_attributes_{kind.kind}", lambda: _by_device(kind, inventory), kind)
    return every.get(device, NO_ATTRIBUTES)


def _by_device(kind: PoolKind, inventory: Inventory) -> dict[str, Mapping[str, Value]]:
    pools = [kind.pool(inventory, Ledger(), {}, form) for form in _FORMS]
    return {one.name: one.attributes for pool in pools for one in pool.devices}
