"""CPUs that went offline while claims hold them. They stay held: when they come back they are the same claim's, and
nobody else is given them meanwhile. What is left of the claim, and everybody else's, lives on.
"""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.ledger import Ledger
from nodeagent.core.model import CLAIM, Inventory


def lost_cpus(inventory: Inventory, ledger: Ledger) -> Mapping[tuple[str, str], str]:
    """Which CPUs of whom are offline, by the (pool, device) that they were allocated from; devices that lost nothing
    are left out. Claims are named in the order of their grants' ids."""
    found: dict[tuple[str, str], list[str]] = {}
    for grant in sorted(ledger.grants.values(), key=lambda one: one.id):
        lost = grant.cpus - inventory.cpus_online
        if lost and grant.holder.api == CLAIM and grant.result is not None:
            named = f"{'CPU' if len(lost) == 1 else 'CPUs'} {lost} of {grant.holder}"
            found.setdefault((grant.result.pool, grant.result.device), []).append(named)
    return {device: f"offline: {', '.join(named)}" for device, named in found.items()}
