"""NodeResourceTopology of topology.node.k8s.io/v1alpha2 on the wire: JSON for server-side apply.

Source: pkg/apis/topology/v1alpha2/types.go of k8stopologyawareschedwg/noderesourcetopology-api.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nodeagent.core.publish.zones import Amount, NodeTopology, Zone

TYPE = "Node"
"""Zone.type of a NUMA node."""
MANAGED_BY = "app.kubernetes.io/managed-by"


def render(topology: NodeTopology, node: str, node_uid: str, driver: str) -> dict[str, Any]:
    """Return the object of a node. It is deleted together with its Node. driver: who it belongs to."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid}
    return {
        "metadata": {"name": node, "labels": {MANAGED_BY: driver}, "ownerReferences": [owner]},
        "attributes": [{"name": name, "value": value} for name, value in sorted(topology.attributes.items())],
        "zones": [_zone(one) for one in topology.zones],
    }


def belongs(document: Mapping[str, Any], driver: str) -> bool:
    """Return whether an object was rendered here."""
    return (document["metadata"].get("labels") or {}).get(MANAGED_BY) == driver


def _zone(zone: Zone) -> dict[str, Any]:
    return {
        "name": _name(zone.node),
        "type": TYPE,
        "costs": [{"name": _name(node), "value": distance} for node, distance in sorted(zone.distances.items())],
        "resources": [_resource(one) for one in zone.amounts],
    }


def _resource(one: Amount) -> dict[str, str]:
    amounts = {"capacity": one.capacity, "allocatable": one.allocatable, "available": one.available}
    return {"name": one.name, **{key: str(value) for key, value in amounts.items()}}


def _name(node: int) -> str:
    return f"node-{node}"
