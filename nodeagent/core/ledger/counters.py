"""Counters that several devices draw on, such as the cores of a card that is divided: together they get what there is.

Pure. A device draws once, in however many shares it is held. One that is not in the inventory draws nothing:
nothing is known of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.device import Device
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by
from nodeagent.errors import Refused

Drawn = Mapping[tuple[str, str], int]
"""By (Draws.of, counter)."""


def drawing(inventory: Inventory) -> tuple[Device, ...]:
    """Return the devices that draw on counters."""
    return kept_by(inventory, "_drawing", lambda: tuple(one for one in inventory.devices if one.draws is not None))


def drawn(inventory: Inventory, grants: Iterable[Grant]) -> Drawn:
    """Return what grants draw together."""
    if not drawing(inventory):
        return {}
    return _drawn(inventory, {one for grant in grants for one in (*grant.devices, *grant.shares)})


def spent(inventory: Inventory, ledger: Ledger) -> frozenset[str]:
    """Return the free devices for which the counters do not last."""
    if not drawing(inventory):
        return frozenset()
    return kept_by(ledger, "_spent", lambda: _spent(inventory, ledger.devices_taken), inventory)


def refuse_overdrawn(inventory: Inventory, ledger: Ledger, grant: Grant) -> None:
    """Raise Refused if the counters do not last for the devices of a grant and all that others hold."""
    if not drawing(inventory):
        return
    mine = {*grant.devices, *grant.shares}
    wanted = _drawn(inventory, mine)
    if not wanted:
        return
    others = [one for one in ledger.grants.values() if one.id != grant.id]
    taken = {one for other in (*others, *ledger.foreign.values()) for one in (*other.devices, *other.shares)}
    before, has = _drawn(inventory, taken - mine), _has(inventory)
    for key, want in wanted.items():
        free = max(0, has[key] - before.get(key, 0))
        if want > free:
            of, name = key
            holders = ", ".join(sorted({str(one.holder) for one in others if _draws(inventory, one, of)}))
            held = f", others are held by {holders}" if holders else ""
            why = f"cannot grant {', '.join(sorted(mine))}: {want} {name} of {of} are needed, {free} are left{held}"
            raise Refused(why, want=want, free=free, unit=name)


def _drawn(inventory: Inventory, ids: Iterable[str]) -> Drawn:
    found = Counter[tuple[str, str]]()
    for id in ids:
        device = inventory.device_by_id.get(id)
        if device is not None and device.draws is not None:
            for name, amount in device.draws.takes.items():
                found[device.draws.of, name] += amount
    return found


def _has(inventory: Inventory) -> Drawn:
    every = (one.draws for one in drawing(inventory) if one.draws is not None)
    return {(one.of, name): amount for one in every for name, amount in one.has.items()}


def _spent(inventory: Inventory, taken: frozenset[str]) -> frozenset[str]:
    before, has = _drawn(inventory, taken), _has(inventory)
    return frozenset(
        one.id
        for one in drawing(inventory)
        if one.draws is not None and one.id not in taken
        if any(
            amount > has[one.draws.of, name] - before.get((one.draws.of, name), 0)
            for name, amount in one.draws.takes.items()
        )
    )


def _draws(inventory: Inventory, grant: Grant, of: str) -> bool:
    found = (inventory.device_by_id.get(one) for one in (*grant.devices, *grant.shares))
    return any(one is not None and one.draws is not None and one.draws.of == of for one in found)
