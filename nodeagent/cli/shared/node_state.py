"""The state on which an agent decides, from its pages: the machine, the ledger and the health of devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec.structs import replace

from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.source import LARGEST_FILE_BYTES
from nodeagent.core.advice.hypothetical import untouched
from nodeagent.core.advice.tenants import Tenant, tenants_of
from nodeagent.core.deviceplugin.devices import illness
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.health import DeviceState, Health, HealthState, Observed, Remedy
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.request import Request
from nodeagent.core.placement.index import may_have
from nodeagent.errors import InputError


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """One node at one moment."""

    inventory: Inventory
    """With pages that holders use counted as granted only: the ledger without a grant then shows what comes back."""
    ledger: Ledger
    health: Health
    status: Mapping[str, Any] = MappingProxyType({})
    """The page /v1/status; empty if there is no agent."""

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
    status, ledger, inventory = facts.page("/v1/status"), facts.ledger(), facts.inventory()
    return NodeState(
        inventory=untouched(inventory, ledger), ledger=ledger, health=health_of(facts.page("/v1/health")), status=status
    )


class _Cause(msgspec.Struct):
    source: str
    state: DeviceState
    reason: str = ""
    latched: bool = False
    remedy: Remedy = Remedy.NONE
    """Captures of older builds lack it."""


class _Known(msgspec.Struct):
    """What is known against a device, as the page shows it."""

    device: str
    state: DeviceState
    reason: str = ""
    causes: list[_Cause] = []


def read_health(path: str) -> Health:
    """Return the health in a file as `nodeagent health -o json` writes it. Raise InputError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return health_of(msgspec.json.decode(file.read(LARGEST_FILE_BYTES + 1)))
    except OSError as error:
        raise InputError(f"cannot read --health {path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError, InputError) as error:
        raise InputError(f"cannot read --health {path}: {' '.join(str(error).split())}") from None


def health_of(page: Any) -> Health:
    """Return the health of devices as the page /v1/health shows it. Raise InputError if it is none."""
    try:
        known = msgspec.convert(page, list[_Known])
    except msgspec.MsgspecError as error:
        raise InputError(f"cannot read the health of devices: {error}") from None
    return MappingProxyType({one.device: _health_state(one) for one in known})


def _health_state(known: _Known) -> HealthState:
    seen = {one.source: Observed(one.state, one.reason, one.latched, one.remedy) for one in known.causes}
    return HealthState(state=known.state, since=0.0, reason=known.reason, seen=MappingProxyType(seen))
