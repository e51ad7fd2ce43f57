"""What kubelet's memory manager has given away, by its configuration and its state.

A function of configuration and state at one moment. An absent file says nothing; one that cannot be understood is an
error.
Sources: kubelet.config.k8s.io/v1beta1 (memoryManagerPolicy); kubelet's checkpoint memory_manager_state: by pod and
container (its first form), with whole pods beside them (second), the same as text under "data" (third).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from nodeagent.core.kubelet.assigned import MemoryBlock
from nodeagent.core.ledger.free import MEMORY
from nodeagent.core.model.quantity import parse_size
from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import checkpoints as kubelet_files
from nodeagent.kube.kubelet_files.config import KubeletConfig

STATIC, NONE = "Static", "None"
STATE_FILE, PAGES = "memory_manager_state", "hugepages-"
POLICY = "memoryManagerPolicy"
"""The key of the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryState:
    """What kubelet does with memory and hugepages."""

    policy: str = NONE
    """memoryManagerPolicy. "Static" where either says so, configuration or state: kubelet refuses to start while they
    differ."""
    policy_source: str = ""
    """The file or flag that says so; "" where none does."""
    policy_conflict: str = ""
    """How configuration and state contradict each other; "" where they do not."""
    assigned: Mapping[tuple[str, str], tuple[MemoryBlock, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """By pod UID and container name."""
    pods: Mapping[str, tuple[MemoryBlock, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Of whole pods, by UID; what their containers have is part of it."""

    @property
    def static(self) -> bool:
        """Return whether the static memory manager wrote it."""
        return self.policy == STATIC


Node = Annotated[int, msgspec.Meta(ge=0)]


class _Block(msgspec.Struct):
    nodes: Annotated[list[Node], msgspec.Meta(min_length=1)] = msgspec.field(name="numaAffinity")
    type: str
    size: Annotated[int, msgspec.Meta(ge=0)]


class _Pod(msgspec.Struct):
    blocks: list[_Block] = msgspec.field(name="memoryBlocks", default_factory=list)


class _Checkpoint(msgspec.Struct):
    policy: str = msgspec.field(name="policyName")
    machine: dict[str, Any] | None = msgspec.field(name="machineState")
    """Not used: what is left is counted anew. Kubelet always writes it, so that without it this is something else."""
    entries: dict[str, dict[str, list[_Block]]] = {}
    pods: dict[str, _Pod] = msgspec.field(name="podEntries", default_factory=dict)


def read(kubelet_dir: Path, config: KubeletConfig) -> MemoryState:
    """Read kubelet's folder (/var/lib/kubelet); InputError names the file or flag, the value and what is wrong."""
    path = kubelet_dir / STATE_FILE
    found = kubelet_files.checkpoint(path, _Checkpoint)
    policy = kubelet_files.policy(config, POLICY, path, found.policy if found else "", managing=STATIC, none=NONE)
    known = MemoryState(policy=policy.name, policy_source=policy.source, policy_conflict=policy.conflict)
    if found is None:
        return known
    entries = [(uid, name, some) for uid, one in sorted(found.entries.items()) for name, some in sorted(one.items())]
    return replace(
        known,
        assigned=MappingProxyType({(uid, name): _blocks(some, path) for uid, name, some in entries}),
        pods=MappingProxyType({uid: _blocks(pod.blocks, path) for uid, pod in sorted(found.pods.items())}),
    )


def _blocks(some: Iterable[_Block], path: Path) -> tuple[MemoryBlock, ...]:
    return tuple(
        MemoryBlock(nodes=tuple(sorted({*one.nodes})), page_bytes=_page_bytes(one.type, path), size_bytes=one.size)
        for one in some
    )


def _page_bytes(type: str, path: Path) -> int:
    """core.stock.MEMORY for memory that is in no hugepages."""
    if type == "memory":
        return MEMORY
    if not type.startswith(PAGES):
        raise InputError(f"cannot read {path}: type {type!r}, expected memory or {PAGES}SIZE")
    try:
        return parse_size(type.removeprefix(PAGES))
    except InputError as error:
        raise InputError(f"cannot read {path}: type {type!r}: {error}") from None
