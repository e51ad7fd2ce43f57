"""What the configuration serves through DRA: the pools, and the resources that their devices come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from nodeagent.config.resources import ResourceConfig
from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.dra.cpu_pool import CpuPool, PoolKind
from nodeagent.core.dra.device_pool import DevicePool
from nodeagent.core.dra.memory_pools import MemoryPool, PagePool
from nodeagent.core.dra.pool import NodeCost
from nodeagent.core.dra.prepare import Catalog
from nodeagent.core.fabrics.target import KIND as NVMEOF
from nodeagent.core.fabrics.target import device_id
from nodeagent.core.ledger.free import PageLimit
from nodeagent.core.model.options import check_options
from nodeagent.core.model.quantity import parse_size
from nodeagent.errors import ConfigError, InputError
from nodeagent.host.devices import all_kinds
from nodeagent.host.devices.hooks import forms
from nodeagent.resources.offer import CPU, HUGEPAGES, MEMORY, Offer, offers

if TYPE_CHECKING:
    from nodeagent.core.fabrics.pool import SharedPool

THROUGH_DRA = " through DRA"
"""At the end of the name of a resource that is refused to claims, where both APIs' refusals are shown together."""


class Dra(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is served through DRA."""

    catalog: Catalog
    offers: tuple[Offer, ...] = ()
    conditional: frozenset[str] = frozenset()
    """Kinds whose claims are to be granted before their pods are bound: the device plugin serves them too, and may be
    faster."""

    @property
    def served(self) -> bool:
        """Return whether any kind is served through DRA."""
        return bool(self.catalog.kinds)


def dra_of(config: Config, families: Sequence[all_kinds.Kind], node_name: str, refused: Iterable[str] = ()) -> Dra:
    """Return what a configuration serves through DRA, except `refused` resources. Raise ConfigError for an unknown
    option."""
    refused = frozenset(refused)
    mine = [offer for offer in offers(config, families) if offer.by_dra and offer.config.name not in refused]
    found: dict[str, PoolKind] = {}
    shared: dict[str, SharedPool] = {}
    for kind in dict.fromkeys(one.kind for one in config.served_by_dra if one.name not in refused):
        offered = [offer for offer in mine if offer.resource.kind == kind]
        if kind == NVMEOF:
            shared = _shared_pools(config, offered)
            found |= shared
        else:
            found[kind] = _pool_kind(config, kind, offered)
    catalog = Catalog(
        driver=config.dra.driver,
        node_name=node_name,
        kinds=MappingProxyType(found),
        shared=frozenset(shared),
        passthrough=frozenset(config.dra.passthrough_drivers),
        moves_interfaces=config.network.move_interfaces,
        vf_properties=frozenset(config.network.vf_properties),
        forms=forms(families),
    )
    plugged = {one.kind for one in config.served if one.serve != "dra"}
    conditional = frozenset(found.keys() & plugged if config.dra.binding_conditions else ())
    return Dra(catalog=catalog, offers=tuple(mine), conditional=conditional)


def page_limits(config: Config) -> tuple[PageLimit, ...]:
    """Return the hugepage pools that may grow for claims: those of page sizes that claims can request."""
    sizes = {parse_size(one.page_size) for one in config.served_by_dra if one.kind == HUGEPAGES}
    every = (
        PageLimit(node=one.node, page_bytes=parse_size(one.page_size), max_pages=one.max_pages)
        for one in config.hugepages
    )
    return tuple(one for one in every if one.max_pages and one.page_bytes in sizes)


def _pool_kind(config: Config, kind: str, mine: Sequence[Offer]) -> PoolKind:
    configs = [one for one in config.served_by_dra if one.kind == kind]
    if kind == CPU:
        try:
            options = check_options(configs[0].options)
        except InputError as error:
            raise ConfigError(f"cannot serve {configs[0].name}: {error}") from None
        lists = config.dra.list_attributes
        return CpuPool(group=configs[0].grouping, options=options, numa=configs[0].numa, lists=lists)
    if kind == HUGEPAGES:
        sizes = tuple(dict.fromkeys(parse_size(one.page_size) for one in configs))
        return PagePool(sizes=sizes, limits=page_limits(config))
    if kind == MEMORY:
        return MemoryPool(limits=page_limits(config))
    resources = tuple(offer.resource for offer in mine if isinstance(offer.resource, DeviceResource))
    costs = {offer.resource.name: _overhead(offer.config) for offer in mine if offer.config.overhead}
    effect, lists = config.dra.unhealthy_effect, config.dra.list_attributes
    return DevicePool(kind=kind, resources=resources, unhealthy_effect=effect, costs=costs, lists=lists)


def _shared_pools(config: Config, mine: Sequence[Offer]) -> dict[str, SharedPool]:
    """Return the pools that nodes share, by name: one for each target."""
    from nodeagent.core.fabrics.pool import SharedPool

    resources = tuple(offer.resource for offer in mine if isinstance(offer.resource, DeviceResource))
    return {
        (name := device_id(target.name)): SharedPool(
            kind=name, resources=resources, node_selector=MappingProxyType(dict(target.node_selector))
        )
        for target in config.targets
    }


def _overhead(config: ResourceConfig) -> Mapping[str, NodeCost]:
    return {
        name: NodeCost(per_pod=one.per_pod, per_container=one.per_container) for name, one in config.overhead.items()
    }
