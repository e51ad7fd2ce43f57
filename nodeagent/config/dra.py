"""The configuration of Dynamic Resource Allocation."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import AT_START, DOMAIN, NODE_NAME, Absolute, AbsoluteOrEmpty, Base


class DraConfig(Base, frozen=True):
    """Dynamic Resource Allocation: how this node takes part if any resource is served through it."""

    driver: Annotated[str, msgspec.Meta(pattern=DOMAIN, max_length=63), AT_START] = "nodeagent.dev"
    node_name: Annotated[str, msgspec.Meta(pattern=f"^({NODE_NAME})?$"), AT_START] = ""
    """The Node's name. Empty: $NODE_NAME, or otherwise the host name."""
    kubeconfig: Annotated[AbsoluteOrEmpty, AT_START] = ""
    """How to reach the API server. Empty: as a pod's service account."""
    cdi_dir: Annotated[Absolute, AT_START] = "/var/run/cdi"
    unhealthy_effect: Literal["NoSchedule", "NoExecute"] = "NoSchedule"
    """The effect of the taint on a device that is not healthy."""
    spread_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 10.0
    """The first request to the API server is delayed by a random part of this, as many nodes
    may start at the same moment."""
    device_status: bool = True
    """Whether prepared devices are written to the claim's status.devices."""
    node_allocatable: Literal["auto", "off"] = "auto"
    """Whether slices say what claims take of the Node's resources, so that the scheduler counts it: auto: if the Node
    declares DRANodeAllocatableResources and the API server keeps it."""
    binding_conditions: bool = False
    """Whether the scheduler waits until the agent has granted a claim before it binds the pod, for kinds that are also
    served through the device plugin (DRADeviceBindingConditions). Needs the right to list and watch ResourceClaims."""

    passthrough_drivers: list[Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_-]{0,48}vfio[_-]pci$")]] = []
    """VFIO drivers that claims may have a GPU or an adapter bound to, for a virtual machine."""
    list_attributes: bool = False
    """Whether groups of CPUs name all NUMA nodes and PCIe roots near them (DRAListTypeAttributes)."""
    lease_namespace: Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$"), AT_START] = ""
    """Where the Lease is by which one agent of the cluster publishes the pools that nodes share. Empty: the namespace
    of the pod, or otherwise kube-system."""
