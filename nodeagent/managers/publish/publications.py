"""The objects that can be published: labels of the Node, and the node's NodeResourceTopology.

Both are written with server-side apply: of the Node, only the fields of this manager are touched, and those that it no
longer applies are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from nodeagent.config.operation import PublishConfig
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.publish.labels import labels
from nodeagent.core.publish.zones import NodeTopology, Shown, zones
from nodeagent.errors import PeerError
from nodeagent.kube import resource_topology as wire
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent

NOT_FOUND = 404
LABELS, TOPOLOGY = "publish.nodeLabels", "publish.nodeResourceTopology"
"""Keys of the configuration, and of the journal."""


class PublishApi(Protocol):
    """The calls that are needed. Each raises PeerError."""

    async def get(self, resource: Any, name: str) -> dict[str, Any] | None: ...
    async def apply(
        self, resource: Any, name: str, body: Mapping[str, Any], *, manager: str, force: bool
    ) -> dict[str, Any]:
        """Apply an object without a namespace (server-side apply) and return it as stored."""
        ...

    async def delete(self, resource: Any, name: str, *, uid: str) -> bool: ...


class Publication(Protocol):
    """One thing that is kept up to date in the API server."""

    key: str
    """Of the configuration."""

    def on(self, config: PublishConfig) -> bool:
        """Return whether it is switched on."""
        ...

    def wanted(self) -> Any:
        """Return what it shall say now, as a value that can be compared."""
        ...

    async def write(self, wanted: Any) -> str:
        """Write it and return the UID of the Node for which it was written. Raise PeerError."""
        ...

    async def remove(self) -> None:
        """Remove it, if it is there and the agent's. Raise PeerError."""
        ...


class NodeLabels:
    """Labels of the Node about the machine."""

    key = LABELS

    def __init__(self, api: PublishApi, agent: Agent, node: str, driver: str, domain: Callable[[], str]) -> None:
        """driver: the name of the field manager. domain: returns what comes before the slash of each label."""
        self._api, self._agent, self._node, self._driver, self._domain = api, agent, node, driver, domain
        self._of: tuple[Inventory, CpuSet, str] | None = None
        self._labels: Mapping[str, str] = {}

    def on(self, config: PublishConfig) -> bool:
        return config.node_labels

    def wanted(self) -> Mapping[str, str]:
        now = self._agent.inventory, self._agent.settings.reserved, self._domain()
        if self._of != now:
            self._of, self._labels = now, labels(*now)
        return self._labels

    async def write(self, wanted: Mapping[str, str]) -> str:
        uid = await node_uid(self._api, self._node)
        await self._apply(uid, {"labels": dict(wanted)})
        return uid

    async def remove(self) -> None:
        from nodeagent.kube.apiserver.client import NODES

        if (found := await self._api.get(NODES, self._node)) is not None:
            await self._apply(found["metadata"]["uid"], {})

    async def _apply(self, uid: str, metadata: Mapping[str, Any]) -> None:
        """Apply metadata to the Node. With the UID, a Node that is gone is not re-created."""
        from nodeagent.kube.apiserver.client import NODES

        body = {"metadata": {"uid": uid, **metadata}}
        await self._api.apply(NODES, self._node, body, manager=self._driver, force=True)


class ResourceTopology:
    """The NodeResourceTopology of the node."""

    key = TOPOLOGY

    def __init__(
        self,
        api: PublishApi,
        agent: Agent,
        node: str,
        driver: str,
        shown: Callable[[], Shown],
        attributes: Callable[[], Mapping[str, str]],
    ) -> None:
        """driver: the name of the field manager. shown: returns what is advertised to kubelet. attributes: returns
        those of kubelet's topology manager."""
        self._api, self._agent, self._node, self._driver = api, agent, node, driver
        self._shown, self._attributes = shown, attributes

    def on(self, config: PublishConfig) -> bool:
        return config.node_resource_topology

    def wanted(self) -> NodeTopology:
        agent = self._agent
        found = zones(agent.inventory, agent.ledger, agent.settings.reserved, self._shown())
        return NodeTopology(zones=found, attributes=self._attributes())

    async def write(self, wanted: NodeTopology) -> str:
        """Write it and return the Node's UID. An object of another publisher is left alone: its fields are not taken
        over."""
        from nodeagent.kube.apiserver.client import TOPOLOGIES

        uid = await node_uid(self._api, self._node)
        body = wire.render(wanted, self._node, uid, self._driver)
        await self._api.apply(TOPOLOGIES, self._node, body, manager=self._driver, force=False)
        return uid

    async def remove(self) -> None:
        from nodeagent.kube.apiserver.client import TOPOLOGIES

        try:
            found = await self._api.get(TOPOLOGIES, self._node)
        except PeerError as error:
            if error.status == NOT_FOUND:
                return  # the kind is gone, and every object with it
            raise
        if found is not None and wire.belongs(found, self._driver):
            await self._api.delete(TOPOLOGIES, self._node, uid=found["metadata"]["uid"])


async def node_uid(api: PublishApi, node: str) -> str:
    """Return the UID of the Node. Raise PeerError if there is none."""
    from nodeagent.kube.apiserver.client import NODES

    if (found := await api.get(NODES, node)) is None:
        raise PeerError(f"cannot find nodes {node}: kubelet has not registered it")
    return str(found["metadata"]["uid"])


def publications(
    api: PublishApi,
    agent: Agent,
    node: str,
    driver: str,
    domain: Callable[[], str],
    offers: Callable[[], Sequence[Offer]],
    attributes: Callable[[], Mapping[str, str]],
) -> Sequence[Publication]:
    """Return all publications of a node. offers: returns what the device plugin serves; the rest as above."""

    def shown() -> Shown:
        return {one.name: agent.advertised(one.resource) for one in offers()}

    labels = NodeLabels(api, agent, node, driver, domain)
    return labels, ResourceTopology(api, agent, node, driver, shown, attributes)
