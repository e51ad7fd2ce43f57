"""CPUs that claims and containers hold and that no pod can run on: they went offline, or the cpuset of all pods was
narrowed. They stay held: when they come back they are the same holder's, and nobody else is given them meanwhile. What
is left of what was granted, and everybody else's, lives on.
"""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory


def lost_cpus(inventory: Inventory, ledger: Ledger) -> Mapping[tuple[str, str], str]:
    """Which CPUs of whom are lost and why, by the (pool, device) that they were allocated from; devices that lost
    nothing are left out. Claims are named in the order of their grants' ids."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for grant in _in_order(ledger):
        if grant.holder.api != CLAIM or grant.result is None:
            continue
        for why, lost in _lost(inventory, grant.cpus):
            reasons = found.setdefault((grant.result.pool, grant.result.device), {})
            reasons.setdefault(why, []).append(_of(lost, grant))
    return {
        device: "; ".join(f"{why}: {', '.join(named)}" for why, named in reasons.items())
        for device, reasons in found.items()
    }


def outside_of(inventory: Inventory) -> str:
    """What is wrong with CPUs that are online and not to be had by pods."""
    pods = inventory.pods_cgroup
    return f"outside the cpuset of {pods.path}, which has {pods.cpus}" if pods is not None else ""


def held_outside(inventory: Inventory, ledger: Ledger) -> str:
    """Who holds CPUs that the cpuset of all pods keeps pods off; "" where nobody does."""
    every = ((grant, grant.cpus & inventory.cpus_outside) for grant in _in_order(ledger))
    named = [_of(cpus, grant) for grant, cpus in every if cpus]
    return f"{', '.join(named)}: {outside_of(inventory)}" if named else ""


def narrowed(inventory: Inventory, ledger: Ledger) -> str:
    """Which CPUs are not offered as pods cannot run on them; "" where there are none but reserved ones."""
    cpus = inventory.cpus_outside - ledger.reserved
    return f"CPUs {cpus} are not offered: {outside_of(inventory)}" if cpus else ""


def _in_order(ledger: Ledger) -> list[Grant]:
    return sorted(ledger.grants.values(), key=lambda one: one.id)


def _lost(inventory: Inventory, cpus: CpuSet) -> list[tuple[str, CpuSet]]:
    """(why, which CPUs), as far as there are any."""
    every = (("offline", cpus - inventory.cpus_online), (outside_of(inventory), cpus & inventory.cpus_outside))
    return [(why, lost) for why, lost in every if lost]


def _of(cpus: CpuSet, grant: Grant) -> str:
    return f"{'CPU' if len(cpus) == 1 else 'CPUs'} {cpus} of {grant.holder}"
