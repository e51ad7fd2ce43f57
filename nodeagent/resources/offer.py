"""One configured resource: what it advertises, and what a container gets that is granted some of it."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.config.accelerators import DsaConfig
from nodeagent.config.resources import CdiConfig, NvmeTargetConfig, ResourceConfig
from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.devices import DeviceResource, has_field, patterns_of
from nodeagent.core.deviceplugin.view import CpuResource, HugepageResource, ResourceKind
from nodeagent.core.dsa.division import Queue, Rule
from nodeagent.core.fabrics.target import Port
from nodeagent.core.model.cpuset import CpuSet, union
from nodeagent.core.model.device import ContainerEdits, Device, DeviceNode, Mount
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.options import check_options
from nodeagent.core.model.quantity import format_size, parse_size
from nodeagent.core.model.topology import NodeId
from nodeagent.core.network.variables import NO_INFO, TUN, VHOST_NET, pci_variables
from nodeagent.core.pinning.threads import used_cpus
from nodeagent.core.placement.linked import SIZES
from nodeagent.core.sharing import amounts as gpu_amounts
from nodeagent.core.sharing.mps import enforcement
from nodeagent.errors import ConfigError, HostError, InputError
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.all_kinds import CharSelector, DsaSelector, PartitionSelector, TargetSelector, UsbSelector
from nodeagent.host.devices.base import BLOCK_TYPES
from nodeagent.host.devices.hooks import prepares
from nodeagent.host.driver_root.render import AUTO, OFF, with_driver
from nodeagent.host.snapshot import Selectors

CPU, HUGEPAGES, MEMORY = "cpu", "hugepages", "memory"
_VHOST_NODES = tuple(DeviceNode(host_path=path, container_path=path) for path in (VHOST_NET, TUN))


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A resource and the kind of devices behind it (None for CPUs and hugepages)."""

    config: ResourceConfig
    resource: ResourceKind
    family: all_kinds.Kind | None = None
    driver_files: str = AUTO
    """NvidiaConfig.driver_files."""

    @property
    def name(self) -> str:
        """Return the full name of the extended resource."""
        return self.resource.name

    def edits(self, inventory: Inventory, grant: Grant) -> ContainerEdits:
        """Return what the container of a grant gets."""
        devices = [inventory.device_by_id[one] for one in (*grant.devices, *grant.shares)]
        own = self._edits(inventory, devices, devices)
        said = {f"NODEAGENT_{_word(self.config.name)}_GRANT": grant.id, **held_variables(inventory, [grant])}
        return replace(own, env=MappingProxyType({**own.env, **said, **self.config.env}))

    def device_edits(
        self,
        inventory: Inventory,
        device: Device,
        same_request: Sequence[Device],
        capabilities: Iterable[str] = (),
        *,
        rdma: bool = True,
    ) -> ContainerEdits:
        """Return what the container of a claim's device gets.

        same_request: all devices of the same kind that it gets, including this one. capabilities: what it gets of
        NVIDIA's driver in addition to the configured ones. rdma: whether it gets the nodes of RDMA.
        """
        own = self._edits(inventory, [device], same_request, capabilities, rdma=rdma)
        if not rdma:
            own = replace(own, device_nodes=tuple(n for n in own.device_nodes if "/infiniband/" not in n.host_path))
        return replace(own, env=MappingProxyType({**own.env, **self.config.env}))

    def _edits(
        self,
        inventory: Inventory,
        devices: Sequence[Device],
        same_request: Sequence[Device],
        capabilities: Iterable[str] = (),
        *,
        rdma: bool = True,
    ) -> ContainerEdits:
        _refuse_unmade(devices)
        if self.config.device_nodes:
            _refuse_without_nodes(devices)
        own = (
            all_kinds.edits(self.family, devices, same_request)
            if self.family is not None and devices
            else ContainerEdits()
        )
        if self.config.device_nodes and self.config.cdi is None:
            uses = {*self.config.driver_capabilities, *capabilities}
            driver, mode = inventory.nvidia_driver, self.driver_files
            own = with_driver(own, driver, devices, same_request, uses=uses, mode=mode)
        nodes = (*own.device_nodes, *_VHOST_NODES) if self.config.vhost_net else own.device_nodes
        return ContainerEdits(
            env=MappingProxyType({**own.env, **self._pci_variables(same_request, rdma=rdma)}),
            device_nodes=nodes if self.config.device_nodes else (),
            mounts=(*own.mounts, *_mounts(self.config)),
            annotations=own.annotations,
            cdi_devices=(*own.cdi_devices, *_cdi_names(self.config, devices)),
            hooks=own.hooks,
        )

    def _pci_variables(self, devices: Sequence[Device], *, rdma: bool) -> dict[str, str]:
        """Return the variables for those of some devices that this resource serves."""
        mine = [one for one in devices if isinstance(self.resource, DeviceResource) and self.resource.serves(one)]
        info = self.config.additional_info or NO_INFO
        return pci_variables(self.name, mine, info=info, vhost_net=self.config.vhost_net, rdma=rdma)

    @property
    def by_device_plugin(self) -> bool:
        """Return whether the resource is served through the device plugin."""
        return self.config.serve != "dra"

    def by_device_plugin_alone(self) -> Offer:
        """Return the same offer without its DRA settings."""
        plain = ResourceConfig(name=self.config.name, kind=self.config.kind)
        own = {"serve": plain.serve, "grouping": plain.grouping, "overhead": plain.overhead}
        return replace(self, config=msgspec.structs.replace(self.config, **own))

    @property
    def by_dra(self) -> bool:
        """Return whether the resource is served through DRA."""
        return self.config.serve != "device-plugin"


def offers(config: Config, families: Sequence[all_kinds.Kind]) -> tuple[Offer, ...]:
    """Return the offers of a configuration, for either API. Raise ConfigError naming an unknown kind or option.

    Memory has no ids and is therefore not offered.
    """
    known = {family.name: family for family in families}
    return tuple(_offer(config, i, known) for i, one in enumerate(config.served) if one.kind != MEMORY)


def misspelt(offers: Iterable[Offer], inventory: Inventory) -> Iterator[str]:
    """Yield the keys of `match`, and values of `cdi.name`, that no device of this machine has, though it has devices of
    the kind: probably misspelt."""
    for offer in offers:
        kind, cdi = offer.resource.kind, offer.config.cdi
        if there := inventory.devices_by_kind.get(kind):
            named = {key: value for one in (offer.config.match, *offer.config.match_any) for key, value in one.items()}
            # A pattern that matches nothing at all is for devices without the attribute.
            named = {key: value for key, value in named.items() if "" not in patterns_of(value)}
            keys = [key for key in named if not any(has_field(one, key) for one in there)]
            unknown = [f"match names {key!r}" for key in keys]
            if cdi is not None and not any(_named_by(cdi, device) for device in there):
                unknown.append(f"cdi.name is {cdi.name!r}")
            yield from (f"{offer.name}: {what}, which no {kind} of this machine has" for what in unknown)


def selectors(config: Config) -> Selectors:
    """Return which character and USB devices a configuration asks to discover."""
    served = config.served
    return Selectors(
        char=tuple(CharSelector(name=one.name, globs=tuple(one.paths)) for one in served if one.kind == "char"),
        usb=tuple(
            UsbSelector(name=one.name, vendor=usb.vendor.lower(), product=usb.product.lower(), serial=usb.serial)
            for one in served
            for usb in one.usb
        ),
        targets=tuple(_target(one.name, target) for one in served for target in one.targets),
        dsa=DsaSelector(rules=tuple(map(_dsa_rule, config.accelerators.dsa))),
        block_types=frozenset(type for one in served for type in BLOCK_TYPES if _asks_for(one, "block", "type", type)),
        gpu_groups=frozenset(size for one in served for size in SIZES if _asks_for(one, "gpu", "group", str(size))),
        driver_root=None if config.nvidia.driver_files == OFF else config.nvidia.driver_root,
        partitions=PartitionSelector() if config.divided else None,
    )


def _dsa_rule(config: DsaConfig) -> Rule:
    queues = (Queue(size=some.size, priority=some.priority) for some in config.queues for _ in range(some.count))
    return Rule(accelerators=tuple(config.accelerators), queues=tuple(queues))


def _target(selector: str, config: NvmeTargetConfig) -> TargetSelector:
    port = Port(transport=config.transport, traddr=config.traddr, trsvcid=config.trsvcid, nqn=config.nqn)
    return TargetSelector(name=config.name, selector=selector, port=port)


def _asks_for(config: ResourceConfig, kind: str, name: str, value: str) -> bool:
    """Return whether a resource of a kind has a pattern of an attribute that fits a value."""
    asked = [one[name] for one in (config.match, *config.match_any) if name in one]
    patterns = [pattern for some in asked for pattern in patterns_of(some)]
    return config.kind == kind and any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)


def _offer(config: Config, number: int, known: Mapping[str, all_kinds.Kind]) -> Offer:
    one, where = config.served[number], f"$.resources[{number}]"
    name = config.full_name(one)
    if one.kind == CPU:
        try:
            options = check_options(one.options)
        except InputError as error:
            key = f"{where}.options{_first_unknown(one.options)}"
            raise ConfigError(f"cannot serve {name}: {error}", key=key) from None
        claimed = any(other.kind == CPU for other in config.served_by_dra)
        return Offer(config=one, resource=CpuResource(name=name, options=options, numa=one.numa, claimed=claimed))
    if one.kind == HUGEPAGES:
        size = parse_size(one.page_size)
        return Offer(
            config=one, resource=HugepageResource(name=name, page_bytes=size, pages_per_block=one.pages_per_block)
        )
    if one.kind not in known:
        why = f"unknown kind {one.kind!r}, expected one of {_names(known)}"
        raise ConfigError(f"cannot serve {name}: {why}", key=f"{where}.kind")
    _check_preparable(one, known[one.kind], name, where)
    match: dict[str, str | Sequence[str]] = {**one.match}
    if one.kind in ("char", "usb", "nvmeof"):
        match["selector"] = one.name
    resource = DeviceResource(
        name=name,
        kind=one.kind,
        match=MappingProxyType(match),
        match_any=tuple(MappingProxyType({**some}) for some in one.match_any),
        replicas=one.replicas,
        partitions=one.mig.mode == "dynamic",
    )
    files = config.nvidia.driver_files
    return Offer(config=one, resource=resource, family=known[one.kind], driver_files=files)


def _check_preparable(one: ResourceConfig, kind: all_kinds.Kind, name: str, where: str) -> None:
    """Raise ConfigError if a kind has to prepare its devices, and cannot as they are served."""
    if not prepares(kind):
        return
    if one.serve != "dra":
        why = f"the kind {one.kind} prepares its devices for claims, expected dra"
        raise ConfigError(f"cannot serve {name}: {why}", key=f"{where}.serve")
    if one.replicas > 1:
        why = f"the kind {one.kind} prepares a device for one claim, expected 1"
        raise ConfigError(f"cannot serve {name}: {why}", key=f"{where}.replicas")


def _first_unknown(names: Sequence[str]) -> str:
    """Return the index of the first option that is unknown as "[0]", or "" if all are known."""
    for i, name in enumerate(names):
        try:
            check_options([name])
        except InputError:
            return f"[{i}]"
    return ""


def _names(known: Iterable[str]) -> str:
    return ", ".join(sorted({CPU, HUGEPAGES, MEMORY, *known}))


def held_variables(inventory: Inventory, grants: Sequence[Grant]) -> dict[str, str]:
    """Return the variables for granted CPUs and pages, without hidden hyperthreads. NODEAGENT_NUMA_NODES are the nodes
    of the CPUs."""
    env, cpus = dict[str, str](), union(used_cpus(inventory, grant) or grant.cpus for grant in grants)
    if cpus:
        env["NODEAGENT_CPUS"] = str(cpus)
        env["NODEAGENT_NUMA_NODES"] = numbers(nodes_of_cpus(inventory, cpus))
    pages = [one for grant in grants for one in grant.hugepages]
    for size in sorted({one.page_bytes for one in pages}):
        name, mine = f"NODEAGENT_HUGEPAGES_{format_size(size).upper()}", [it for it in pages if it.page_bytes == size]
        env[name] = str(sum(one.pages for one in mine))
        env[f"{name}_NUMA_NODES"] = numbers(one.node for one in mine)
    return {**env, **_amount_variables([grant for grant in grants if grant.amounts])}


def _amount_variables(grants: Sequence[Grant]) -> dict[str, str]:
    """Return the variables for shares of GPUs, and what enforces them."""
    if not grants:
        return {}
    sizes = Counter[str]()
    for _, name, size in (amount for grant in grants for amount in grant.amounts):
        sizes[name] += size
    names = {
        gpu_amounts.MEMORY: "NODEAGENT_DEVICE_MEMORY_BYTES",
        gpu_amounts.CORES: "NODEAGENT_DEVICE_CORES_PERCENT",
    }
    said = {variable: str(sizes[name]) for name, variable in names.items() if name in sizes}
    return {**said, "NODEAGENT_DEVICE_LIMITS": enforcement(grants)}


def nodes_of_cpus(inventory: Inventory, cpus: CpuSet) -> list[NodeId]:
    """Return the NUMA nodes of those CPUs that are online; none on a machine without NUMA."""
    known = inventory.cpu_by_id
    return sorted({node for cpu in cpus if cpu in known and (node := known[cpu].numa_node) >= 0})


def numbers(nodes: Iterable[NodeId]) -> str:
    """Return the distinct nodes in ascending order, as "0,1"."""
    return ",".join(str(node) for node in sorted(set(nodes)))


def _refuse_without_nodes(devices: Iterable[Device]) -> None:
    """Raise HostError if a device has no node to hand over: the container would start without it."""
    for device in devices:
        if device.lacks_node:
            raise HostError(f"cannot hand over {device.id}: it has no device node at this moment")


def _refuse_unmade(devices: Iterable[Device]) -> None:
    """Raise HostError if a device is a part that is made on demand and does not exist."""
    for device in devices:
        if device.partition is not None and not device.partition.made:
            raise HostError(f"cannot hand over {device.id}: its instance does not exist at this moment")


def _word(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).upper()


def _mounts(config: ResourceConfig) -> tuple[Mount, ...]:
    return tuple(
        Mount(host_path=one.host_path, container_path=one.container_path, read_only=one.read_only)
        for one in config.mounts
    )


def _cdi_names(config: ResourceConfig, devices: Iterable[Device]) -> tuple[str, ...]:
    return () if config.cdi is None else tuple(_cdi_name(config.cdi, device) for device in devices)


def _cdi_name(cdi: CdiConfig, device: Device) -> str:
    """Return a device's CDI name. Raise HostError if the device lacks the value it is named by.

    Otherwise a container would silently start without the device.
    """
    value = _named_by(cdi, device)
    if value is None:
        raise HostError(f"cannot name {device.id} for CDI kind {cdi.kind}: it has no {cdi.name!r} at this moment")
    return f"{cdi.kind}={value}"


def _named_by(cdi: CdiConfig, device: Device) -> object:
    """Return the field or attribute that names a device for CDI, or None if it has no such value."""
    return getattr(device, cdi.name, None) or device.attributes.get(cdi.name)
