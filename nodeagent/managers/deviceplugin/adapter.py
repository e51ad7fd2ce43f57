"""An agent's offer as the device-plugin server expects it."""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent.aio.revision import Revision
from nodeagent.core.events.happenings import Report, allocation_refused, unreported
from nodeagent.core.model.device import Advertised, ContainerEdits
from nodeagent.core.model.grant import DEVICE_PLUGIN, Holder
from nodeagent.errors import InputError, Refused
from nodeagent.managers.manager import Followed, nothing_follows
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent
from nodeagent.state.audit import Refusal
from nodeagent.telemetry import metrics
from nodeagent.telemetry.event_timer import EventTimer


class OfferAdapter:
    """Implements device_plugin.Resource for one offer."""

    pre_start_required = False

    def __init__(
        self, agent: Agent, offer: Offer, report: Report = unreported, granted: Followed = nothing_follows
    ) -> None:
        """granted: called after each allocation, before kubelet is answered."""
        self._agent = agent
        self._granted = granted
        self._report = report
        self._offer = offer
        self._shown = Revision(*agent.revisions)
        self._timer = EventTimer("device-plugin")

    def take(self, offer: Offer) -> None:
        """Take an equal offer, which may differ in what kubelet is not told."""
        self._offer = offer

    @property
    def name(self) -> str:
        return self._offer.name

    def advertised(self) -> tuple[Advertised, ...]:
        self._timer.looked(self._agent.inventory.generation, self._agent.event_s)
        return self._agent.advertised(self._offer.resource)

    def listed(self, *, news: bool) -> None:
        if news:
            self._timer.sent(self.name)
        self._timer.in_force(self.name)

    async def changed(self, seen: int) -> int:
        return await self._shown.changed(seen)

    def prefer(self, available: Sequence[str], must_include: Sequence[str], size: int) -> list[str]:
        with metrics.PREFER_SECONDS.labels(self.name).time():
            return self._agent.prefer(self._offer.resource, available, must_include, size)

    async def allocate(self, containers: Sequence[Sequence[str]], op: str) -> list[ContainerEdits]:
        with metrics.counted_allocation(self.name):
            try:
                edits = await self._agent.allocate(self._offer.resource, containers, self._offer.edits, op)
            except (Refused, InputError) as error:
                self._agent.record_refusals([self._refusal(containers, error)], op)
                ids = [one for container in containers for one in container]
                self._report(allocation_refused(self.name, ids, str(error)))
                raise
            await self._granted()
            return edits

    def _refusal(self, containers: Sequence[Sequence[str]], error: Exception) -> Refusal:
        """Return the audit's entry. The device plugin is not told for which pod kubelet asks."""
        holder = Holder(api=DEVICE_PLUGIN, resource=self.name)
        return Refusal(holder=str(holder), want="; ".join(map(", ".join, containers)), why=str(error))

    async def pre_start(self, ids: Sequence[str]) -> None:
        """Do nothing: no preparation is needed."""
