"""What the scheduler of Kubernetes 1.37.2 counts against a Node for allocated devices, from the slices as stored.

Source: pkg/scheduler/framework/plugins/dynamicresources/nodeallocatabledynamicresources.go (addDeviceMapping,
addDeviceOverhead) and k8s.io/component-helpers/resource (addDRANodeAllocatableClaimResources).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from tests.oracles.api_rules import quantity

Allocated = tuple[Mapping[str, Any], Mapping[str, str] | None]
"""A device as it is stored, and consumedCapacity of its result: None unless it may be allocated several times."""


def counted(results: Iterable[Allocated], containers: int = 1) -> Counter[str]:
    """By resource of the Node, for a pod of which so many containers use the claim. ValueError where the scheduler
    fails: the device is consumed whole, and counts by capacity."""
    total: Counter[str] = Counter()
    for device, consumed in results:
        for resource, cost in device.get("nodeAllocatableResources", {}).items():
            mapping, overhead = cost.get("mapping", {}), cost.get("overhead", {})
            if key := mapping.get("capacityKey"):
                if consumed is None:
                    raise ValueError(f"consumedCapacity is nil, but {key} is set")
                amount = quantity(consumed[key]) * quantity(mapping["capacityMultiplier"]) if key in consumed else 0
            else:
                amount = quantity(mapping.get("deviceMultiplier", "0"))
            each = quantity(overhead.get("perPod", "0")) + containers * quantity(overhead.get("perContainer", "0"))
            total[resource] += Fraction(amount) + each  # type: ignore[assignment]
    return total
