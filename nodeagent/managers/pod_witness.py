"""Determines from sources other than kubelet's list whether the pods that hold grants are alive: the kernel (their
cgroups), the container runtime (its events), and kubelet's checkpoint and pod folders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import structlog

from nodeagent.core.ledger.ledger import Ledger
from nodeagent.core.ledger.release import lives
from nodeagent.core.ledger.witness import Given, Sight, Sighting, Witnesses, pods_by_checkpoint
from nodeagent.core.model.container import CREATED, PAUSED, RUNNING, Container
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant
from nodeagent.errors import InputError
from nodeagent.host.cgroup.pods_alive import PodCgroups
from nodeagent.kube.kubelet.pod_resources import NO_LISTING, Listing, given
from nodeagent.kube.kubelet_files.checkpoints import pods_there
from nodeagent.managers.pinning.containers import ContainerTable
from nodeagent.telemetry.once import Once

_ALIVE = (CREATED, RUNNING, PAUSED)
FEW_PODS = 4
"""Up to this many pods are looked up in the event loop, about 0.1 ms each; on a busy machine a thread may take a
hundred times as long to get its turn."""
log = structlog.get_logger()


class PodWitness:
    """Gathers evidence on pods. Building one reads nothing."""

    def __init__(
        self, cgroups: PodCgroups, table: ContainerTable, plugins: Path, node_names: frozenset[str], boot_id: str = ""
    ) -> None:
        """Store the sources.

        `plugins` is kubelet's device-plugins folder with its checkpoint; the parent has the pods' folders. `node_names`
        are the possible names of the Node: kubelet appends its name to those of static pods.
        """
        self._cgroups = cgroups
        self._table = table
        self._plugins = plugins
        self._static = tuple(f"-{name}" for name in sorted(node_names))
        self._boot_id = boot_id
        self._unread = Once("given-devices-unknown")

    async def living(self, grants: Sequence[Grant]) -> Mapping[str, str]:
        """Return the evidence that a grant's pods are alive, by grant id; grants of other pods are left out.

        While kubelet is requesting what another pod held, its checkpoint on disk still names that other pod.
        """
        if not grants:
            return MappingProxyType({})
        by_device = any(one.holder.api == DEVICE_PLUGIN for one in grants)
        checkpoint = await asyncio.to_thread(self._given) if by_device else None
        witnesses = await self._ask(grants, NO_LISTING, checkpoint, None)
        return {one.id: evidence for one in grants if (evidence := lives(one, witnesses))}

    async def witnesses(self, ledger: Ledger, listing: Listing) -> Witnesses:
        """Return the evidence on the grants of device plugins, ours and others, right after kubelet returned
        `listing`."""
        checkpoint, folders = await asyncio.to_thread(lambda: (self._given(), self._folders()))
        every = (*ledger.grants.values(), *ledger.foreign.values())
        mine = [one for one in every if one.holder.api == DEVICE_PLUGIN]
        return await self._ask(mine, listing, checkpoint, folders)

    def given(self) -> Given:
        """Return the devices that kubelet's checkpoint assigns to containers, of any plugin; blocks. Empty if it cannot
        be read, which is logged."""
        return self._given() or MappingProxyType({})

    def knows_pods(self, listing: Listing) -> bool:
        """Return whether a list shows that the API server's pods have reached kubelet: it has a pod that is not
        static."""
        return any(not name.endswith(self._static) for _, name in listing.pods)

    async def _ask(
        self, grants: Sequence[Grant], listing: Listing, checkpoint: Given | None, folders: frozenset[str] | None
    ) -> Witnesses:
        pods = self._pods_of(grants, listing, checkpoint)
        uids = sorted({uid for some in pods.values() for uid in some})
        look = self._cgroups.sights
        by_kernel = look(uids) if len(uids) <= FEW_PODS else await asyncio.to_thread(look, uids)
        return Witnesses(
            kubelet=listing.kubelet,
            knows_pods=self.knows_pods(listing),
            boot_id=self._boot_id,
            given=checkpoint,
            folders=folders,
            sights={uid: self._with_runtime(uid, by_kernel[uid]) for uid in uids},
            pods_of=pods,
        )

    # ---------------------------------------------------------------- pods of a grant

    def _pods_of(
        self, grants: Iterable[Grant], listing: Listing, checkpoint: Given | None
    ) -> dict[str, tuple[str, ...]]:
        """Return the UIDs of each grant's pods: by kubelet's checkpoint, else as recorded, else by what the runtime
        shows for a pod of the holder's name or for containers that name the grant."""
        found = pods_by_checkpoint(grants, checkpoint)
        if not all(found.values()):
            shown = self._shown(listing)
            found = {one.id: found[one.id] or shown.get(_name(one)) or shown.get((one.id, "")) or () for one in grants}
        return found

    def _shown(self, listing: Listing) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return UIDs of pods by (namespace, name), and by (id, "") of a grant that their containers name.

        Pods that kubelet lists are left out of the former: kubelet itself reports what they hold.
        """
        found: dict[tuple[str, str], set[str]] = {}
        for one in (one for one in self._table.containers() if one.pod_uid):
            if one.pod_name and (one.namespace, one.pod_name) not in listing.pods:
                found.setdefault((one.namespace, one.pod_name), set()).add(one.pod_uid)
            for grant in _named(one):
                found.setdefault((grant, ""), set()).add(one.pod_uid)
        return {key: tuple(sorted(uids)) for key, uids in found.items()}

    # ---------------------------------------------------------------- sightings

    def _with_runtime(self, uid: str, by_kernel: Sighting) -> Sighting:
        """Combine the kernel's evidence with the runtime's, if it is connected: one that shows a live pod is enough."""
        if by_kernel.sight is Sight.LIVES or not self._table.told_by_runtime:
            return by_kernel
        alive = next((one for one in self._table.containers() if one.pod_uid == uid and one.state in _ALIVE), None)
        if alive is not None:
            return Sighting(Sight.LIVES, f"the runtime runs container {alive}")
        return Sighting(Sight.STOPPED) if by_kernel.sight is Sight.UNSEEN else by_kernel

    def _given(self) -> Given | None:
        try:
            found, error = given(self._plugins), ""
        except InputError as unreadable:
            found, error = None, str(unreadable)
        self._unread.report(error)
        return found

    def _folders(self) -> frozenset[str] | None:
        try:
            return pods_there(self._plugins.parent)
        except InputError:
            return None


def _name(grant: Grant) -> tuple[str, str]:
    return grant.holder.namespace, grant.holder.pod


def _named(container: Container) -> Iterable[str]:
    """Return what a container's environment may name as a grant. A pod that forges it can only delay the release of a
    grant about which nothing better is known."""
    return {value for name, value in container.env.items() if name.startswith("NODEAGENT_")}
