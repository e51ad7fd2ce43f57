"""The pools of NVMe targets, one for each, that nodes share: the scheduler allocates a target once in the cluster.

Pure. A pool says what the configuration says and nothing of the node that publishes it, so that it is the same
whichever agent does. Its name has no slash; the pools of one node are called NODE/KIND. Which nodes share it
stands in the pool and not in its name, so that a target stays the same device when that is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.pool import PATH_TAINT, DevicePart, Features, Pool, Scope, Taint
from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.grant import CLAIM
from nodeagent.core.model.health import NO_HEALTH, UNHEALTHY, Health
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.memo import kept_by

PATH = "path"
"""The source of evidence that says whether a connected target answers."""
LONGEST_VALUE = 63
"""Of a taint, in characters: it has the form of a label's value."""


class SharedPool(DevicePool, frozen=True, kw_only=True):
    """A target for the nodes with some labels. `kind` is the name of the pool, and the id of the target."""

    node_selector: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Empty: all nodes."""

    def pool(self, inventory: Inventory, ledger: Ledger, health: Health, features: Features) -> Pool:
        """Return the pool as it is on every node, whatever this node holds or sees."""
        found = super().pool(self._alone(inventory), Ledger(), NO_HEALTH, features)
        return replace(found, scope=Scope(labels=self.node_selector))

    def part(self, inventory: Inventory, name: str) -> DevicePart | None:
        return super().part(self._alone(inventory), name)

    def _alone(self, inventory: Inventory) -> Inventory:
        """Return the machine as if it had no other device."""
        device = inventory.device_by_id.get(self.kind)
        devices = () if device is None else (device,)
        return kept_by(inventory, f"_alone_{self.kind}", lambda: replace(inventory, devices=devices))


def lost_paths(ledger: Ledger, health: Health, node_name: str, effect: str) -> Mapping[tuple[str, str], Taint]:
    """Return the taints of the devices that claims on this node hold and that it cannot reach, by (pool, device)."""
    found: dict[tuple[str, str], Taint] = {}
    for grant in ledger.grants.values():
        result = grant.result
        if grant.holder.api != CLAIM or result is None or "/" in result.pool:
            continue
        known = [health[id].seen[PATH] for id in grant.devices if id in health and PATH in health[id].seen]
        if any(one.state == UNHEALTHY for one in known):
            found[result.pool, result.device] = Taint(key=PATH_TAINT, value=taint_value(node_name), effect=effect)
    return found


def taint_value(node_name: str) -> str:
    """Return what a taint calls a node: its name, as far as it fits."""
    return node_name[:LONGEST_VALUE].rstrip(".-")
