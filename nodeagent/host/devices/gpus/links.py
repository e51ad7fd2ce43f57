"""Links between GPUs: NVLink and XGMI, and which GPUs they connect completely. Proximity over PCIe follows from device
positions and is not covered here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

from msgspec.structs import replace

from nodeagent.core.model.device import LINK_WEIGHTS, NVLINK_STEP, Device, Link
from nodeagent.core.placement.linked import complete_groups
from nodeagent.host.devices.kfd import KfdNode
from nodeagent.host.nvml.client import NvGpu

DOMAINS: Mapping[str, str] = MappingProxyType({"nvlink": "nvlink_domain", "xgmi": "xgmi_hive"})
"""Attribute by type of link."""


def nvlinks(gpus: Iterable[NvGpu]) -> tuple[Link, ...]:
    """Return one Link per connected pair, in order of address."""
    ordered = sorted(gpus, key=lambda gpu: gpu.pci_address)
    addresses = {gpu.pci_address for gpu in ordered}
    counts = ((a, b, _direct(a, b) + _switched(a, b, addresses)) for a, b in combinations(ordered, 2))
    return tuple(_link(a.pci_address, b.pci_address, count) for a, b, count in counts if count)


def xgmi_links(gpus: Mapping[str, Sequence[KfdNode]]) -> tuple[Link, ...]:
    """Return one Link per pair of GPUs where a node of either names one of the other. gpus: their nodes by address."""
    numbers = {address: {node.number for node in nodes} for address, nodes in gpus.items()}
    peers = {address: {peer for node in nodes for peer in node.xgmi} for address, nodes in gpus.items()}
    pairs = combinations(sorted(gpus), 2)
    linked = ((a, b) for a, b in pairs if numbers[b] & peers[a] or numbers[a] & peers[b])
    return tuple(Link(a=a, b=b, type="xgmi", weight=LINK_WEIGHTS["xgmi"]) for a, b in linked)


def with_domains(devices: Iterable[Device], links: Iterable[Link]) -> list[Device]:
    """Return the devices, of which those that links of one type connect completely, each with each, name the first of
    their group in an attribute."""
    every, found = tuple(links), dict[str, dict[str, str]]()
    for type_, attribute in DOMAINS.items():
        pairs = [(one.a, one.b) for one in every if one.type == type_]
        for group in complete_groups(pairs):
            for id_ in group:
                found.setdefault(id_, {})[attribute] = group[0]
    return [
        replace(one, attributes=MappingProxyType({**one.attributes, **found[one.id]})) if one.id in found else one
        for one in devices
    ]


def _direct(a: NvGpu, b: NvGpu) -> int:
    """Return the number of direct links. Both ends count the same links, but one of them
    may be unable to report them."""
    return max(a.nvlinks.get(b.pci_address, 0), b.nvlinks.get(a.pci_address, 0))


def _switched(a: NvGpu, b: NvGpu, gpus: set[str]) -> int:
    """Return the number of links through switches that both reach: per switch, that of the
    GPU with fewer links to it."""
    common = (a.nvlinks.keys() & b.nvlinks.keys()) - gpus
    return sum(min(a.nvlinks[switch], b.nvlinks[switch]) for switch in common)


def _link(a: str, b: str, count: int) -> Link:
    return Link(a=a, b=b, type="nvlink", weight=LINK_WEIGHTS["nvlink"] + NVLINK_STEP * (count - 1))
