"""The configuration of extended resources."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import RESOURCE_NAME, Absolute, Base, DevPath, Match, Name, Positive, Text

Variable = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Quantity = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,15}(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$")]
NodeResource = Annotated[str, msgspec.Meta(pattern=r"^(cpu|memory|hugepages-[1-9][0-9]{0,8}(Ki|Mi|Gi))$")]
AnyOrAddress = Annotated[str, msgspec.Meta(pattern=r"^(\*|[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])$")]


class MountConfig(Base, frozen=True):
    """A file or folder of the host that the container gets in addition to the device."""

    host_path: Absolute
    container_path: Absolute
    read_only: bool = True


class UsbConfig(Base, frozen=True):
    """USB devices by vendor and, if given, product (four hexadecimal digits each) and serial number."""

    vendor: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{4}$")]
    product: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F]{4})?$")] = ""
    serial: str = ""


class CdiConfig(Base, frozen=True):
    """CDI names to pass to the runtime: CLASS=VALUE, where VALUE is a field or attribute of the device."""

    kind: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    name: str = "id"


DriverCapability = Literal["graphics", "video"]
"""What containers may get of NVIDIA's driver in addition to what computing needs."""


class OverheadConfig(Base, frozen=True):
    """What of one resource of the Node a pod needs in addition to a device. At least one is given."""

    per_pod: Quantity = ""
    """Once for each pod that uses a claim with the device."""
    per_container: Quantity = ""
    """For each of its containers that uses the claim."""


class MigConfig(Base, frozen=True):
    """Kind gpu: how NVIDIA's GPUs in MIG mode are divided."""

    mode: Literal["static", "dynamic"] = "static"
    """static: the resource serves the instances that others made. dynamic: it serves everything that could be
    made; an instance is made for a claim when it is prepared, and destroyed afterwards."""
    gpus: list[str] = []
    """With dynamic: shell patterns of PCI addresses. The agent puts these GPUs into MIG mode while nothing uses them,
    and takes out of it those that it put there and that no resource names any longer."""


class ResourceConfig(Base, frozen=True):
    """One extended resource."""

    name: Annotated[str, msgspec.Meta(pattern=RESOURCE_NAME)]
    """After the slash of the resource's full name; or the full name, with a domain of its own."""
    kind: Name
    serve: Literal["device-plugin", "dra", "both"] = "device-plugin"
    """The API through which pods get it."""
    match: Match = {}
    """Shell patterns by field or attribute of a device; all must match, and of a list of patterns one."""
    match_any: list[Match] = []
    """If given, one of these must match in addition."""
    paths: list[DevPath] = []
    """kind char: globs of device nodes."""
    usb: list[UsbConfig] = []
    """kind usb: which devices."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    page_size: str = ""
    """kind hugepages."""
    pages_per_block: Positive = 1
    options: list[str] = []
    """kind cpu: placement options."""
    numa: Literal["single", "restricted", "best-effort"] = "best-effort"
    grouping: Literal["numa-node", "socket", "l3", "individual"] = "numa-node"
    """kind cpu, through DRA: what one device is."""
    device_nodes: bool = True
    """Whether the container gets the device nodes themselves; false if CDI provides everything."""
    cdi: CdiConfig | None = None
    driver_capabilities: list[DriverCapability] = []
    """kind gpu: what containers get of NVIDIA's driver in addition to what computing needs."""
    env: dict[Variable, Text] = {}
    additional_info: dict[AnyOrAddress, dict[str, Text]] = {}
    """Of PCI functions: what else PCIDEVICE_…_INFO says, by PCI address, or "*" for every one."""
    vhost_net: bool = False
    """kind nic: whether the container gets /dev/vhost-net and /dev/net/tun too."""
    mounts: list[MountConfig] = []
    mig: MigConfig = MigConfig()
    overhead: dict[NodeResource, OverheadConfig] = {}
    """Devices through DRA: what of the Node's resources the scheduler counts for each, by resource."""
