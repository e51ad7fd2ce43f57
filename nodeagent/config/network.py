"""The configuration of network adapters."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import AT_START, AbsoluteOrEmpty, Base, Match


class VfsConfig(Base, frozen=True):
    """How many virtual functions some physical ones have."""

    match: Annotated[Match, msgspec.Meta(min_length=1)]
    """Which physical functions: patterns as of a resource, such as netdevs: ens1f0."""
    count: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    drivers_autoprobe: bool | None = None
    """Whether the kernel binds new virtual functions to a driver. null: as it is."""


class NetworkConfig(Base, frozen=True):
    """Network adapters as other programs need them. Everything is off unless it is given."""

    device_info_dir: AbsoluteOrEmpty = ""
    """Where device information files for CNI plugins are written, /var/run/k8s.cni.cncf.io/devinfo/dp for Multus.
    Empty: nowhere."""
    vfs: list[VfsConfig] = []
    """Physical functions whose virtual functions the agent makes; of several that match one, the first."""
    move_interfaces: Annotated[bool, AT_START] = False
    """Whether claims may have the interfaces of their adapters moved into their pods."""
    vf_properties: list[Literal["mac", "vlan", "txRate", "spoofCheck", "linkState", "trust"]] = []
    """What claims may set of virtual functions; trust and spoofCheck let their pods pretend to be others."""
