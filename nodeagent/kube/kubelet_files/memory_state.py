"""What kubelet's memory manager has assigned, from its configuration and its state.

A function of configuration and state at one moment. A missing file is no evidence; one that cannot be parsed is an
error. Sources: kubelet.config.k8s.io/v1beta1 (memoryManagerPolicy); kubelet's checkpoint memory_manager_state: by pod
and container (its first form), with whole pods in addition (second), the same as text under "data" (third, Kubernetes
1.37).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from nodeagent.core.kubelet.assigned import MemoryBlock
from nodeagent.core.ledger.free import MEMORY
from nodeagent.core.model.quantity import parse_size
from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files import checkpoints as kubelet_files
from nodeagent.kube.kubelet_files.config import KubeletConfig

STATIC, NONE = "Static", "None"
STATE_FILE, PAGES = "memory_manager_state", "hugepages-"
POLICY = "memoryManagerPolicy"
"""The configuration key."""


class MemoryState(msgspec.Struct, frozen=True, kw_only=True):
    """How kubelet manages memory and hugepages."""

    policy: str = NONE
    """memoryManagerPolicy; "Static" if either configuration or state says so, because kubelet refuses to start while
    they differ."""
    policy_source: str = ""
    """The file or flag that sets it, or "" if none does."""
    policy_conflict: str = ""
    """How configuration and state contradict each other, or "" if they agree."""
    assigned: Mapping[tuple[str, str], tuple[MemoryBlock, ...]] = msgspec.field(
        default_factory=lambda: MappingProxyType({})
    )
    """Memory by pod UID and container name."""
    pods: Mapping[str, tuple[MemoryBlock, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Memory of whole pods, by UID; it includes that of their containers."""

    @property
    def static(self) -> bool:
        """Return whether kubelet's memory manager policy is static."""
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
    """Not used: free memory is computed from the assignments. Kubelet always writes it, so a file without it is not
    this checkpoint."""
    entries: dict[str, dict[str, list[_Block]]] = {}
    pods: dict[str, _Pod] = msgspec.field(name="podEntries", default_factory=dict)


def read(kubelet_dir: Path, config: KubeletConfig) -> MemoryState:
    """Read the state from kubelet's folder (/var/lib/kubelet). Raise InputError with the file or flag, the value and
    the fault."""
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
    """Return the page size of a memory type, or core.ledger.free.MEMORY for ordinary memory."""
    if type == "memory":
        return MEMORY
    if not type.startswith(PAGES):
        raise InputError(f"cannot read {path}: type {type!r}, expected memory or {PAGES}SIZE")
    try:
        return parse_size(type.removeprefix(PAGES))
    except InputError as error:
        raise InputError(f"cannot read {path}: type {type!r}: {error}") from None
