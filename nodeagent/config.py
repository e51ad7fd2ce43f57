"""The configuration: YAML, typed and strict. Reading it changes nothing; a bad one is refused whole.

Keys are written as Kubernetes writes its own (camelCase). An unknown key is refused with its path and the nearest known
key, a wrong value with its path and what is expected. `schema()` is the same as JSON schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from nodeagent import strict
from nodeagent.errors import ConfigError

API_VERSION, KIND = "nodeagent.dev/v1alpha1", "NodeAgentConfiguration"
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400 * 366)]
LARGEST_FILE_BYTES, MOST_VALUES = 256 << 10, 20_000
SMALLEST_PAGE_BYTES, LARGEST_PAGE_BYTES = 16 << 10, 16 << 30
"""Of hugepages, over all processors that Linux runs on."""
LONGEST_DOMAIN = 253
NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
DOMAIN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+$"
Name = Annotated[str, msgspec.Meta(pattern=NAME)]
DevPath = Annotated[str, msgspec.Meta(pattern=r"^/dev/[^\0]+$")]
Absolute = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$")]
Variable = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Text = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*$")]


class _Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Every part of the configuration is frozen, named and strict."""


class MountConfig(_Base, frozen=True):
    """A folder or file of the host that the container gets, beside the device."""

    host_path: Absolute
    container_path: Absolute
    read_only: bool = True


class UsbConfig(_Base, frozen=True):
    """USB devices by vendor and, where given, product (four hexadecimal digits) and serial number."""

    vendor: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{4}$")]
    product: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F]{4})?$")] = ""
    serial: str = ""


class CdiConfig(_Base, frozen=True):
    """CDI names to hand to the runtime: CLASS=VALUE, VALUE being a field or attribute of the device."""

    kind: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    name: str = "id"


class ResourceConfig(_Base, frozen=True):
    """One extended resource."""

    name: Name
    kind: Name
    serve: Literal["device-plugin", "dra", "both"] = "device-plugin"
    """Through which API pods get it."""
    match: dict[str, str] = {}
    """Shell patterns by field or attribute of a device, all of which have to match."""
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
    """Whether the container gets the device nodes themselves; false where CDI does all."""
    cdi: CdiConfig | None = None
    env: dict[Variable, Text] = {}
    mounts: list[MountConfig] = []


class DraConfig(_Base, frozen=True):
    """Dynamic Resource Allocation: how this node takes part, where any resource is served through it."""

    driver: Annotated[str, msgspec.Meta(pattern=DOMAIN, max_length=63)] = "nodeagent.dev"
    node_name: str = ""
    """The Node's name; "": $NODE_NAME, or else the host's name."""
    kubeconfig: str = ""
    """How to reach the API server; "": as a pod's service account."""
    cdi_dir: Absolute = "/var/run/cdi"
    unhealthy_effect: Literal["NoSchedule", "NoExecute"] = "NoSchedule"
    """The effect of the taint on a device that is not healthy."""
    spread_seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 10.0
    """The first look at the API server comes after a random part of this: many nodes may start in the same moment."""
    device_status: bool = True
    """Whether what was prepared is written to the claim's status.devices."""


class KubeletConfigConfig(_Base, frozen=True):
    """Where kubelet's own configuration lies, where its command line cannot say so."""

    file: Annotated[str, msgspec.Meta(pattern=r"^(/[^\0]*)?$")] = ""
    """"": as of --config; config.yaml in kubelet_dir where kubelet's command line cannot be seen."""
    drop_ins: Annotated[str, msgspec.Meta(pattern=r"^(/[^\0]*)?$")] = ""
    """A folder. "": as of --config-dir; /etc/kubernetes/kubelet.conf.d where kubelet's command line cannot be seen."""


class LogConfig(_Base, frozen=True):
    """What is logged, and how: `auto` is `console` on a terminal and `json` elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class StatusConfig(_Base, frozen=True):
    """Who may read the status socket."""

    group: str = ""
    """A group whose members may read; root always may."""


class ReleaseConfig(_Base, frozen=True):
    """How long a grant may be missing from kubelet's list before it is released."""

    poll_seconds: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 15.0
    """How often kubelet is asked what pods hold: the end of a pod changes no file that could be watched."""
    unconfirmed_seconds: Seconds = 60.0
    """Of a grant that was never listed: its pod may still be being admitted."""
    confirmed_seconds: Seconds = 5.0
    """Of a grant that was listed before, where the kernel or the runtime confirm that nothing of its pod runs."""
    unobserved_seconds: Seconds = 600.0
    """Where neither can confirm it."""


class HealthConfig(_Base, frozen=True):
    """How health is judged."""

    recover_seconds: Seconds = 30.0
    """How long all evidence must be good before what was unhealthy is healthy."""
    nvml_seconds: Seconds = 30.0
    """How often NVML is asked."""


class PinningConfig(_Base, frozen=True):
    """How containers are confined to what they hold, and all others kept off it."""

    mode: Literal["auto", "nri", "cgroup", "off"] = "auto"
    """auto: through the runtime (NRI) where its socket is there, by control groups alone elsewhere."""
    nri_socket: Absolute = "/var/run/nri/nri.sock"
    nri_index: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{2}$")] = "90"
    """The agent's place among the runtime's plugins."""
    on_failure: Literal["refuse", "warn"] = "refuse"
    """A container that cannot be confined to what it holds: it is not started, or started and said."""
    memory: Literal["granted", "local"] = "granted"
    """Whose NUMA nodes a container's memory is bound to: those of pages and memory that it holds; local: where it holds
    neither, those of its CPUs."""
    strict_reservation: bool = True
    """Whether containers without CPUs of their own are kept off the reserved CPUs too."""
    verify_seconds: Seconds = 30.0
    """How often everything is read back without any event."""
    cgroup_root: Absolute = "/"
    """Kubelet's cgroupRoot."""
    partition: Literal["none", "root", "isolated"] = "none"
    """Whether a container with exclusive CPUs becomes a cpuset partition."""
    move_interrupts: bool = False
    """Whether interrupts are moved away from exclusive CPUs."""
    intruders_seconds: Seconds = 60.0
    """How often threads of the host and interrupts on exclusive CPUs are looked for."""


class HugepagesConfig(_Base, frozen=True):
    """A pool of hugepages that the agent provides on one NUMA node."""

    page_size: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,8}(Ki|Mi|Gi)$")]
    node: Annotated[int, msgspec.Meta(ge=0)]
    pages: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The pool is made at least so large at the start, and kept so."""
    max_pages: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How far the pool may grow when a claim needs more; 0: not at all."""


class Config(_Base, frozen=True):
    """The whole configuration; everything has a default."""

    api_version: Literal["nodeagent.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["NodeAgentConfiguration"] = KIND  # type: ignore[assignment]
    kubelet_dir: Absolute = "/var/lib/kubelet"
    kubelet_config: KubeletConfigConfig = KubeletConfigConfig()
    state_dir: Absolute = "/var/lib/nodeagent"
    runtime_dir: Absolute = "/run/nodeagent"
    domain: Annotated[str, msgspec.Meta(pattern=DOMAIN)] = "nodeagent.dev"
    reserved_cpus: str | None = None
    """CPUs that are never granted; null: kubelet's reservedSystemCPUs, or else the first core."""
    resources: list[ResourceConfig] | None = None
    """null: DEFAULT_RESOURCES."""
    resync_seconds: Seconds = 60.0
    audit_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 30
    log: LogConfig = LogConfig()
    status: StatusConfig = StatusConfig()
    release: ReleaseConfig = ReleaseConfig()
    health: HealthConfig = HealthConfig()
    dra: DraConfig = DraConfig()
    pinning: PinningConfig = PinningConfig()
    hugepages: list[HugepagesConfig] = []
    """Pools to provide; those that are not named are left alone."""

    @property
    def served(self) -> list[ResourceConfig]:
        return list(DEFAULT_RESOURCES) if self.resources is None else self.resources

    @property
    def served_by_dra(self) -> list[ResourceConfig]:
        return [one for one in self.served if one.serve != "device-plugin"]


DEFAULT_RESOURCES = (
    ResourceConfig(name="cpu", kind="cpu"),
    ResourceConfig(name="gpu", kind="gpu"),
    ResourceConfig(name="vf", kind="nic", match={"sriov": "vf"}),
    ResourceConfig(name="fuse", kind="char", paths=["/dev/fuse"], replicas=100),
    ResourceConfig(name="kvm", kind="char", paths=["/dev/kvm"], replicas=100),
)
"""What needs no preparation and takes nothing from the host or from kubelet's own managers: no hugepages (kubelet
counts the same pools), no physical function and no disk (the host may be using it)."""


def parse(text: str | bytes, *, source: str) -> Config:
    """Read a configuration; ConfigError names the source, the path of the key and what is expected."""
    found = _read_yaml(text, source)
    for path, key, known in _unknown(found, schema(), "$"):
        raise ConfigError(f"cannot use {source}: unknown key {path}; {strict.hint(key, sorted(known))}")
    try:
        config = msgspec.convert(found, Config)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise ConfigError(f"cannot use {source}: {error}{strict.found(found, str(error))}") from None
    for wrong in _wrong(config):
        raise ConfigError(f"cannot use {source}: {wrong}")
    return config


def load(path: Path) -> Config:
    """Read a configuration file."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return parse(text, source=str(path))


def schema() -> dict[str, Any]:
    """The configuration as JSON schema."""
    return msgspec.json.schema(Config)


def differences(old: Config, new: Config) -> list[str]:
    """What another configuration changes, one line a key, as PATH: OLD -> NEW."""
    return sorted(_differences(msgspec.to_builtins(old), msgspec.to_builtins(new), ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML as it is meant here: a key that stands twice is a mistake, not a choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _read_yaml(text: str | bytes, source: str) -> dict[Any, Any]:
    """A mapping of limited size: a file of a few lines can name itself a billion times."""
    if len(text) > LARGEST_FILE_BYTES:
        raise ConfigError(f"cannot read {source}: it has more than {LARGEST_FILE_BYTES} bytes")
    try:
        found = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read {source}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"cannot read {source}: it is nested too deeply") from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise ConfigError(f"cannot read {source}: {type(found).__name__} at the top, expected a mapping")
    _limit(found, source)
    return found


def _limit(found: Any, source: str) -> None:
    waiting, count = [found], 0
    while waiting:
        one, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise ConfigError(f"cannot read {source}: it has more than {MOST_VALUES} values, aliases counted each time")
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()


# ---------------------------------------------------------------- what types alone do not say

_MEANT_FOR = {
    "paths": ("char",),
    "usb": ("usb",),
    "pageSize": ("hugepages",),
    "pagesPerBlock": ("hugepages",),
    "options": ("cpu",),
    "numa": ("cpu",),
    "grouping": ("cpu",),
}
_ONLY_DEVICES = ("match", "replicas", "deviceNodes", "cdi")
"""Keys that mean nothing where there is no device, only CPUs or pages."""
_NEEDED = {
    "char": ("paths", "globs such as /dev/ttyUSB*"),
    "usb": ("usb", "vendor and product"),
}


def _wrong(config: Config) -> Iterator[str]:
    """What is wrong, one sentence each."""
    yield from _wrong_domain(config.domain)
    names: set[str] = set()
    for i, one in enumerate(config.served):
        where = f"$.resources[{i}]"
        if one.name in names:
            yield f"name {one.name!r} at {where}.name stands twice"
        names.add(one.name)
        yield from _misplaced(one, where)
        yield from _missing(one, where)
        yield from (f"{path!r} at {where}.paths leads out of /dev" for path in one.paths if ".." in path.split("/"))
    yield from _wrong_dra(config)
    yield from _wrong_pages(config.hugepages)


def _wrong_pages(pools: list[HugepagesConfig]) -> Iterator[str]:
    """Sizes that no processor has, pools that stand twice, limits below what is wanted anyway."""
    seen: dict[tuple[int, int], int] = {}
    for i, one in enumerate(pools):
        where = f"$.hugepages[{i}]"
        page_bytes = int(one.page_size[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[one.page_size[-2:]]
        if page_bytes & (page_bytes - 1) or not SMALLEST_PAGE_BYTES <= page_bytes <= LARGEST_PAGE_BYTES:
            yield f"{one.page_size!r} at {where}.pageSize, expected a size that pages have, such as 2Mi or 1Gi"
        first = seen.setdefault((one.node, page_bytes), i)
        if first != i:
            yield f"{one.page_size!r} on node {one.node} at {where} stands twice, first at $.hugepages[{first}]"
        if 0 < one.max_pages < one.pages:
            yield f"{one.max_pages} at {where}.maxPages, expected at least the {one.pages} of pages, or 0"


def _wrong_dra(config: Config) -> Iterator[str]:
    """One pool a kind: CPUs have one form in it, and its name is part of a DNS name."""
    kinds = [one.kind for one in config.served_by_dra]
    for kind in ("cpu", "memory"):
        if kinds.count(kind) > 1:
            yield f"kind {kind} at $.resources is served through DRA {kinds.count(kind)} times, expected once"
    for kind in kinds:
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", kind):
            yield f"kind {kind!r} at $.resources cannot name a pool: expected lower-case letters, digits and '-'"


def _wrong_domain(domain: str) -> Iterator[str]:
    if len(domain) > LONGEST_DOMAIN:
        yield f"{len(domain)} characters at $.domain, expected at most {LONGEST_DOMAIN}"
    if domain == "kubernetes.io" or domain.endswith(".kubernetes.io") or domain.startswith("requests."):
        yield f"{domain!r} at $.domain belongs to Kubernetes itself, expected a domain of your own"


def _misplaced(one: ResourceConfig, where: str) -> Iterator[str]:
    """Keys that say something although their kind has no use for them."""
    said = msgspec.to_builtins(one)
    silent = msgspec.to_builtins(ResourceConfig(name=one.name, kind=one.kind))
    for key in (key for key in said if said[key] != silent[key]):
        kinds = _MEANT_FOR.get(key, (one.kind,))
        if one.kind not in kinds:
            yield f"{where}.{key} has no meaning for kind {one.kind}, only for {', '.join(kinds)}"
        if key in _ONLY_DEVICES and one.kind in ("cpu", "hugepages", "memory"):
            yield f"{where}.{key} has no meaning for kind {one.kind}, only for devices"


def _missing(one: ResourceConfig, where: str) -> Iterator[str]:
    if one.kind == "memory" and one.serve != "dra":
        yield f"{one.serve!r} at {where}.serve, expected 'dra': the device plugin API cannot count memory"
    if one.kind == "hugepages" and not re.fullmatch(r"[1-9][0-9]{0,8}(Ki|Mi|Gi)", one.page_size):
        yield f"{one.page_size!r} at {where}.pageSize, expected a size such as 2Mi"
    key, expected = _NEEDED.get(one.kind, ("", ""))
    if key and not getattr(one, key):
        yield f"nothing at {where}.{key}, expected {expected}"


# ---------------------------------------------------------------- unknown keys


def _unknown(found: Any, form: Mapping[str, Any], path: str, root: Any = None) -> Iterator[tuple[str, str, list[str]]]:
    """Keys that the schema does not have: (path, key, keys known there)."""
    root = form if root is None else root
    for option in _forms(form, root):
        if isinstance(found, dict) and "properties" in option:
            known = option["properties"]
            for key, value in found.items():
                if key not in known:
                    yield f"{path}.{key}", str(key), list(known)
                else:
                    yield from _unknown(value, known[key], f"{path}.{key}", root)
        if isinstance(found, list) and "items" in option:
            for i, value in enumerate(found):
                yield from _unknown(value, option["items"], f"{path}[{i}]", root)


def _forms(form: Mapping[str, Any], root: Any) -> Iterator[Mapping[str, Any]]:
    """A form with its references and alternatives followed."""
    if "$ref" in form:
        yield from _forms(root["$defs"][form["$ref"].rpartition("/")[2]], root)
    for option in form.get("anyOf", ()):
        yield from _forms(option, root)
    yield form
