"""The agent's answers to the container runtime over NRI where claims have interfaces in their pods: in addition to
containers, the runtime asks about sandboxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nodeagent.core.model.container import Adjustment, Container, Pod, Update
from nodeagent.managers.pinning.nri_hooks import NriHooks


class PodNetworks(Protocol):
    """What is done to the networks of pods."""

    @property
    def wanted(self) -> bool:
        """Whether the runtime is to ask about pods."""
        ...

    async def started(self, pod: Pod) -> None:
        """Complete the network of a pod that has no containers yet. Raise HostError, and it does not start."""

    async def creating(self, pod: Pod) -> None:
        """Look at it again before a container is created. Raise HostError, and that is not created."""

    async def stopped(self, pod: Pod) -> None:
        """Undo it: the pod's containers have ended, and its network namespace is about to."""

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take all pods that exist."""


class NoPodNetworks:
    """Leaves the networks of pods alone."""

    wanted = False

    async def started(self, pod: Pod) -> None:
        return

    async def creating(self, pod: Pod) -> None:
        return

    async def stopped(self, pod: Pod) -> None:
        return

    def learn(self, pods: Iterable[Pod]) -> None:
        return


NO_POD_NETWORKS = NoPodNetworks()


class PodHooks(NriHooks):
    """Implements the handler of nri.service, and what it is told of pods."""

    def __init__(self, networks: PodNetworks, *given: Any) -> None:
        """given: as for NriHooks."""
        super().__init__(*given)
        self._networks = networks

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> Sequence[Update]:
        self._networks.learn(pods)
        return await super().synchronize(pods, containers)

    async def create(self, pod: Pod, container: Container, within_s: float) -> tuple[Adjustment, Sequence[Update]]:
        await self._networks.creating(pod)
        return await super().create(pod, container, within_s)

    async def pod_started(self, pod: Pod) -> None:
        await self._networks.started(pod)

    async def pod_stopped(self, pod: Pod) -> None:
        await self._networks.stopped(pod)

    async def pod_removed(self, pod: Pod) -> None:
        await self._networks.stopped(pod)
