"""What other device plugins gave to pods, as the agent last learnt it. Not durable: kubelet's checkpoint and its list
have it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping

import structlog

from nodeagent.core.deviceplugin.view import ResourceKind
from nodeagent.core.ledger.foreign import Foreign, observed, with_checkpoint
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.release import Patience
from nodeagent.core.ledger.witness import Given, Witnesses
from nodeagent.core.model.grant import Grant, Holding
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError

log = structlog.get_logger()


class OtherPlugins:
    """Remembers what other device plugins gave to pods, and logs what changes."""

    def __init__(self) -> None:
        self._known = Foreign()

    def observe(
        self,
        inventory: Inventory,
        ledger: Ledger,
        resources: Mapping[str, ResourceKind],
        holdings: Iterable[Holding],
        witnesses: Witnesses,
        now: float,
        patience: Patience,
    ) -> Mapping[str, Grant]:
        """Return what other plugins gave, by grant id, after kubelet's list. resources: what the agent serves."""
        ours = _ours(inventory, ledger, resources)
        return self._take(observed(self._known, inventory, holdings, ours, witnesses, now, patience, _new_id))

    def begin(
        self, inventory: Inventory, ledger: Ledger, resources: Mapping[str, ResourceKind], given: Given
    ) -> Mapping[str, Grant]:
        """Return what other plugins gave before the agent started, from kubelet's checkpoint."""
        ours = _ours(inventory, ledger, resources)
        return self._take(with_checkpoint(self._known, inventory, given, ours, _new_id))

    def _take(self, after: Foreign) -> Mapping[str, Grant]:
        before, now = self._known.ledger.grants, after.ledger.grants
        for one in (now[id] for id in sorted(now.keys() - before.keys())):
            log.info(
                "held-by-another-plugin", resource=one.holder.resource, devices=one.devices, holder=str(one.holder)
            )
        for one in (before[id] for id in sorted(before.keys() - now.keys())):
            log.info("free-of-another-plugin", resource=one.holder.resource, devices=one.devices)
        self._known = after
        return now


def _ours(inventory: Inventory, ledger: Ledger, resources: Mapping[str, ResourceKind]) -> Callable[[str, str], bool]:
    def ours(name: str, id: str) -> bool:
        if (name, id) in ledger.by_id:
            return True
        try:
            return name in resources and bool(resources[name].parts(inventory, [id]))
        except InputError:
            return False

    return ours


def _say(event: str, grants: Iterable[Grant]) -> None:
    for one in grants:
        log.info(event, resource=one.holder.resource, devices=one.devices, holder=str(one.holder))


def _new_id() -> str:
    return f"o-{secrets.token_hex(5)}"
