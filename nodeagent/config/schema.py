"""The configuration as types. Everything has a default; a loaded configuration is frozen.

Keys are camelCase, as in Kubernetes. Each subject has a module of its own. `schema()` returns the same as JSON schema.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import msgspec.inspect

from nodeagent.config.accelerators import AcceleratorsConfig, AmdConfig, NvidiaConfig
from nodeagent.config.base import AT_START, DOMAIN, Absolute, Base, Seconds
from nodeagent.config.dra import DraConfig
from nodeagent.config.hugepages import HugepagesConfig
from nodeagent.config.isolation import PinningConfig
from nodeagent.config.network import NetworkConfig
from nodeagent.config.operation import (
    EventsConfig,
    HealthConfig,
    KubeletConfigConfig,
    LogConfig,
    MetricsConfig,
    PublishConfig,
    ReleaseConfig,
    StatusConfig,
)
from nodeagent.config.resources import NvmeTargetConfig, ResourceConfig

API_VERSION, KIND = "nodeagent.dev/v1alpha1", "NodeAgentConfiguration"


class Config(Base, frozen=True):
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
    accelerators: AcceleratorsConfig = AcceleratorsConfig()
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
    def targets(self) -> list[NvmeTargetConfig]:
        """Return the NVMe targets on the network that are served."""
        return [target for one in self.served for target in one.targets]

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
