"""Which devices and CPUs other device plugins and DRA drivers offer, and which of our resources therefore are not
served.

Two plugins that offer the same device give it away twice: each knows only what it gave itself. So a resource is not
served while another plugin offers any of its devices, as with kubelet's static CPU manager. A kubelet that starts has
forgotten all plugins until each has registered again, so what was offered counts until one kubelet has answered
without it for FORGET_S: for as long as kubelet itself keeps the capacity of a plugin that is away
(endpointStopGracePeriod, kubelet 1.37). Kubelet also deletes the slices of its node when it starts: a driver offers
what it published until two looks in a row have missed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.deviceplugin.view import CpuResource
from nodeagent.core.ledger.foreign import devices_named
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.inventory import Inventory
from nodeagent.errors import InputError
from nodeagent.kube.kubelet.pod_resources import registered
from nodeagent.managers.dra.other_cpus import cpus_of
from nodeagent.managers.dra.other_drivers import ByDriver, Published
from nodeagent.resources.offer import Offer
from nodeagent.telemetry.once import Once

FORGET_S = 300.0
MOST_NAMED = 3
"""Highest number of devices that a reason names."""
log = structlog.get_logger()


class OtherOffers:
    """What other plugins offer: ids by resource."""

    def __init__(self, plugins: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Set up without reading. plugins: kubelet's device-plugins folder. clock: in seconds."""
        self.revision = Revision()
        """Increases with every change of what others offer."""
        self._plugins = plugins
        self._clock = clock
        self._ours: set[str] = set()
        self._domains: set[str] = set()
        self._ids: dict[str, frozenset[str]] = {}
        self._missed_since: dict[str, float] = {}
        """When this kubelet first answered without a resource."""
        self._published: dict[str, Published] = {}
        """What DRA drivers publish for this node."""
        self._missed: frozenset[str] = frozenset()
        """Drivers that the last look at slices missed."""
        self._unread = Once("registered-devices-unknown")

    def serve(self, names: Iterable[str], domain: str) -> None:
        """Note which resources are ours, for good: kubelet may still name one that is no longer served."""
        self._ours |= {*names}
        self._domains.add(domain)
        self._forget(self._is_ours)

    def read_checkpoint(self) -> None:
        """Learn what was registered when kubelet last wrote its checkpoint; blocks."""
        try:
            self.learn(registered(self._plugins))
            self._unread.clear()
        except InputError as error:
            self._unread.report(str(error))

    def learn(self, ids: Mapping[str, Sequence[str]] | None) -> None:
        """Take what kubelet counts as allocatable; None if it did not answer."""
        if ids is None:
            self._missed_since.clear()
            return
        now, before = self._clock(), dict(self._ids)
        self._ids |= {name: frozenset(mine) for name, mine in ids.items() if mine and not self._is_ours(name)}
        self._missed_since = {name: self._missed_since.get(name, now) for name in self._ids if not ids.get(name)}
        self._forget(lambda name: now - self._missed_since.get(name, now) >= FORGET_S)
        self._tell(self._ids != before)

    def learn_slices(self, published: ByDriver) -> None:
        """Take what other DRA drivers publish for this node."""
        missed = self._published.keys() - published.keys()
        kept = {one: self._published[one] for one in missed - self._missed}
        self._missed = frozenset(kept)
        before, self._published = self._published, {**kept, **published}
        self._tell(self._published != before)

    def refusals(self, inventory: Inventory, offers: Iterable[Offer], reserved: CpuSet = EMPTY) -> Mapping[str, str]:
        """Return why resources cannot be served, by the name in the configuration. reserved: CPUs that are never
        granted."""
        every = ((offer, self._reason(inventory, offer.resource, reserved)) for offer in offers)
        return {offer.config.name: why for offer, why in every if why}

    def _reason(self, inventory: Inventory, resource: object, reserved: CpuSet) -> str:
        if isinstance(resource, CpuResource):
            return self._cpus_reason(inventory, reserved)
        if not isinstance(resource, DeviceResource) or not (self._ids or self._published):
            return ""
        mine = {device.id for device in resource.devices(inventory)}
        for what, offered in (("device plugin", self._ids), ("DRA driver", self._names_published())):
            for name, ids in sorted(offered.items()):
                theirs = devices_named(inventory, ids)
                both = {one for device in theirs for one in (device, *inventory.excluded_by.get(device, ()))} & mine
                if both:
                    return _shared(what, name, sorted(both))
        return ""

    def _names_published(self) -> dict[str, frozenset[str]]:
        return {driver: one.names for driver, one in self._published.items()}

    def _cpus_reason(self, inventory: Inventory, reserved: CpuSet) -> str:
        """Return why CPUs cannot be served alongside another driver that hands out CPUs, or "" if they can, as with
        kubelet's static CPU manager."""
        for driver, one in sorted(self._published.items()):
            theirs = cpus_of(one.cpus, inventory)
            if common := theirs & (inventory.cpus_online - reserved):
                advice = "; remove that driver"
                if inventory.cpus_online - theirs:
                    advice += ", or set reservedCpus so that the two sets of CPUs have none in common"
                return f"another DRA driver, {driver}, hands out CPUs {common} too{advice}"
        return ""

    def _tell(self, changed: bool) -> None:
        if changed:
            self.revision.bump()

    def _is_ours(self, name: str) -> bool:
        return name in self._ours or name.partition("/")[0] in self._domains

    def _forget(self, gone: Callable[[str], bool]) -> None:
        for name in [name for name in self._ids if gone(name)]:
            log.info("not-offered-by-others", resource=name)
            del self._ids[name]
            self._missed_since.pop(name, None)


def _shared(what: str, name: str, devices: Sequence[str]) -> str:
    more = f" and {len(devices) - MOST_NAMED} more" if len(devices) > MOST_NAMED else ""
    return (
        f"another {what} offers {', '.join(devices[:MOST_NAMED])}{more} as {name}; set match so that the two"
        f" have no device in common, or remove that {what.split()[-1]}"
    )
