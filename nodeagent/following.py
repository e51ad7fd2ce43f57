"""Following the world: the machine, NVML, what pods hold, kubelet itself. Each loop runs until cancelled, waits on an
event with a slow poll below it, and tells the agent what it sees; it decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path

import structlog

from nodeagent import metrics
from nodeagent.agent import Agent
from nodeagent.config import Config
from nodeagent.core.health import HEALTHY, UNHEALTHY, UNKNOWN, Evidence
from nodeagent.core.model import KUBELET, Device, Grant, Inventory
from nodeagent.errors import HostError, InputError, PeerError, StateError
from nodeagent.host import kinds, udev
from nodeagent.host.nvml import Failure, Probe, Snapshot
from nodeagent.host.pci import NVIDIA
from nodeagent.host.scan import scan
from nodeagent.host.sysfs import SysFs
from nodeagent.kube import sockets
from nodeagent.kube.kubelet_files import PODS, pods_there
from nodeagent.kube.podresources import CheckpointWatch, PodResources
from nodeagent.kube.registration import KUBELET_SOCKET
from nodeagent.kube.waiting import FolderWatch, Revision
from nodeagent.log import new_op
from nodeagent.offer import Offer, selectors
from nodeagent.parts import end, first, kept
from nodeagent.podwitness import PodWitness

ABSENCE_POLL_S = 1.0
"""How soon kubelet is asked again at the earliest while a grant is missing from its list."""
PODS_POLL_S = 3600.0
"""The watch of the pods' folders only makes a release sooner: it needs no poll below it."""
FOLLOW_S = 0.2
"""How long the kernel may take to change cpusets when a CPU comes or goes: it does so after it has told of that."""
LONGEST_REST_S = 1.0
"""Between two scans while the kernel keeps announcing changes."""
KUBELET_POLL_S = 15.0
"""The safety net below the watch of kubelet's folder."""
CONFIG_POLL_S = 5.0
"""The safety net below the watch of the configuration's folder."""
log = structlog.get_logger()


class Machine:
    """Reads the machine again whenever it may have changed, and hands the snapshot to the agent."""

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        families: Sequence[kinds.Kind],
        config: Callable[[], Config],
        holders: Callable[[], Iterable[str] | None] = lambda: None,
    ) -> None:
        """`config` gives the configuration in force, `holders` the cgroups of all who hold hugepages, below the mount
        of cgroup v2; None: they are not all known."""
        self._agent = agent
        self._sysfs = sysfs
        self._families = families
        self._config = config
        self._holders = holders
        self._live = sysfs.root == "/"
        """A captured tree announces nothing, and NVML speaks of another machine."""
        self._probe = Probe()
        self._nvml: Snapshot | Failure | None = None
        self._turn = asyncio.Lock()
        self._deaf = ""

    async def close(self) -> None:
        await self._probe.close()

    async def follow(self) -> None:
        """A new snapshot on every event of the kernel, and once in a while without."""
        while True:
            resync = self._config().resync_seconds
            async with contextlib.aclosing(self._changes(resync)) as changes:
                async for _ in changes:
                    # The first of many events is answered at once; a storm of them may take a tenth of a core.
                    await asyncio.sleep(min(LONGEST_REST_S, 10 * await self.rescan()))
                    if self._config().resync_seconds != resync:
                        break

    async def _changes(self, resync_s: float) -> AsyncGenerator[udev.Change, None]:
        """Events and ticks; only the next tick where events cannot be heard: then it is tried again."""
        if self._live:
            try:
                async with contextlib.aclosing(udev.watch(resync_s=resync_s)) as changes:
                    async for change in changes:
                        self._deaf = ""
                        yield change
            except HostError as error:
                self._say_deaf(str(error), resync_s)
        async with contextlib.aclosing(udev.ticks(resync_s)) as ticks:
            yield await anext(ticks)

    def _say_deaf(self, error: str, resync_s: float) -> None:
        if error != self._deaf:
            log.warning("no-device-events", error=error, resync_s=resync_s)
        self._deaf = error

    async def rescan(self) -> float:
        """Read everything once more; the seconds it took."""
        async with self._turn:
            began = time.perf_counter()
            inventory = await self._scan()
            took_s = time.perf_counter() - began
            metrics.SCANS.observe(took_s)
            if inventory.cpus_outside - self._agent.inventory.cpus_outside:
                # Cpusets follow a moment after a CPU came or went: what is outside only now may be on its way in.
                await asyncio.sleep(FOLLOW_S)
                inventory = await self._scan()
            for warning in sorted(set(inventory.warnings) - set(self._agent.inventory.warnings)):
                log.warning("machine-unreadable", warning=warning)
            self._agent.see(inventory)
            return took_s

    async def _scan(self) -> Inventory:
        config, known = self._config(), self._agent.inventory.pods_cgroup
        read = functools.partial(
            scan,
            self._sysfs,
            self._families,
            selectors(config),
            self._nvml,
            holders=self._holders(),
            cgroup_root=config.pinning.cgroup_root,
            known=known,
        )
        return await asyncio.to_thread(read)

    # ---------------------------------------------------------------- NVML

    async def follow_nvml(self) -> None:
        """Ask NVML now and then, where there is an NVIDIA GPU at all; pass on every Xid."""
        if not self._live:
            return
        xids = asyncio.create_task(kept("xids", self._follow_xids))
        try:
            while True:
                if _nvidia_gpus(self._agent.inventory):
                    await self._ask_nvml()
                await asyncio.sleep(self._config().health.nvml_seconds)
        finally:
            await end([xids])

    async def _ask_nvml(self) -> None:
        self._nvml = await self._probe.snapshot()
        await self.rescan()
        self._agent.observe(nvml_evidence(self._nvml, self._agent.inventory))

    async def _follow_xids(self) -> None:
        async for xid in self._probe.events():
            log.warning("xid", device=xid.pci_address, code=xid.code)
            reason = f"the driver reported Xid {xid.code}"
            self._agent.observe([Evidence(device=xid.pci_address, source="nvml", state=UNHEALTHY, reason=reason)])


def nvml_evidence(nvml: Snapshot | Failure | None, inventory: Inventory) -> list[Evidence]:
    """What NVML's answer says of each NVIDIA GPU."""
    gpus = _nvidia_gpus(inventory)
    if isinstance(nvml, Snapshot):
        shown = {gpu.pci_address for gpu in nvml.gpus}
        return [_shown(gpu, shown) for gpu in gpus if gpu.parent is None]
    if isinstance(nvml, Failure) and not nvml.absent:
        return [Evidence(device=gpu.id, source="nvml", state=UNKNOWN, reason=nvml.reason) for gpu in gpus]
    return []


def _nvidia_gpus(inventory: Inventory) -> list[Device]:
    return [device for device in inventory.devices if device.kind == "gpu" and device.vendor == NVIDIA]


def _shown(gpu: Device, shown: set[str]) -> Evidence:
    if gpu.pci_address in shown or gpu.driver != "nvidia":
        return Evidence(device=gpu.id, source="nvml", state=HEALTHY)
    return Evidence(device=gpu.id, source="nvml", state=UNHEALTHY, reason="NVML does not show this GPU")


class Holders:
    """Learns from kubelet who holds what, and that it is given back."""

    def __init__(
        self,
        agent: Agent,
        pods: PodResources,
        witness: PodWitness,
        offers: Callable[[], Sequence[Offer]],
        plugins: Path,
        ended: Revision,
    ) -> None:
        """plugins: kubelet's device-plugins folder, beside the folders of its pods. ended: rises with each end of a pod
        or a container that the runtime or the kernel tells of."""
        self._agent = agent
        self._pods = pods
        self._witness = witness
        self._offers = offers
        self._plugins = plugins
        self._ended = ended
        self._said = ""
        self._unseen = ""

    async def follow(self, watch: CheckpointWatch) -> None:
        """Kubelet's list after every change of its checkpoint and every end of a pod, when a release is due, and once
        in a while without."""
        with watch, FolderWatch(self._plugins.parent / PODS, poll_s=PODS_POLL_S) as folders:
            seen = self._ended.value
            while True:
                await self._reconcile()
                await self._look_for_ended()
                # Kubelet lists a pod for a moment longer than it lives.
                due_s = 0.0 if self._ended.value != seen else self._agent.look_again_s
                seen = self._ended.value
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if due_s is None else max(due_s, ABSENCE_POLL_S)):
                        await first(watch.wait(), folders.wait(), self._ended.changed(seen))

    async def _reconcile(self) -> None:
        try:
            asked_at = time.monotonic()
            listing = await self._pods.listing()
            witnesses = await self._witness.witnesses(self._agent.ledger, listing)
            found = await self._agent.reconcile(
                listing.holdings, self._offers(), new_op(), asked_at=asked_at, witnesses=witnesses
            )
        except (PeerError, StateError) as error:
            self._say(str(error))
            return
        self._said = ""
        metrics.RELEASES.inc(len(found.released))
        metrics.ADOPTIONS.inc(len(found.adopted))
        _log_grants("released", found.released)
        _log_grants("adopted", found.adopted)

    async def _look_for_ended(self) -> None:
        """What was taken over from kubelet's own managers is in no list of its: the folders of its pods tell."""
        if not any(one.holder.api == KUBELET for one in self._agent.ledger.grants.values()):
            return
        try:
            there = await asyncio.to_thread(pods_there, self._plugins.parent)
            gone = await self._agent.release_ended(there, new_op())
        except (InputError, StateError) as error:
            if str(error) != self._unseen:
                log.warning("ended-pods-unknown", error=str(error))
            self._unseen = str(error)
            return
        self._unseen = ""
        metrics.RELEASES.inc(len(gone))
        _log_grants("released", gone)

    def _say(self, error: str) -> None:
        if error != self._said:
            log.warning("holders-unknown", error=error)
        self._said = error


def _log_grants(event: str, grants: Sequence[Grant]) -> None:
    for grant in grants:
        log.info(event, grant=grant.id, ids=grant.ids, holder=str(grant.holder))


async def kubelets(plugins: Path) -> AsyncGenerator[None, None]:
    """Yield at each start of a kubelet, first for the one that runs already.

    plugins: kubelet's folder of device plugins, where it makes its socket before it calls any plugin.
    """
    before: sockets.Sighting | None = None
    with (
        sockets.SocketWatch(plugins / KUBELET_SOCKET) as kubelet,
        FolderWatch(plugins, poll_s=KUBELET_POLL_S) as folder,
    ):
        while True:
            if (now := kubelet.look()) != before:
                before = now
                yield
            await folder.wait()


async def recoveries(agent: Agent) -> None:
    """Let devices recover when their time has come."""
    seen = 0
    while True:
        due = agent.settle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due):
                seen = await agent.revision.changed(seen)


async def rewrites(path: Path, asked: asyncio.Event) -> AsyncGenerator[str, None]:
    """Why a file is to be read again, whenever it is: it changed, or somebody asked. A file that is written in place is
    found by the poll alone."""
    seen = _content(path)
    with FolderWatch(path.parent, poll_s=CONFIG_POLL_S) as folder:
        while True:
            await first(folder.wait(), asked.wait())
            now, told = _content(path), asked.is_set()
            asked.clear()
            if told or (now != seen and now is not None):
                yield "SIGHUP" if told else "file changed"
            seen = now


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
