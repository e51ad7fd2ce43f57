"""Learns from kubelet who holds what, and when it is released."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from msgspec.structs import replace

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import race
from nodeagent.core.model.grant import KUBELET, Grant, Holding
from nodeagent.errors import InputError, PeerError, StateError
from nodeagent.host.cdi_specs import CDI_VALUE, STATIC_FOLDER, nodes_of
from nodeagent.kube.kubelet.pod_resources import CheckpointWatch, Listing, PodResources
from nodeagent.kube.kubelet_files.checkpoints import PODS, pods_there
from nodeagent.managers.manager import Manager
from nodeagent.managers.pod_witness import PodWitness
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent
from nodeagent.telemetry import metrics
from nodeagent.telemetry.log import new_op
from nodeagent.telemetry.once import Once

ABSENCE_POLL_S = 1.0
"""Minimum interval between queries to kubelet while a grant is missing from its list."""
PODS_POLL_S = 3600.0
"""The watch of the pods' folders only speeds up a release, so it needs no frequent polling in addition."""
log = structlog.get_logger()


class HolderReconciler(Manager):
    """Learns from kubelet who holds what, and when it is released."""

    name = "holders"

    def __init__(
        self,
        agent: Agent,
        pods: PodResources,
        witness: PodWitness,
        offers: Callable[[], Sequence[Offer]],
        plugins: Path,
        ended: Revision,
        poll_s: Callable[[], float],
        driver: str,
        cdi_dir: Path,
    ) -> None:
        """Set up without asking kubelet.

        `driver` is the agent's own for DRA; `cdi_dir` is where drivers put the specs of their devices. `plugins` is
        kubelet's device-plugins folder, next to the folder of its pods. `ended` increases with each end of a pod or
        container that the runtime or the kernel reports. `poll_s` returns how often kubelet is asked without any event.
        """
        self._agent = agent
        self._pods = pods
        self._witness = witness
        self._offers = offers
        self._plugins = plugins
        self._ended = ended
        self._poll_s = poll_s
        self._driver = driver
        self._cdi_dirs = (STATIC_FOLDER, cdi_dir)
        self._unknown = Once("holders-unknown")
        self._undescribed = Once("claimed-devices-unknown")
        self._ended_unknown = Once("ended-pods-unknown")

    async def lead(self) -> None:
        """Reconcile with kubelet's list after every change of its checkpoint, after every end of a pod, when a release
        is due, and periodically."""
        watch = CheckpointWatch(self._plugins, poll_s=self._poll_s())
        with watch, FolderWatch(self._plugins.parent / PODS, poll_s=PODS_POLL_S) as folders:
            seen = self._ended.value
            while True:
                await self._reconcile()
                await self._look_for_ended()
                # Kubelet lists a pod slightly longer than it lives.
                due_s = 0.0 if self._ended.value != seen else self._agent.look_again_s
                seen = self._ended.value
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if due_s is None else max(due_s, ABSENCE_POLL_S)):
                        await race(watch.wait(), folders.wait(), self._ended.changed(seen))

    async def _reconcile(self) -> None:
        try:
            asked_at = time.monotonic()
            listing = await self._pods.listing()
            witnesses = await self._witness.witnesses(self._agent.ledger, listing)
            resources = [one.resource for one in self._offers()]
            theirs = await asyncio.to_thread(self._claimed_of_others, listing)
            found = await self._agent.reconcile(
                (*listing.holdings, *theirs), resources, new_op(), asked_at=asked_at, witnesses=witnesses
            )
        except (PeerError, StateError) as error:
            self._unknown.report(str(error))
            return
        self._unknown.clear()
        metrics.RELEASES.inc(len(found.released))
        metrics.ADOPTIONS.inc(len(found.adopted))
        _log_grants("released", found.released)
        _log_grants("adopted", found.adopted)

    def _claimed_of_others(self, listing: Listing) -> list[Holding]:
        """Return what claims of other DRA drivers hold, with the device nodes in place of CDI devices."""
        theirs = [one for one in listing.claimed if one.resource != self._driver]
        paths = nodes_of(self._cdi_dirs, {name for one in theirs for name in one.ids})
        lacking = sorted({name for one in theirs for name in one.ids if CDI_VALUE in name} - paths.keys())
        why = f"cannot find what claims of other drivers hold: no CDI spec has {', '.join(lacking)}"
        self._undescribed.report(why if lacking else "")
        return [
            replace(one, ids=tuple(path for name in one.ids for path in paths.get(name, (name,)))) for one in theirs
        ]

    async def _look_for_ended(self) -> None:
        """Release ended grants that were adopted from kubelet's own managers. Kubelet does not list them, so the
        folders of its pods are the evidence."""
        if not any(one.holder.api == KUBELET for one in self._agent.ledger.grants.values()):
            return
        try:
            there = await asyncio.to_thread(pods_there, self._plugins.parent)
            gone = await self._agent.release_ended(there, new_op())
        except (InputError, StateError) as error:
            self._ended_unknown.report(str(error))
            return
        self._ended_unknown.clear()
        metrics.RELEASES.inc(len(gone))
        _log_grants("released", gone)


def _log_grants(event: str, grants: Sequence[Grant]) -> None:
    for grant in grants:
        log.info(event, grant=grant.id, ids=grant.ids, holder=str(grant.holder))
