"""A claim's opaque configuration for one of its devices, decoded strictly.

For each device the last matching configuration applies as a whole, the claim's overriding the class's, in the order in
which Kubernetes lists them. Nothing is merged field by field, so that the effective configuration can be read in one
place. A configuration without requests applies to the devices of its kind. A claim's configuration that names a request
whose device is of another kind, or that fits none of its devices, is an error. One of a class is not: a class may cover
several kinds and has no other way to configure each.

A third-party kind may have a configuration of its own: a Struct whose name is the configuration's kind (docs/kinds.md).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from nodeagent.config import hints
from nodeagent.core.model.claim import FROM_CLAIM, FROM_CLASS, Opaque, Result
from nodeagent.core.model.options import check_options
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.core.network.interface import Interface, Route
from nodeagent.core.network.vf_properties import VfForm, VfProperties, with_address
from nodeagent.errors import InputError

API_VERSION = "nodeagent.dev/v1alpha1"
OWN_VARIABLES = "NODEAGENT_"
"""Prefix of the variables that describe what was granted; no configuration may set them."""
KERNEL_FOLDERS = ("/proc", "/sys")
_NO_INTERFACES = ("lo", "all", "default")
"""The loopback interface, and two folders below /proc/sys/net that stand for every interface."""
LEAST_BPS, MOST_BPS = 2, 10**15
"""Limits of I/O, in bytes per second. Older kernels do not take 1 (tg_set_limit in block/blk-throttle.c)."""


class OpaqueConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The effective configuration of one device. For fields that are empty the node's own configuration applies."""

    options: frozenset[str] = frozenset()
    """Names from core.model.options, including those for the core type."""
    numa: str = ""
    """Request.numa."""
    mount_path: str = ""
    """Where a hugetlbfs of the granted page size is mounted in the container."""
    time_slice: str = ""
    """Default, Short, Medium or Long: how long a container may use a shared GPU before it is the next one's turn."""
    mps: bool = False
    """True if the GPU is shared through NVIDIA's Multi-Process Service."""
    mps_threads_percent: int | None = None
    mps_pinned_bytes: int | None = None
    driver_capabilities: frozenset[str] = frozenset()
    """What a container gets of NVIDIA's driver in addition to what computing needs: graphics, video."""
    driver: str = ""
    """A VFIO driver that the device is bound to while the claim is prepared: for a virtual machine."""
    rdma: bool | None = None
    """Whether a container gets an adapter's RDMA device nodes."""
    interface: Interface | None = None
    """What an adapter's interface is in the pod that it is moved into; None leaves it on the host."""
    vf: VfProperties | None = None
    """What a virtual function is set to on its physical one; None leaves it as it is."""
    cache_ways: int | None = None
    """How many ways of their L3 caches the CPUs have for themselves."""
    cache_class: str = ""
    """The shared class of pinning.resctrl that its containers are in."""
    memory_bandwidth_percent: int | None = None
    memory_bandwidth_mbps: int | None = None
    """In 10^6 bytes per second, for each L3 cache."""
    io_read_bps: int | None = None
    """Limit of I/O on each of the device's disks, in bytes per second."""
    io_write_bps: int | None = None
    io_read_iops: int | None = None
    """In operations per second."""
    io_write_iops: int | None = None
    io_weight: int | None = None
    io_latency_us: int | None = None
    io_class: str = ""
    """The class of pinning.io, instead of these."""
    env: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    own: Mapping[str, Any] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """What a third-party kind's own configuration says, in plain types."""


NO_SETTINGS = OpaqueConfig()


class Forms(msgspec.Struct, frozen=True):
    """The forms of configurations: the built-in ones, and those that third-party kinds bring."""

    own: Mapping[str, type[msgspec.Struct]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """By kind of device. Their names are distinct."""

    def expected(self, kind: str) -> tuple[str, ...]:
        """Return the configuration's kinds for devices of a kind."""
        if kind in self.own:
            return (self.own[kind].__name__,)
        one = CONFIG_KINDS.get(kind, "DeviceConfig")
        return (one, "DeviceConfig") if one == "BlockConfig" else (one,)

    def by_name(self) -> Mapping[str, type[msgspec.Struct]]:
        """Return all forms by the configuration's kind."""
        return {**{form.__name__: form for form in self.own.values()}, **FORMS}


BUILT_IN = Forms()


def settings_for(
    result: Result, kind: str, configs: Sequence[Opaque], driver: str, forms: Forms = BUILT_IN
) -> OpaqueConfig:
    """Return the effective configuration of one allocated device of a kind.

    Raise InputError naming the configuration, path and value that are wrong.
    """
    expected = forms.expected(kind)
    found: dict[str, OpaqueConfig] = {}
    for where, config in _ours(configs, driver):
        if not _covers(config.requests, result.request):
            continue
        said, settings = _decode(config.parameters, where, forms)
        if said in expected:
            found[config.source] = settings
        elif config.source == FROM_CLAIM and result.request in config.requests:
            raise InputError(
                f'cannot use {where}: {said} is for request "{result.request}", which got device '
                f'"{result.device}" of kind {kind}, expected {" or ".join(expected)}'
            )
    if not found and kind in forms.own:
        read_own(NO_SETTINGS, forms.own[kind])
    return found.get(FROM_CLAIM, found.get(FROM_CLASS, NO_SETTINGS))


def read_own(settings: OpaqueConfig, form: type[msgspec.Struct]) -> msgspec.Struct:
    """Return a third-party kind's own configuration of a device, by default one without any key. Raise InputError if
    there has to be one, or if the kind reads it no longer."""
    try:
        return msgspec.json.decode(msgspec.json.encode(settings.own, enc_hook=dict), type=form)
    except Exception as error:  # whatever the third party's type raises
        raise InputError(f"cannot read the {form.__name__} of the claim: {error}") from None


def check_all(configs: Sequence[Opaque], driver: str, forms: Forms = BUILT_IN) -> None:
    """Raise InputError for the first invalid configuration of this driver, whether it applies to a device or not."""
    for where, config in _ours(configs, driver):
        _decode(config.parameters, where, forms)


def check_fit(configs: Sequence[Opaque], driver: str, kinds: Mapping[str, str], forms: Forms = BUILT_IN) -> None:
    """Raise InputError for the first valid configuration of the claim that is of a kind that none of its devices has.

    kinds: the kind of device of each request that this driver satisfies. The scheduler of Kubernetes 1.37 and later
    removes the requests from a configuration that names all of the claim, so the absence of requests does not show that
    the user named none (dynamic-resource-allocation, structured allocators).
    """
    for where, config in _ours(configs, driver):
        fit = {form for one, kind in kinds.items() if _covers(config.requests, one) for form in forms.expected(kind)}
        said = config.parameters["kind"]
        if config.source == FROM_CLAIM and fit and said not in fit:
            raise InputError(
                f"cannot use {where}: {said} fits no device of the claim, expected {', '.join(sorted(fit))}"
            )


def to_json(settings: OpaqueConfig) -> str:
    """Return the settings that are not empty, in a fixed order, or "" if there are none."""
    every = msgspec.structs.asdict(settings)
    said = {name: value for name, value in every.items() if value != getattr(NO_SETTINGS, name)}
    return msgspec.json.encode(said, order="deterministic", enc_hook=dict).decode() if said else ""


def from_json(text: str) -> OpaqueConfig:
    """Read what `to_json` wrote. Raise InputError if the text is anything else."""
    try:
        found = msgspec.json.decode(text or "{}", type=dict[str, Any])
        settings = msgspec.convert(found, OpaqueConfig)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InputError(f"cannot read settings {text[:60]!r}: {error}") from None
    for key in sorted(found.keys() - set(OpaqueConfig.__struct_fields__)):
        raise InputError(f"cannot read settings {text[:60]!r}: unknown key {key}")
    own = MappingProxyType(dict(settings.own))
    return replace(settings, env=MappingProxyType(dict(settings.env)), own=own)


def _ours(configs: Sequence[Opaque], driver: str) -> Iterator[tuple[str, Opaque]]:
    """Yield the configurations for this driver, each with its name in error messages."""
    for i, config in enumerate(configs):
        if config.driver != driver:
            continue
        if config.source not in (FROM_CLASS, FROM_CLAIM):
            raise InputError(
                f"cannot use config[{i}]: {config.source!r} at source, expected {FROM_CLASS}, {FROM_CLAIM}"
            )
        yield f"config[{i}] ({config.source})", config


def _covers(requests: Sequence[str], request: str) -> bool:
    """Return whether a configuration is for a request: "r" includes "r/subrequest", and no names mean all requests."""
    return not requests or request in requests or request.partition("/")[0] in requests


# ---------------------------------------------------------------- forms

_Percent = Annotated[int, msgspec.Meta(ge=1, le=100)]
_Ways = Annotated[int, msgspec.Meta(ge=1, le=32)]
_Mbps = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Class = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?)?$")]
_Bytes = Annotated[int, msgspec.Meta(ge=2, le=MOST_BPS)] | str
_Operations = Annotated[int, msgspec.Meta(ge=2, le=1_000_000_000)]
_Weight = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
_Microseconds = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$", max_length=1024)]
_VfioDriver = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9_-]{0,48}vfio[_-]pci)?$")]
_InterfaceName = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,14})?$")]
_Mtu = Annotated[int, msgspec.Meta(ge=68, le=65535)]
"""RFC 791 for IPv4; 16 bits in the headers. The driver knows its own limits."""
_HardwareAddress = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5})?$")]
"""Of one adapter: the lowest bit of the first byte is that of groups."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@contextlib.contextmanager
def _at(path: str) -> Iterator[None]:
    """Append the path to an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} at {path}") from None


class _Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """The keys allowed in a configuration of one kind, in addition to apiVersion and kind."""

    def settings(self) -> OpaqueConfig:
        """Return the settings. Raise InputError with the path for anything that the types alone do not check."""
        return NO_SETTINGS


class _Cpu(_Form, frozen=True):
    options: tuple[str, ...] = ()
    numa: Literal["single", "restricted", "best-effort", ""] = ""
    core_type: Literal["performance", "efficiency", ""] = ""
    cache_ways: _Ways | None = None
    cache_class: _Class = ""
    memory_bandwidth_percent: _Percent | None = None
    memory_bandwidth_mbps: _Mbps | None = msgspec.field(default=None, name="memoryBandwidthMBps")

    def settings(self) -> OpaqueConfig:
        core = (f"require-{self.core_type}-cores",) if self.core_type else ()
        own = self.cache_ways, self.memory_bandwidth_percent, self.memory_bandwidth_mbps
        if self.cache_class and any(one is not None for one in own):
            raise InputError("$.cacheClass excludes $.cacheWays, $.memoryBandwidthPercent and $.memoryBandwidthMBps")
        with _at("$.options"):
            options = check_options((*self.options, *core))
        return OpaqueConfig(
            options=options,
            numa=self.numa,
            cache_ways=self.cache_ways,
            cache_class=self.cache_class,
            memory_bandwidth_percent=self.memory_bandwidth_percent,
            memory_bandwidth_mbps=self.memory_bandwidth_mbps,
        )


class _Hugepage(_Form, frozen=True):
    mount_path: _Path | None = None

    def settings(self) -> OpaqueConfig:
        if self.mount_path is None:
            return NO_SETTINGS
        parts = [part for part in self.mount_path.split("/") if part]
        if not parts or {".", ".."} & {*parts}:
            raise InputError(f"{self.mount_path!r} at $.mountPath, expected the path of a folder, without . and ..")
        if f"/{parts[0]}" in KERNEL_FOLDERS or parts == ["dev"]:
            raise InputError(f"{self.mount_path!r} at $.mountPath would hide the kernel's own files")
        return OpaqueConfig(mount_path="/" + "/".join(parts))


class _Memory(_Form, frozen=True):
    """Memory has no settings yet."""


class _TimeSlicing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    interval: Literal["Default", "Short", "Medium", "Long"] = "Default"


class _Mps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    active_thread_percentage: _Percent | None = None
    pinned_device_memory_limit: str | None = None

    def pinned_bytes(self) -> int | None:
        if self.pinned_device_memory_limit is None:
            return None
        with _at("$.mps.pinnedDeviceMemoryLimit"):
            size = parse_quantity(self.pinned_device_memory_limit)
            if not size:
                raise InputError("a limit of nothing")
            return size


class _Gpu(_Form, frozen=True):
    driver: _VfioDriver = ""
    time_slicing: _TimeSlicing | None = None
    mps: _Mps | None = None
    driver_capabilities: tuple[Literal["graphics", "video"], ...] = ()

    def settings(self) -> OpaqueConfig:
        found = replace(self._sharing(), driver_capabilities=frozenset(self.driver_capabilities))
        if self.driver and found != NO_SETTINGS:
            raise InputError("$.driver excludes all other keys: a guest brings a driver of its own")
        return replace(found, driver=self.driver)

    def _sharing(self) -> OpaqueConfig:
        if self.mps is None:
            return OpaqueConfig(time_slice=self.time_slicing.interval if self.time_slicing is not None else "")
        if self.time_slicing is not None:
            raise InputError("$.timeSlicing and $.mps exclude each other")
        percent, size = self.mps.active_thread_percentage, self.mps.pinned_bytes()
        return OpaqueConfig(mps=True, mps_threads_percent=percent, mps_pinned_bytes=size)


class _Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    destination: str
    gateway: str = ""


class _Interface(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    name: _InterfaceName = ""
    addresses: tuple[str, ...] = ()
    routes: tuple[_Route, ...] = ()
    mtu: _Mtu | None = None
    hardware_address: _HardwareAddress = ""

    def asked(self) -> Interface:
        """Return it in canonical form."""
        from nodeagent.core.network.addresses import checked

        if self.name in _NO_INTERFACES:
            raise InputError(f"{self.name!r} at $.interface.name stands for others in every namespace")
        routes = tuple(Route(destination=one.destination, gateway=one.gateway) for one in self.routes)
        return checked(
            Interface(
                name=self.name,
                addresses=self.addresses,
                routes=routes,
                mtu=self.mtu,
                hardware_address=self.hardware_address,
            )
        )


class _Nic(_Form, frozen=True):
    driver: _VfioDriver = ""
    rdma: bool | None = None
    interface: _Interface | None = None
    vf: VfForm | None = None

    def settings(self) -> OpaqueConfig:
        for key, found in (("rdma", self.rdma), ("interface", self.interface)):
            if self.driver and found is not None:
                raise InputError(f"$.driver and $.{key} exclude each other")
        interface = self.interface.asked() if self.interface is not None else None
        vf = self.vf.asked() if self.vf is not None else None
        if interface is not None and vf is not None:
            interface = with_address(interface, vf)
        return OpaqueConfig(rdma=self.rdma, driver=self.driver, interface=interface, vf=vf)


class _Device(_Form, frozen=True):
    """The form of every kind without a specific form."""

    env: dict[str, Any] = {}

    def settings(self) -> OpaqueConfig:
        for name, value in self.env.items():
            if not (_VARIABLE.fullmatch(name) and isinstance(value, str) and "\0" not in value):
                raise InputError(f"{name}: {hints.shown(value)} at $.env, expected the name of a variable and a text")
            if name.startswith(OWN_VARIABLES):
                raise InputError(f"{name} at $.env: variables that start with {OWN_VARIABLES} say what was granted")
        return OpaqueConfig(env=MappingProxyType(dict(self.env)))


class _Block(_Device, frozen=True):
    """Disks: what any device has, and limits of I/O."""

    read_bytes_per_second: _Bytes | None = None
    write_bytes_per_second: _Bytes | None = None
    read_iops: _Operations | None = msgspec.field(default=None, name="readIOPS")
    write_iops: _Operations | None = msgspec.field(default=None, name="writeIOPS")
    weight: _Weight | None = None
    latency_target_microseconds: _Microseconds | None = None
    io_class: _Class = ""

    def settings(self) -> OpaqueConfig:
        rates = {
            "io_read_bps": bytes_per_second(self.read_bytes_per_second, "$.readBytesPerSecond"),
            "io_write_bps": bytes_per_second(self.write_bytes_per_second, "$.writeBytesPerSecond"),
            "io_read_iops": self.read_iops,
            "io_write_iops": self.write_iops,
            "io_weight": self.weight,
            "io_latency_us": self.latency_target_microseconds,
        }
        if self.io_class and any(one is not None for one in rates.values()):
            raise InputError("$.ioClass excludes all limits: they are those of the class")
        return replace(super().settings(), **rates, io_class=self.io_class)


def bytes_per_second(said: int | str | None, path: str) -> int | None:
    """Return a rate that is a number or a quantity such as "100Mi". Raise InputError with its path."""
    if not isinstance(said, str):
        return said
    with _at(path):
        rate = parse_quantity(said)
        if not LEAST_BPS <= rate <= MOST_BPS:
            raise InputError(f"{said[:40]!r} is not {LEAST_BPS} to {MOST_BPS} bytes per second")
    return rate


FORMS: Mapping[str, type[_Form]] = MappingProxyType(
    {
        "CpuConfig": _Cpu,
        "HugepageConfig": _Hugepage,
        "MemoryConfig": _Memory,
        "GpuConfig": _Gpu,
        "NicConfig": _Nic,
        "BlockConfig": _Block,
        "DeviceConfig": _Device,
    }
)
"""Form by the configuration's kind."""
CONFIG_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "CpuConfig",
        "hugepages": "HugepageConfig",
        "memory": "MemoryConfig",
        "gpu": "GpuConfig",
        "nic": "NicConfig",
        "block": "BlockConfig",
        "nvme": "BlockConfig",
    }
)
"""The configuration's kind by kind of device; all others use DeviceConfig, which disks take too."""


# ---------------------------------------------------------------- strict decoding


def _decode(parameters: Mapping[str, Any], where: str, forms: Forms) -> tuple[str, OpaqueConfig]:
    """Return the configuration's kind, and what it says."""
    said = dict(parameters)
    version, kind = said.pop("apiVersion", None), said.pop("kind", None)
    if version != API_VERSION:
        raise InputError(f"cannot use {where}: {hints.shown(version)} at $.apiVersion, expected {API_VERSION!r}")
    every = forms.by_name()
    form = every.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise InputError(f"cannot use {where}: {hints.shown(kind)} at $.kind; {hints.hint(str(kind), list(every))}")
    for path, key, known in _unknown(said, form, "$"):
        raise InputError(f"cannot use {where}: {kind} has no key {path}; {hints.hint(key, known)}")
    try:
        return str(kind), _settings(msgspec.convert(said, form))
    except msgspec.ValidationError as error:
        value = hints.found(said, str(error), hints.steps(str(error)))
        raise InputError(f"cannot use {where}: {kind}: {error}{value}") from None
    except InputError as error:
        raise InputError(f"cannot use {where}: {kind}: {error}") from None
    except Exception as error:  # whatever a third party's type raises
        raise InputError(f"cannot use {where}: {kind}: {type(error).__name__}: {error}") from None


def _settings(found: msgspec.Struct) -> OpaqueConfig:
    if isinstance(found, _Form):
        return found.settings()
    return OpaqueConfig(own=MappingProxyType(msgspec.json.decode(msgspec.json.encode(found))))


def _unknown(said: Mapping[str, Any], form: type[msgspec.Struct], path: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the keys that a form does not have: (path, key, known keys at that place)."""
    known = {one.encode_name: one.type for one in msgspec.structs.fields(form)}
    for key, value in said.items():
        if key in known:
            for one in (known[key], *get_args(known[key])):
                if isinstance(one, type) and issubclass(one, msgspec.Struct):
                    yield from _unknown_below(value, one, f"{path}.{key}")
        else:
            yield f"{path}.{key}", str(key), list(known)


def _unknown_below(value: object, form: type[msgspec.Struct], path: str) -> Iterator[tuple[str, str, list[str]]]:
    if isinstance(value, Mapping):
        yield from _unknown(value, form, path)
    for i, one in enumerate(value if isinstance(value, list) else ()):
        yield from _unknown_below(one, form, f"{path}[{i}]")
