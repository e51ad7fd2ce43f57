"""The state on which an agent decides, from its pages: the machine, the ledger and the health of devices."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec.structs import replace

from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.held import ledger_of
from nodeagent.core.advice.hypothetical import untouched
from nodeagent.core.advice.tenants import Tenant, tenants_of
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.health import DeviceState, Health, HealthState, Observed, Remedy
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Request
from nodeagent.core.placement.index import may_have


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """One node at one moment."""

    inventory: Inventory
    """With pages that holders use counted as granted only: the ledger without a grant then shows what comes back."""
    ledger: Ledger
    health: Health
    status: Mapping[str, Any]
    """The page /v1/status."""

    def tenants(self) -> tuple[Tenant, ...]:
        """Return who holds what, by the pods that end together."""
        return tenants_of(self.ledger, self.pod_names())

    def pod_names(self) -> dict[str, str]:
        """Return NAMESPACE/NAME by UID of the pods that the container runtime has reported."""
        pinned = self.status["pinning"].get("pinned", ())
        return {one["pod_uid"]: f"{one['namespace']}/{one['pod']}" for one in pinned if one["pod_uid"] and one["pod"]}

    def ill(self) -> dict[str, str]:
        """Return why devices cannot be granted for their health, by device."""
        found = ((one, illness(one, self.health)) for one in self.inventory.devices)
        return {one.id: f"{state.state}: {state.reason}" for one, state in found if state is not None}

    def for_the_healthy(self, request: Request) -> Request:
        """Return the request limited to devices that are not ill and that it may be given at all."""
        if not request.devices:
            return request
        mine = (one for one in self.inventory.devices if one.kind in request.devices and may_have(request, one))
        return replace(request, within_devices=frozenset(one.id for one in mine).difference(self.ill()))


def state_of(facts: Facts) -> NodeState:
    """Return the state of the node that the facts are about. Raise PeerError if a page cannot be had."""
    status = facts.page("/v1/status")
    ledger = ledger_of(facts.grants(), CpuSet.parse(status["inventory"]["cpus_reserved"], source="/v1/status"))
    inventory = facts.inventory()
    return NodeState(
        inventory=untouched(inventory, ledger), ledger=ledger, health=_health(facts.page("/v1/health")), status=status
    )


def _health(page: Any) -> Health:
    """Return the health of devices as the page shows it."""
    return MappingProxyType(
        {
            one["device"]: HealthState(
                state=DeviceState(one["state"]),
                since=0.0,
                reason=one["reason"],
                seen={
                    cause["source"]: Observed(
                        DeviceState(cause["state"]),
                        cause["reason"],
                        cause["latched"],
                        Remedy(cause.get("remedy", "")),  # captures of older builds lack it
                    )
                    for cause in one["causes"]
                },
            )
            for one in page
        }
    )
