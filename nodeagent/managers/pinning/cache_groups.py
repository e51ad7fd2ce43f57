"""What pinning asks of those who divide caches and disk I/O: the group of resctrl and the limits of a container, before
it begins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from nodeagent.core.model.container import Container, Pod


class CacheAnswer(NamedTuple):
    """What is known of a container's group when it is created."""

    group: str = ""
    """The group for the runtime to put it into; "" if the runtime has none to do."""
    error: str = ""
    """Why it cannot be in the group that it should be in, or have the limits that it should have; or ""."""


class CacheGroups(Protocol):
    """Groups of resctrl, limits of disk I/O, and utilization clamps. grants: ids of what the container holds. within_s:
    how long all of it may take together; what is not done by then is an error."""

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        """Return the group of a container that is about to be created."""
        ...

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        """Put a container that does not run yet into its group and read back. Return why it is not in it, or ""."""
        ...

    def learn(self, pods: Iterable[Pod]) -> None:
        """Take the annotations of all pods."""


def deadline_s(within_s: float) -> float:
    """Return when so much time is over, by the loop's clock."""
    return asyncio.get_running_loop().time() + within_s


def left_s(until_s: float) -> float:
    """Return how much time is left until then; 0 if none is."""
    return max(0.0, until_s - asyncio.get_running_loop().time())


class NoCacheGroups:
    """Caches are not divided."""

    async def created(self, pod: Pod, container: Container, grants: Sequence[str], within_s: float) -> CacheAnswer:
        return CacheAnswer()

    async def starting(self, container: Container, cgroup: str, grants: Sequence[str], within_s: float) -> str:
        return ""

    def learn(self, pods: Iterable[Pod]) -> None:
        return


NO_CACHE_GROUPS = NoCacheGroups()
