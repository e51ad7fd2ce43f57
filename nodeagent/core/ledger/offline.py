"""CPUs that are held by claims and containers but on which no pod can run.

They went offline, or the cpuset of all pods was narrowed. They stay held: nothing else is granted them, and when they
come back they still belong to the same holder. The holder's remaining CPUs, and all other grants, are unaffected.
"""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.core.ledger.ledger import Ledger, in_order
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.core.model.inventory import Inventory


def lost_cpus(inventory: Inventory, ledger: Ledger) -> Mapping[tuple[str, str], str]:
    """Return which CPUs were lost, by which claims and why, by the (pool, device) that they were allocated from.

    Devices that lost nothing are left out. Claims are listed in the order of their grants' ids.
    """
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for grant in in_order(ledger.grants):
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
    """Describe why CPUs are online but not available to pods."""
    pods = inventory.pods_cgroup
    return f"outside the cpuset of {pods.path}, which has {pods.cpus}" if pods is not None else ""


def held_outside(inventory: Inventory, ledger: Ledger) -> str:
    """Describe which holders have CPUs outside the cpuset of all pods; "" if there are none."""
    every = ((grant, grant.cpus & inventory.cpus_outside) for grant in in_order(ledger.grants))
    named = [_of(cpus, grant) for grant, cpus in every if cpus]
    return f"{', '.join(named)}: {outside_of(inventory)}" if named else ""


def narrowed(inventory: Inventory, ledger: Ledger) -> str:
    """Describe which unreserved CPUs are not offered because pods cannot run on them; "" if there are none."""
    cpus = inventory.cpus_outside - ledger.reserved
    return f"CPUs {cpus} are not offered: {outside_of(inventory)}" if cpus else ""


def _lost(inventory: Inventory, cpus: CpuSet) -> list[tuple[str, CpuSet]]:
    """Return (reason, CPUs) for each reason that applies."""
    every = (("offline", cpus - inventory.cpus_online), (outside_of(inventory), cpus & inventory.cpus_outside))
    return [(why, lost) for why, lost in every if lost]


def _of(cpus: CpuSet, grant: Grant) -> str:
    return f"{'CPU' if len(cpus) == 1 else 'CPUs'} {cpus} of {grant.holder}"
