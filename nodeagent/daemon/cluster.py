"""What the daemon does in the API server apart from claims and slices: Events, what is published of the machine, and
what other drivers publish. All of it shares one client with them."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from nodeagent.aio.revision import Revision
from nodeagent.config.schema import Config
from nodeagent.core.dra.pool import Features, Pool
from nodeagent.core.events.states import Node, PodOf
from nodeagent.daemon.fabrics import Fabrics
from nodeagent.daemon.paths import Paths
from nodeagent.kube.apiserver.lazy import LazyApi, is_configured
from nodeagent.managers.dra.manager import node_name
from nodeagent.managers.dra.other_drivers import ByDriver, OtherDrivers
from nodeagent.managers.events.manager import EventsManager
from nodeagent.managers.events.recorder import EventRecorder
from nodeagent.managers.publish.manager import PublishManager
from nodeagent.managers.publish.publications import publications
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent


class Cluster:
    """The API server as the daemon's parts use it. Building it connects to nothing."""

    def __init__(self, config: Config) -> None:
        """Store how the API server is reached; that applies until the agent ends."""
        self.api = LazyApi(config.dra.kubeconfig)
        self._configured = is_configured(config.dra.kubeconfig)
        self._node = node_name(config)
        self._driver = config.dra.driver
        self._recorder = EventRecorder(self.api, self._node, self._driver)
        self.report = self._recorder.report
        """Takes what is to be an Event."""

    def events(self, look: Callable[[], Node], pod_of: PodOf, news: Revision) -> EventsManager:
        """Return what writes Events; for the parameters, see EventsManager."""
        return EventsManager(self._recorder, look, pod_of, news, configured=self._configured)

    def fabrics(
        self,
        agent: Agent,
        where: Paths,
        config: Callable[[], Config],
        pools: Callable[[Features], Sequence[Pool]],
        render: Callable[[], Awaitable[None]],
    ) -> Fabrics:
        """Return targets on the network; for the parameters, see Fabrics."""
        return Fabrics(agent, where, config, self.api, self._node, pools, render, configured=self._configured)

    def published(
        self,
        agent: Agent,
        news: Revision,
        state_dir: Path,
        domain: Callable[[], str],
        offers: Callable[[], Sequence[Offer]],
        topology_manager: Callable[[], Mapping[str, str]],
    ) -> PublishManager:
        """Return what publishes the machine; for the parameters, see publications() and PublishManager."""
        some = publications(self.api, agent, self._node, self._driver, domain, offers, topology_manager)
        return PublishManager(some, news, state_dir, self.api, self._node, configured=self._configured)

    def other_drivers(self, take: Callable[[ByDriver], None]) -> OtherDrivers:
        """Return what looks at the slices of other drivers. take: takes what they publish."""
        slices = functools.partial(self.api.slices_of, self._node)
        return OtherDrivers(slices, self._driver, take, configured=self._configured)
