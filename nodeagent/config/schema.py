"""The configuration as types. Everything has a default; a loaded configuration is frozen.

Keys are camelCase, as in Kubernetes. `schema()` returns the same as JSON schema.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import msgspec.inspect

API_VERSION, KIND = "nodeagent.dev/v1alpha1", "NodeAgentConfiguration"
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400 * 366)]
SMALLEST_PAGE_BYTES, LARGEST_PAGE_BYTES = 16 << 10, 16 << 30
"""Limits of hugepage sizes, over all processors that Linux supports."""
LONGEST_DOMAIN = 253
KEEP_FREE = "256Mi"
"""More than twice what kubelet keeps free before it evicts pods (evictionHard: memory.available 100Mi)."""
NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
DOMAIN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+$"
NODE_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
RESOURCE_NAME = f"^({DOMAIN[1:-1]}/)?{NAME[1:]}"
Name = Annotated[str, msgspec.Meta(pattern=NAME)]
DevPath = Annotated[str, msgspec.Meta(pattern=r"^/dev/[^\0]+$")]
Absolute = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$")]
AbsoluteOrEmpty = Annotated[str, msgspec.Meta(pattern=r"^(/[^\0]*)?$")]
Variable = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Quantity = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,15}(m|k|M|G|T|Ki|Mi|Gi|Ti)?)?$")]
NodeResource = Annotated[str, msgspec.Meta(pattern=r"^(cpu|memory|hugepages-[1-9][0-9]{0,8}(Ki|Mi|Gi))$")]
AT_START = msgspec.Meta(extra={"applied": "at start"})
"""Marks a key that takes effect only when the agent starts."""
Text = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*$")]
AnyOrAddress = Annotated[str, msgspec.Meta(pattern=r"^(\*|[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])$")]
Match = dict[str, str | list[str]]


class _Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of all parts of the configuration: frozen, keyword-only and strict."""


class MountConfig(_Base, frozen=True):
    """A file or folder of the host that the container gets in addition to the device."""

    host_path: Absolute
    container_path: Absolute
    read_only: bool = True


class UsbConfig(_Base, frozen=True):
    """USB devices by vendor and, if given, product (four hexadecimal digits each) and serial number."""

    vendor: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{4}$")]
    product: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F]{4})?$")] = ""
    serial: str = ""


class CdiConfig(_Base, frozen=True):
    """CDI names to pass to the runtime: CLASS=VALUE, where VALUE is a field or attribute of the device."""

    kind: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    name: str = "id"


DriverCapability = Literal["graphics", "video"]
"""What containers may get of NVIDIA's driver in addition to what computing needs."""


class NvidiaConfig(_Base, frozen=True):
    """The user-space files of NVIDIA's driver that containers with its GPUs get."""

    driver_files: Literal["auto", "inject", "off"] = "auto"
    """auto: if they are found; inject: always, a GPU without them is not handed over; off: NVIDIA's runtime adds
    them."""
    driver_root: AbsoluteOrEmpty = ""
    """The root of the file system with the driver. Empty: /run/nvidia/driver, /host, /."""


class AmdPartitionConfig(_Base, frozen=True):
    """How some GPUs of AMD are partitioned. At least one of compute and memory is given."""

    gpus: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=256)]], msgspec.Meta(min_length=1)]
    """Shell patterns of PCI addresses or UUIDs."""
    compute: Literal["SPX", "DPX", "TPX", "QPX", "CPX"] | None = None
    """One, two, three or four partitions, or one for each compute die. null: as it is."""
    memory: Literal["NPS1", "NPS2", "NPS4", "NPS8"] | None = None
    """Into how many parts the memory is divided; requested, it changes when the driver is loaded again. null: as it
    is."""


class AmdConfig(_Base, frozen=True):
    """GPUs of AMD. They are left alone unless it is given."""

    partitions: list[AmdPartitionConfig] = []
    """Of several that match a GPU, the first."""


class OverheadConfig(_Base, frozen=True):
    """What of one resource of the Node a pod needs in addition to a device. At least one is given."""

    per_pod: Quantity = ""
    """Once for each pod that uses a claim with the device."""
    per_container: Quantity = ""
    """For each of its containers that uses the claim."""


class MigConfig(_Base, frozen=True):
    """Kind gpu: how NVIDIA's GPUs in MIG mode are divided."""

    mode: Literal["static", "dynamic"] = "static"
    """static: the resource serves the instances that others made. dynamic: it serves everything that could be
    made; an instance is made for a claim when it is prepared, and destroyed afterwards."""
    gpus: list[str] = []
    """With dynamic: shell patterns of PCI addresses. The agent puts these GPUs into MIG mode while nothing uses them,
    and takes out of it those that it put there and that no resource names any longer."""


class ResourceConfig(_Base, frozen=True):
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


class DraConfig(_Base, frozen=True):
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


class KubeletConfigConfig(_Base, frozen=True):
    """Where kubelet's own configuration is, if its command line cannot show it."""

    file: AbsoluteOrEmpty = ""
    """Empty: as in --config; config.yaml in kubelet_dir if kubelet's command line is not visible."""
    drop_ins: AbsoluteOrEmpty = ""
    """A folder. Empty: as in --config-dir; /etc/kubernetes/kubelet.conf.d if kubelet's command line is not visible."""


class LogConfig(_Base, frozen=True):
    """What is logged, and how: `auto` is `console` on a terminal and `json` elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class StatusConfig(_Base, frozen=True):
    """Who may read the status socket."""

    group: Annotated[str, AT_START] = ""
    """A group whose members may read it; root always may."""


class MetricsTlsConfig(_Base, frozen=True):
    """How the metrics are secured; files are read again when they change."""

    cert_file: AbsoluteOrEmpty = ""
    """The server's certificate and those between it and its authority (PEM). Empty: no TLS."""
    key_file: AbsoluteOrEmpty = ""
    client_ca_file: AbsoluteOrEmpty = ""
    """Authorities of clients. Empty: clients need no certificate."""


class MetricsConfig(_Base, frozen=True):
    """Where the metrics are served in addition to the status socket, and to whom."""

    listen: str = ""
    """ADDRESS:PORT (TCP). Empty: only on the status socket."""
    token_file: AbsoluteOrEmpty = ""
    """A file with the token that scrapers must present; read again when it changes. Empty: none is needed."""
    tls: MetricsTlsConfig = MetricsTlsConfig()


class EventsConfig(_Base, frozen=True):
    """Kubernetes Events on pods and the Node."""

    enabled: bool = True
    """Whether Events are written where there is an API server."""


class PublishConfig(_Base, frozen=True):
    """What the API server is told of the machine for others, in addition to ResourceSlices."""

    node_labels: bool = False
    """Whether the Node has labels about its machine."""
    node_resource_topology: bool = False
    """Whether there is a NodeResourceTopology (topology.node.k8s.io/v1alpha2) of the node."""


class ReleaseConfig(_Base, frozen=True):
    """How long a grant may be missing from kubelet's list before it is released."""

    poll_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 15.0
    """How often kubelet is asked what pods hold: the end of a pod changes no file that could be watched."""
    unconfirmed_seconds: Seconds = 60.0
    """For a grant that was never listed: its pod may still be in admission."""
    confirmed_seconds: Seconds = 5.0
    """For a grant that was listed before, if the kernel or the runtime confirms that nothing of its pod runs."""
    unobserved_seconds: Seconds = 600.0
    """For a grant where neither can confirm that."""


class HealthConfig(_Base, frozen=True):
    """How health is judged."""

    recover_seconds: Seconds = 30.0
    """How long all evidence must be good before an unhealthy device is healthy again."""
    nvml_seconds: Seconds = 30.0
    """How often NVML is queried."""
    poll_seconds: Seconds = 10.0
    """How often the devices are looked at through the kernel."""
    ignore: list[
        Literal["carrier", "pcie", "aer", "nvme", "smart", "ras", "kind", "nvlink", "clocks", "fabric", "recovery"]
    ] = []
    """Sources of evidence that do not count on this node."""
    quarantine: list[Annotated[str, msgspec.Meta(min_length=1, max_length=256)]] = []
    """Devices that are not granted: shell patterns of their id, PCI address, UUID or serial number."""


class TuningConfig(_Base, frozen=True):
    """What exclusive CPUs are set to while containers hold them. Everything is left alone unless it is given."""

    governor: Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{0,15}$")] = ""
    """Of cpufreq, such as performance."""
    energy_performance_preference: Annotated[str, msgspec.Meta(pattern=r"^([a-z_]{0,31}|[0-9]{1,3})$")] = ""
    min_frequency_mhz: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    """A core that cannot reach it gets its own limit."""
    max_frequency_mhz: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    wakeup_latency_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    """The longest tolerated time for leaving an idle state; 0: none."""


CacheMask = Annotated[str, msgspec.Meta(pattern=r"^0x0{0,7}[1-9a-fA-F][0-9a-fA-F]{0,7}$")]
CacheWays = Annotated[int, msgspec.Meta(ge=1, le=32)]


class ResctrlClassConfig(_Base, frozen=True):
    """A class of cache ways and memory bandwidth that containers share."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")]
    caches: dict[Literal["L3", "L3CODE", "L3DATA", "L2", "L2CODE", "L2DATA"], CacheMask | CacheWays] = {}
    """By the kernel's name of a cache: a mask of ways, or how many of the highest ones. What is left out is shared with
    the default group."""
    memory_bandwidth_percent: Annotated[int, msgspec.Meta(ge=1, le=100)] | None = None
    memory_bandwidth_mbps: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] | None = msgspec.field(
        default=None, name="memoryBandwidthMBps"
    )
    """In 10^6 bytes per second, for each L3 cache."""


class ResctrlConfig(_Base, frozen=True):
    """How caches and memory bandwidth are divided (resctrl)."""

    exclusive_ways: Annotated[int, msgspec.Meta(ge=0, le=31)] = 0
    """How many ways of each L3 cache the default group gives up, for claims."""
    classes: list[ResctrlClassConfig] = []


BytesPerSecond = (
    Annotated[int, msgspec.Meta(ge=2, le=10**15)]
    | Annotated[str, msgspec.Meta(pattern=r"^([2-9]|[1-9][0-9]{1,14}|[1-9][0-9]{0,5}(Ki|Mi|Gi|k|M|G))$")]
)
OperationsPerSecond = Annotated[int, msgspec.Meta(ge=2, le=1_000_000_000)]


class IoClassConfig(_Base, frozen=True):
    """A class of limits of disk I/O that claims and pods name."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")]
    disks: list[Annotated[str, msgspec.Meta(pattern=r"^(/dev/[^\0]+|[^/\0]+)$", max_length=256)]] = []
    """On which disks pods that name it are limited: shell patterns of the kernel's names, or paths below /dev. A claim
    that names it is limited on its own."""
    read_bytes_per_second: BytesPerSecond | None = None
    write_bytes_per_second: BytesPerSecond | None = None
    read_iops: OperationsPerSecond | None = msgspec.field(default=None, name="readIOPS")
    write_iops: OperationsPerSecond | None = msgspec.field(default=None, name="writeIOPS")
    weight: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None
    """Relative to other pods of the same QoS class, of which each has 100 without one."""
    latency_target_microseconds: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] | None = None


class IoConfig(_Base, frozen=True):
    """How disk I/O is limited."""

    classes: list[IoClassConfig] = []


class PinningConfig(_Base, frozen=True):
    """How containers are confined to what they hold, and all others kept off it."""

    mode: Annotated[Literal["auto", "nri", "cgroup", "off"], AT_START] = "auto"
    """auto: through the runtime (NRI) if its socket exists, otherwise by cgroups alone."""
    nri_socket: Annotated[Absolute, AT_START] = "/var/run/nri/nri.sock"
    nri_index: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{2}$"), AT_START] = "90"
    """The agent's place among the runtime's plugins."""
    on_failure: Literal["refuse", "warn"] = "refuse"
    """What happens to a container that cannot be confined to what it holds: it is not
    started, or started with a warning."""
    memory: Literal["granted", "local"] = "granted"
    """The NUMA nodes to which a container's memory is bound: those of the pages and memory that it holds; with local,
    if it holds neither, those of its CPUs."""
    strict_reservation: bool = True
    """Whether containers without exclusive CPUs are kept off the reserved CPUs too."""
    verify_seconds: Annotated[Seconds, AT_START] = 30.0
    """How often everything is read back without an event."""
    cgroup_root: Annotated[Absolute, AT_START] = "/"
    """Kubelet's cgroupRoot."""
    partition: Literal["none", "root", "isolated"] = "none"
    """Whether a container with exclusive CPUs becomes a cpuset partition."""
    move_interrupts: bool = False
    """Whether interrupts are moved away from exclusive CPUs."""
    intruders_seconds: Seconds = 60.0
    """How often to look for host threads and interrupts on exclusive CPUs."""
    tuning: TuningConfig = TuningConfig()
    resctrl: ResctrlConfig | None = None
    """null: caches and memory bandwidth are left alone."""
    io: IoConfig | None = None
    """null: there are no classes of disk I/O; claims may still have limits on their own disks."""


class VfsConfig(_Base, frozen=True):
    """How many virtual functions some physical ones have."""

    match: Annotated[Match, msgspec.Meta(min_length=1)]
    """Which physical functions: patterns as of a resource, such as netdevs: ens1f0."""
    count: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    drivers_autoprobe: bool | None = None
    """Whether the kernel binds new virtual functions to a driver. null: as it is."""


class NetworkConfig(_Base, frozen=True):
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


class HugepagesConfig(_Base, frozen=True):
    """A hugepage pool that the agent provides on one NUMA node."""

    page_size: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,8}(Ki|Mi|Gi)$")]
    node: Annotated[int, msgspec.Meta(ge=0)]
    pages: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The pool is made at least this large at the start, and kept so."""
    max_pages: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How far the pool may grow when a claim needs more; 0: not at all."""
    keep_free: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,8}(Ki|Mi|Gi)$")] = KEEP_FREE
    """Memory of the node, and of the machine, that stays available when the pool grows for a claim."""


class Config(_Base, frozen=True):
    """The whole configuration; everything has a default."""

    api_version: Literal["nodeagent.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["NodeAgentConfiguration"] = KIND  # type: ignore[assignment]
    kubelet_dir: Annotated[Absolute, AT_START] = "/var/lib/kubelet"
    kubelet_config: KubeletConfigConfig = KubeletConfigConfig()
    state_dir: Annotated[Absolute, AT_START] = "/var/lib/nodeagent"
    runtime_dir: Annotated[Absolute, AT_START] = "/run/nodeagent"
    domain: Annotated[str, msgspec.Meta(pattern=DOMAIN)] = "nodeagent.dev"
    reserved_cpus: str | None = None
    """CPUs that are never granted. null: kubelet's reservedSystemCPUs, or otherwise the first core."""
    resources: list[ResourceConfig] | None = None
    """null: DEFAULT_RESOURCES."""
    resync_seconds: Seconds = 60.0
    audit_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 30
    log: LogConfig = LogConfig()
    status: StatusConfig = StatusConfig()
    metrics: MetricsConfig = MetricsConfig()
    events: EventsConfig = EventsConfig()
    publish: PublishConfig = PublishConfig()
    release: ReleaseConfig = ReleaseConfig()
    health: HealthConfig = HealthConfig()
    dra: DraConfig = DraConfig()
    nvidia: NvidiaConfig = NvidiaConfig()
    amd: AmdConfig = AmdConfig()
    pinning: PinningConfig = PinningConfig()
    network: NetworkConfig = NetworkConfig()
    hugepages: list[HugepagesConfig] = []
    """Pools to provide; others are left alone."""

    def full_name(self, one: ResourceConfig) -> str:
        """Return the name that pods request: DOMAIN/NAME."""
        return one.name if "/" in one.name else f"{self.domain}/{one.name}"

    @property
    def served(self) -> list[ResourceConfig]:
        """Return the configured resources, or the default ones if none are configured."""
        return list(DEFAULT_RESOURCES) if self.resources is None else self.resources

    @property
    def divided(self) -> list[ResourceConfig]:
        """Return the served resources whose devices are MIG instances that are made on demand."""
        return [one for one in self.served if one.mig.mode == "dynamic"]

    @property
    def served_by_dra(self) -> list[ResourceConfig]:
        """Return the served resources that use DRA, alone or together with the device plugin."""
        return [one for one in self.served if one.serve != "device-plugin"]


DEFAULT_RESOURCES = (
    ResourceConfig(name="cpu", kind="cpu"),
    ResourceConfig(name="gpu", kind="gpu", match={"parent": ""}),
    ResourceConfig(name="vf", kind="nic", match={"sriov": "vf"}),
    ResourceConfig(name="fuse", kind="char", paths=["/dev/fuse"], replicas=100),
    ResourceConfig(name="kvm", kind="char", paths=["/dev/kvm"], replicas=100),
)
"""Resources that need no preparation and take nothing from the host or from kubelet's own managers: no hugepages
(kubelet counts the same pools), no physical function and no disk (the host may be using it). GPUs are whole: instances,
partitions and virtual functions are other amounts and need resources of their own."""


def schema() -> dict[str, Any]:
    """Return the configuration's JSON schema."""
    return msgspec.json.schema(Config)


@functools.cache
def keys_applied_at_start() -> frozenset[str]:
    """Return the paths of all keys that are marked AT_START, such as "dra.driver"."""
    return frozenset(_marked(msgspec.inspect.type_info(Config), ""))


def _marked(info: msgspec.inspect.Type, path: str) -> Iterator[str]:
    if isinstance(info, msgspec.inspect.Metadata):
        if (info.extra or {}) == AT_START.extra:
            yield path
        info = info.type
    if isinstance(info, msgspec.inspect.StructType):
        for one in info.fields:
            yield from _marked(one.type, f"{path}.{one.encode_name}" if path else one.encode_name)
