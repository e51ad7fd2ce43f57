"""Which devices and CPUs other DRA drivers publish for this node: by their ResourceSlices.

Two drivers that publish the same device have it allocated twice: the scheduler knows nothing of what is behind a
device. It is recognised by its name and by its text attributes, such as `uuid` (gpu.nvidia.com) or
`resource.kubernetes.io/pciBusID`. CPUs are recognised as other_cpus.py says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nodeagent.errors import PeerError
from nodeagent.managers.dra.other_cpus import OfferedCpus, offered_cpus
from nodeagent.managers.manager import Manager
from nodeagent.telemetry.once import Once

PERIOD_S = 600.0
"""Between two looks: with 5,000 nodes the API server gets eight such requests a second."""
RETRY_S = 30.0


class Published(NamedTuple):
    """What one driver publishes for this node."""

    names: frozenset[str] = frozenset()
    """By which its devices are recognised."""
    cpus: frozenset[OfferedCpus] = frozenset()


ByDriver = Mapping[str, Published]
"""What is published, by driver."""
Slices = Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]
"""Return the ResourceSlices of this node. Raises PeerError."""


class OtherDrivers(Manager):
    """Looks at the slices of other drivers. Only the leading agent does."""

    name = "other drivers"

    def __init__(self, slices: Slices, driver: str, take: Callable[[ByDriver], None], *, configured: bool) -> None:
        """driver: the agent's own. take: takes what is published. configured: whether there is an API server."""
        self._slices = slices
        self._driver = driver
        self._take = take
        self._configured = configured
        self._unknown = Once("slices-of-other-drivers-unknown")

    async def lead(self) -> None:
        """Look periodically until cancelled. An API server that does not answer changes nothing."""
        while self._configured:
            rest_s = PERIOD_S if await self.look() else RETRY_S
            await asyncio.sleep(rest_s)

    async def look(self) -> bool:
        """Look once. Return whether the API server answered."""
        try:
            self._take(published(await self._slices(), self._driver))
        except PeerError as error:
            self._unknown.report(str(error))
            return False
        self._unknown.clear()
        return True


def published(slices: Iterable[Mapping[str, Any]], own: str) -> dict[str, Published]:
    """Return what slices of all drivers but one have, by driver."""
    found: dict[str, Published] = {}
    for spec in (one.get("spec") or {} for one in slices):
        if (driver := str(spec.get("driver", ""))) != own:
            known, devices = found.get(driver, Published()), spec.get("devices") or ()
            cpus = known.cpus.union(offered_cpus(driver, devices))
            found[driver] = Published(known.names.union(_names(devices)), cpus)
    return found


def _names(devices: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for device in devices:
        yield str(device.get("name", ""))
        for value in (device.get("attributes") or {}).values():
            if isinstance(value, Mapping) and isinstance(value.get("string"), str):
                yield value["string"]
