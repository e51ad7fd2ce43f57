"""How many bytes of hugepages a container may use: what it holds, and what kubelet allows it in addition. Likewise its
pod as a whole.

There are two witnesses of what kubelet allows. The limits of a container, as the runtime was asked to set them, count
wherever the runtime passes them on. containerd does not unless it is told to (its `disable_hugetlb_controller` is true
by default, 1.7 to 2.4): there a container is limited by its pod's cgroup alone, whose limits kubelet sets itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from nodeagent.core.model.container import Container, PageLimits
from nodeagent.core.model.grant import CLAIM, Grant

NO_PAGES: Mapping[int, int] = MappingProxyType({})
"""Bytes by page_bytes, of none."""


def bytes_of(grants: Iterable[Grant]) -> dict[int, int]:
    """Return the bytes by page_bytes, summed over several grants."""
    sums: dict[int, int] = {}
    for pages in (pages for one in grants for pages in one.hugepages):
        sums[pages.page_bytes] = sums.get(pages.page_bytes, 0) + pages.pages * pages.page_bytes
    return sums


def bytes_of_claims(grants: Iterable[Grant]) -> dict[int, int]:
    """Return the bytes by page_bytes that claims hold of these grants."""
    return bytes_of(one for one in grants if one.holder.api == CLAIM)


def allowed_to_pod(limits: Mapping[int, int], grants: Iterable[Grant], *, ran: bool, counted: bool) -> dict[int, int]:
    """Return the bytes, by page_bytes, that kubelet allows a pod in addition to what its grants hold.

    limits: of the pod's cgroup, in bytes by page_bytes. ran: whether an earlier agent may have raised them by what the
    pod holds; a limit is taken to be raised if it is large enough, as a pod must never be allowed the pages of others.
    counted: whether kubelet may have included what claims hold; a limit is taken to include them likewise.
    """
    grants = tuple(grants)
    included = bytes_of(grants) if ran else bytes_of_claims(grants) if counted else {}
    return {size: limit - (own if limit >= (own := included.get(size, 0)) else 0) for size, limit in limits.items()}


def limits_of(container: Container, grants: Iterable[Grant], pod: Mapping[int, int]) -> Mapping[int, int]:
    """Return the limits in bytes, by page_bytes, of those page sizes that a container's grants have.

    pod: bytes that kubelet allows the whole pod in addition to what it holds.
    """
    grants = tuple(grants)
    claimed = bytes_of_claims(grants)
    limits = {
        size: _limit(container, size, held, claimed.get(size, 0), pod.get(size, 0))
        for size, held in bytes_of(grants).items()
    }
    return MappingProxyType({size: limit for size, limit in limits.items() if limit is not None})


def limits_beside(container: Container, sizes: Iterable[int], pod: Mapping[int, int]) -> dict[int, int]:
    """Return the limits in bytes of a container for page sizes that others of its pod hold: what kubelet allows it."""
    asked = {size: container.resources.hugepage_limits.get(size) for size in sizes}
    found = container.page_limits == PageLimits.FOUND
    limits = {size: pod.get(size, 0) if limit is None else limit for size, limit in asked.items()}
    return {size: limit for size, limit in limits.items() if not (found and asked[size])}


def _limit(container: Container, page_bytes: int, held: int, claimed: int, of_pod: int) -> int | None:
    """Return the bytes of pages that a container may use, or None if its limit is left as it is.

    held: bytes that it holds, of which `claimed` through claims. A limit that may include them is taken to do so if it
    is large enough: a container must never be allowed the pages of others. Of a limit that was found it is not known
    whose it is. If it is beyond what the container holds, it is kubelet's or the agent's own, and either may stay.
    """
    asked = container.resources.hugepage_limits.get(page_bytes)
    if asked is None:
        return held + of_pod
    if container.page_limits == PageLimits.FOUND:
        return None if asked > held else held + asked if asked < held else held
    included = claimed if container.page_limits == PageLimits.COUNTED else 0
    return held + (asked - included if asked >= included else asked)
