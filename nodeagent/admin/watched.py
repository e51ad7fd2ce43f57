"""What the pages of the agent are made of: the daemon as they see it, and how its resources stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nodeagent.kube.kubelet.registration import Registration
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent


class Watched(Protocol):
    """What the daemon reports about itself."""

    agent: Agent
    started_at: float
    config_file: str
    """The path of the configuration, or "" if the agent has its defaults."""

    @property
    def config_error(self) -> str:
        """Return why the newest configuration is not in force, or ""."""
        ...

    @property
    def notes(self) -> list[str]: ...
    @property
    def refused(self) -> Mapping[str, str]:
        """Return the configured resources that are not served, with the reason. THROUGH_DRA (resources/catalog.py) is
        at the end of the name of one that is refused to claims."""
        ...

    def offers(self) -> Sequence[Offer]:
        """Return what is served through the device plugin."""
        ...

    def configured(self) -> Sequence[Offer]:
        """Return what is configured for either API, whether it can be served or not."""
        ...

    def registrations(self) -> Sequence[Registration]: ...
    def kubelet_document(self) -> dict[str, Any]:
        """Return kubelet's configuration, as far as it concerns the agent."""
        ...

    def dra_document(self) -> dict[str, Any]:
        """Return the state of DRA, or {} if nothing is served through it."""
        ...

    def pinning_document(self) -> dict[str, Any]:
        """Return how containers are confined to what they hold."""
        ...

    def gpus_document(self) -> dict[str, Any]:
        """Return `sharing`, the MPS daemons and time slices of GPUs, `mig`, the MIG instances that the agent makes, and
        `amd`, the partitions of AMD's GPUs that it keeps; each is {} if there are none."""
        ...

    def health_readings(self) -> Mapping[tuple[str, str], Mapping[str, int]]:
        """Return the numbers that were read of the devices, by device and source."""
        ...

    async def clear_health(self, device: str, who: str) -> bool:
        """Clear what is remembered against a device, and record who asked for it. Return whether there was anything."""
        ...

    def not_ready(self) -> Sequence[str]:
        """Return why the agent is not ready, one sentence each; empty if it is."""
        ...

    async def reload(self) -> list[str]:
        """Read the configuration again and return what changed. On ConfigError the old one stays."""
        ...


def resources(watched: Watched) -> list[dict[str, Any]]:
    """Return how each resource of the device plugin stands, in plain types."""
    held = Counter(resource for resource, _ in watched.agent.ledger.by_id)
    known = {one.resource: one for one in watched.registrations()}
    return [_resource(watched.agent, offer, held[offer.name], known.get(offer.name)) for offer in watched.offers()]


def _resource(agent: Agent, offer: Offer, held: int, known: Registration | None) -> dict[str, Any]:
    shown = agent.advertised(offer.resource)
    return {
        "name": offer.name,
        "kind": offer.resource.kind,
        "devices": len(shown),
        "healthy": sum(1 for one in shown if one.healthy),
        "held_elsewhere": sum(1 for one in shown if one.held and not one.healthy),
        "held": held,
        "registered": known.ready if known else False,
        "registration": known.state if known else "",
        "reason": known.reason if known else "",
    }


def disputed(agent: Agent) -> list[str]:
    """Return the ids of the grants that kubelet has stopped listing although their pods are alive."""
    return sorted(one for one in agent.disputed if one in agent.ledger.grants)
