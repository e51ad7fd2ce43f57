"""Links between GPUs: NVLink and XGMI. Nearness over PCIe follows from where devices sit and is not said here."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from nodeagent.core.model.device import LINK_WEIGHTS, NVLINK_STEP, Link
from nodeagent.host.devices.kfd import KfdNode
from nodeagent.host.nvml.client import NvGpu


def nvlinks(gpus: Iterable[NvGpu]) -> tuple[Link, ...]:
    """One Link per pair, by address."""
    ordered = sorted(gpus, key=lambda gpu: gpu.pci_address)
    addresses = {gpu.pci_address for gpu in ordered}
    counts = ((a, b, _direct(a, b) + _switched(a, b, addresses)) for a, b in combinations(ordered, 2))
    return tuple(_link(a.pci_address, b.pci_address, count) for a, b, count in counts if count)


def xgmi_links(nodes: Iterable[KfdNode]) -> tuple[Link, ...]:
    """One Link per pair of KFD nodes of which one names the other."""
    ordered = sorted(nodes, key=lambda node: node.pci_address)
    return tuple(
        _link(a.pci_address, b.pci_address, 1)
        for a, b in combinations(ordered, 2)
        if b.number in a.xgmi or a.number in b.xgmi
    )


def _direct(a: NvGpu, b: NvGpu) -> int:
    """Both ends count the same links; one end may be unable to tell."""
    return max(a.nvlinks.get(b.pci_address, 0), b.nvlinks.get(a.pci_address, 0))


def _switched(a: NvGpu, b: NvGpu, gpus: set[str]) -> int:
    """Through switches that both reach any two GPUs have as many links as the one with fewer."""
    common = (a.nvlinks.keys() & b.nvlinks.keys()) - gpus
    return sum(min(a.nvlinks[switch], b.nvlinks[switch]) for switch in common)


def _link(a: str, b: str, count: int) -> Link:
    return Link(a=a, b=b, type="nvlink", weight=LINK_WEIGHTS["nvlink"] + NVLINK_STEP * (count - 1))
