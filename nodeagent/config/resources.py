"""The configuration of extended resources."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import RESOURCE_NAME, Absolute, AbsoluteOrEmpty, Base, DevPath, Match, Name, Positive, Text

Variable = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Quantity = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,15}(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$")]
NodeResource = Annotated[str, msgspec.Meta(pattern=r"^(cpu|memory|hugepages-[1-9][0-9]{0,8}(Ki|Mi|Gi))$")]
NQN = r"nqn\.[0-9]{4}-[0-9]{2}\.[^\s,\x00]{1,211}"
LabelKey = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]
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


class NvmeTargetConfig(Base, frozen=True):
    """Kind nvmeof: a subsystem on the network that claims may have, with all of its namespaces. Keys are called as
    nvme-cli's options are."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,46}[a-z0-9])?$")]
    """Names the device; the same on all nodes."""
    nqn: Annotated[str, msgspec.Meta(pattern=f"^{NQN}$")]
    """Of the subsystem."""
    traddr: Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Fa-f.:]{2,45}(%[A-Za-z0-9._-]{1,15})?$")]
    """IP address of the target: the kernel resolves no names."""
    trsvcid: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 4420
    """TCP port (of rdma: of its connection manager)."""
    transport: Literal["tcp", "rdma"] = "tcp"
    host_nqn: Annotated[str, msgspec.Meta(pattern=f"^({NQN})?$")] = ""
    """As whom nodes connect. Empty: each as /etc/nvme/hostnqn says, as nvme-cli does."""
    ctrl_loss_tmo: Annotated[int, msgspec.Meta(ge=-1, le=86_400)] = -1
    """For how many seconds the kernel tries to connect a lost path again before it removes the disks; -1: as long as a
    claim has them."""
    reconnect_delay: Annotated[int, msgspec.Meta(ge=1, le=3600)] | None = None
    """Seconds between two tries. null: the kernel's 10."""
    fast_io_fail_tmo: Annotated[int, msgspec.Meta(ge=-1, le=86_400)] | None = None
    """After how many seconds without a path I/O fails instead of waiting. null: the kernel's -1, never."""
    dhchap_secret_file: AbsoluteOrEmpty = ""
    """A file on the node with its key of DH-HMAC-CHAP (DHHC-1:…). Empty: no authentication."""
    dhchap_ctrl_secret_file: AbsoluteOrEmpty = ""
    """A file with the target's key, for a node that authenticates the target too."""
    node_selector: dict[LabelKey, LabelValue] = {}
    """Labels of the nodes that reach the target. Empty: all nodes of the cluster."""


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
    targets: list[NvmeTargetConfig] = []
    """kind nvmeof: which targets."""
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
