"""What the parts of the daemon know of the node, in one value for Events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nodeagent.admin.watched import disputed
from nodeagent.core.events.states import Node
from nodeagent.managers.kubelet_conflicts import KubeletConflicts, unprotected
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent


def observed(
    agent: Agent,
    kubelet: KubeletConflicts,
    configured: Iterable[Offer],
    refused: Mapping[str, str],
    replaced: Sequence[str],
    config_error: str,
) -> Node:
    """Return the state of the node.

    refused: why configured resources are not served, by their names in the configuration. replaced: how the ledger's
    file was replaced. config_error: why the newest configuration is not in force, or "".
    """
    held = (f"{agent.ledger.grants[one].holder}: {agent.held_back.get(one, '')}" for one in disputed(agent))
    return Node(
        inventory=agent.inventory,
        ledger=agent.ledger,
        health=agent.health,
        refused={one.name: refused.get(one.config.name, "") for one in configured},
        conflicts=(*kubelet.contradictions, *agent.conflicts, *held),
        not_exclusive=unprotected(kubelet.kubelet, agent.ledger),
        loss=agent.loss,
        replaced=replaced,
        config_error=config_error,
    )
