"""The configuration of hugepage pools."""

from __future__ import annotations

from typing import Annotated

import msgspec

from nodeagent.config.base import Base

SMALLEST_PAGE_BYTES, LARGEST_PAGE_BYTES = 16 << 10, 16 << 30
"""Limits of hugepage sizes, over all processors that Linux supports."""
KEEP_FREE = "256Mi"
"""More than twice what kubelet keeps free before it evicts pods (evictionHard: memory.available 100Mi)."""


class HugepagesConfig(Base, frozen=True):
    """A hugepage pool that the agent provides on one NUMA node."""

    page_size: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,8}(Ki|Mi|Gi)$")]
    node: Annotated[int, msgspec.Meta(ge=0)]
    pages: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The pool is made at least this large at the start, and kept so."""
    max_pages: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How far the pool may grow when a claim needs more; 0: not at all."""
    keep_free: Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,8}(Ki|Mi|Gi)$")] = KEEP_FREE
    """Memory of the node, and of the machine, that stays available when the pool grows for a claim."""
