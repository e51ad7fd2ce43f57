"""The configuration of the agent's own operation: kubelet's files, logs, metrics, events, release, health."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import AT_START, AbsoluteOrEmpty, Base, Seconds


class KubeletConfigConfig(Base, frozen=True):
    """Where kubelet's own configuration is, if its command line cannot show it."""

    file: AbsoluteOrEmpty = ""
    """Empty: as in --config; config.yaml in kubelet_dir if kubelet's command line is not visible."""
    drop_ins: AbsoluteOrEmpty = ""
    """A folder. Empty: as in --config-dir; /etc/kubernetes/kubelet.conf.d if kubelet's command line is not visible."""


class LogConfig(Base, frozen=True):
    """What is logged, and how: `auto` is `console` on a terminal and `json` elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class StatusConfig(Base, frozen=True):
    """Who may read the status socket."""

    group: Annotated[str, AT_START] = ""
    """A group whose members may read it; root always may."""


class MetricsTlsConfig(Base, frozen=True):
    """How the metrics are secured; files are read again when they change."""

    cert_file: AbsoluteOrEmpty = ""
    """The server's certificate and those between it and its authority (PEM). Empty: no TLS."""
    key_file: AbsoluteOrEmpty = ""
    client_ca_file: AbsoluteOrEmpty = ""
    """Authorities of clients. Empty: clients need no certificate."""


class MetricsConfig(Base, frozen=True):
    """Where the metrics are served in addition to the status socket, and to whom."""

    listen: str = ""
    """ADDRESS:PORT (TCP). Empty: only on the status socket."""
    token_file: AbsoluteOrEmpty = ""
    """A file with the token that scrapers must present; read again when it changes. Empty: none is needed."""
    tls: MetricsTlsConfig = MetricsTlsConfig()


class EventsConfig(Base, frozen=True):
    """Kubernetes Events on pods and the Node."""

    enabled: bool = True
    """Whether Events are written where there is an API server."""


class PublishConfig(Base, frozen=True):
    """What the API server is told of the machine for others, in addition to ResourceSlices."""

    node_labels: bool = False
    """Whether the Node has labels about its machine."""
    node_resource_topology: bool = False
    """Whether there is a NodeResourceTopology (topology.node.k8s.io/v1alpha2) of the node."""


class ReleaseConfig(Base, frozen=True):
    """How long a grant may be missing from kubelet's list before it is released."""

    poll_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 15.0
    """How often kubelet is asked what pods hold: the end of a pod changes no file that could be watched."""
    unconfirmed_seconds: Seconds = 60.0
    """For a grant that was never listed: its pod may still be in admission."""
    confirmed_seconds: Seconds = 5.0
    """For a grant that was listed before, if the kernel or the runtime confirms that nothing of its pod runs."""
    unobserved_seconds: Seconds = 600.0
    """For a grant where neither can confirm that."""


class HealthConfig(Base, frozen=True):
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
