"""The enforcing side of the agent: connected to the container runtime, watching control groups, reading back.

Only the agent that leads does this: a runtime takes one answer about a container, not two. Where control groups are not
of version 2 nothing is enforced, which is said; where they cannot be written the runtime has to do it all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from nodeagent.agent import Agent
from nodeagent.config import Config, PinningConfig
from nodeagent.confining import Confining
from nodeagent.core.containers import Container
from nodeagent.core.pinning import Pin
from nodeagent.core.sizes import format_size
from nodeagent.errors import HostError
from nodeagent.host import bundles
from nodeagent.host.cgroup import Reader, hierarchy, page_sizes
from nodeagent.host.cgroupnames import CONTAINER, QOS, TOP, Cgroup
from nodeagent.host.cgroupwatch import CAME, GONE, LOOK, WRITTEN, Change, Watch
from nodeagent.host.enforce import Enforcer
from nodeagent.host.slicedropins import SliceDropins
from nodeagent.host.sysfs import SysFs
from nodeagent.nri.plugin import NriPlugin
from nodeagent.offer import CPU
from nodeagent.ownership import Fetch, Ownership
from nodeagent.parts import kept
from nodeagent.pinhandler import PinHandler
from nodeagent.pinroom import Place, Room
from nodeagent.slicetelling import SliceTelling

NAME = "nodeagent"
"""Among the runtime's plugins."""
UNITS = "run/systemd/system"
"""systemd's folder of runtime units."""
SYNCHRONIZE_S = 5.0
"""How long the runtime may take to list its containers before what is known without it has to do."""
OFF, NRI, CGROUP = "off", "nri", "cgroup"
log = structlog.get_logger()


class PinServing:
    """Building it starts nothing and reads what control groups there are."""

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        room: Room,
        plugins: Path,
        config: Callable[[], PinningConfig],
        fetch: Fetch,
    ) -> None:
        """plugins: kubelet's folder of device plugins. fetch: a claim's object from the API server."""
        self._agent = agent
        self._sysfs = sysfs
        self._config = config
        self._started_with = config()
        found = hierarchy(sysfs)
        self.unsupported = found.unsupported
        """Why nothing can be enforced here; "": it can."""
        self._layouts = room.layouts
        writable = bool(found.mount) and os.access(f"{found.mount}/cgroup.procs", os.W_OK)
        reader = Reader(found.mount, page_sizes(sysfs))
        self._enforcer = Enforcer(reader, self._layouts) if writable and not found.unsupported else None
        self._mount = found.mount
        self._room = room
        self.confining = Confining(agent, self._room, self._enforcer, Ownership(agent, plugins, fetch), config)
        units = Path(sysfs.path(UNITS))
        self.confining.dropins = tuple(SliceDropins(units, one) for one in self._layouts)
        self._plugin: NriPlugin | None = None
        self._listed = asyncio.Event()
        self._seen = False
        """Whether all control groups that there are have been looked at."""

    @property
    def mode(self) -> str:
        """What is done: nothing, by the runtime's questions, or by what appears among control groups."""
        wanted = self._started_with.mode
        if self.unsupported or wanted == OFF:
            return OFF
        connected = self._plugin is not None and self._plugin.standing.connected
        return NRI if wanted == NRI or (wanted != CGROUP and connected) else CGROUP

    def go_by(self, config: Config, kubelet_confines: bool) -> None:
        """Go by another configuration, or another kubelet, whose CPU manager confines all containers or none."""
        self.confining.cpus_served = any(one.kind == CPU for one in config.served)
        self.confining.kubelet_confines = kubelet_confines
        self._agent.revision.bump()

    def page_holders(self) -> list[str] | None:
        """Paths of the control groups of all who hold hugepages; None: they are not all known."""
        if not self._seen:
            return None
        pins = self.confining.plan().containers
        places = [self._room.places.get(id) for id, pin in pins.items() if any(pin.hugepage_limits.values())]
        return [one.path for one in places if one is not None and one.path]

    # ---------------------------------------------------------------- running

    async def run(self) -> None:
        """Until cancelled; what was made so stays so."""
        if self._started_with.mode == OFF:
            return
        if self.unsupported:
            log.warning("nothing-is-pinned", reason=self.unsupported)
            return
        async with asyncio.TaskGroup() as tasks:
            if self._started_with.mode != CGROUP:
                tasks.create_task(self._serve_runtime())
                await self._synchronized()
            tasks.create_task(kept("pins", self._follow_agent))
            if self._enforcer is not None:
                tasks.create_task(kept("control groups", self._follow_cgroups))
                tasks.create_task(kept("systemd's slices", SliceTelling(self.confining, self._sysfs).run))

    async def _serve_runtime(self) -> None:
        config = self._started_with
        handler = PinHandler(self._agent, self.confining, self._config)
        self._plugin = NriPlugin(Path(config.nri_socket), NAME, config.nri_index, handler, on_change=self._runtime_news)
        await self._plugin.run()

    def _runtime_news(self) -> None:
        self._room.told_by_runtime = self._plugin is not None and self._plugin.standing.connected
        if self._room.told_by_runtime:
            self._listed.set()
        self._agent.revision.bump()

    async def _synchronized(self) -> None:
        """Wait for the runtime to tell what there is, where there is one that may: until then a container that holds
        CPUs could be taken for one that does not."""
        if os.path.exists(self._started_with.nri_socket):  # noqa: ASYNC240, PTH110
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SYNCHRONIZE_S):
                    await self._listed.wait()

    async def _follow_agent(self) -> None:
        """Whatever changes the plan is put in force: grants that ended give back their CPUs, new ones take theirs."""
        while True:
            seen = self._agent.revision.value
            await self.confining.settle()
            await self._agent.revision.changed(seen)

    async def _follow_cgroups(self) -> None:
        with Watch(self._mount, self._layouts, poll_s=self._config().verify_seconds) as watch:
            while True:
                await self._take(await watch.changes())
                if not self._seen:
                    await self.confining.tidy()
                self._seen = True

    async def _take(self, changes: Sequence[Change]) -> None:
        """What came is confined, what was written to is read back; now and then everything is."""
        named = await asyncio.to_thread(self._named, [one.cgroup for one in changes if one.what == CAME and one.cgroup])
        # From here on without a pause: who asks for a plan in between must not take a known container for a stranger.
        for one in changes:
            if one.cgroup is not None and one.what == CAME:
                self.confining.again(one.path)
                self._room.came(one.cgroup)
            elif one.cgroup is not None and one.what == GONE:
                self._room.gone(one.cgroup)
        for container in named:
            self._room.tell(container)
        for container in named:
            if why := await self.confining.doubt(container):
                log.warning("holder-unknown", container=container.id, error=why)
        for one in changes:
            if one.what == GONE:
                await self.confining.forget(one.path)
        await self.confining.settle()
        if any(one.what == LOOK for one in changes):
            await self.confining.verify()
            await self.confining.look_at_quotas()
            return
        # Of what came, nobody told what was written before it was watched.
        written = {one.path: None for one in changes if one.what in (CAME, WRITTEN)}
        found = {one.path for one in await self.confining.verify(written)}
        # What is in effect below follows without a word: from a pod only where it was not what it is to be.
        heads = tuple(f"{path}/" if path else "" for path in written if path in found or self._is_above_pods(path))
        if heads:
            await self.confining.verify([path for path in self.confining.applied() if path.startswith(heads)])

    def _is_above_pods(self, path: str) -> bool:
        place = next((found for one in self._layouts if (found := one.parse(path)) is not None), None)
        return place is None or place.kind in (TOP, QOS)

    def _named(self, cgroups: Iterable[Cgroup]) -> list[Container]:
        """What is known of containers and sandboxes that nobody announced."""
        found = []
        for id in (one.container_id for one in cgroups if one.kind == CONTAINER):
            try:
                container = bundles.read(self._sysfs, id) if id not in self._room.places else None
            except HostError as error:
                log.warning("container-not-known", container=id, error=str(error))
                continue
            if container is not None:
                found.append(container)
        return found

    # ---------------------------------------------------------------- what it looks like

    def document(self) -> dict[str, Any]:
        """How containers are confined, in plain types."""
        plan, standing = self.confining.plan(), self._plugin.standing if self._plugin is not None else None
        places = sorted(self._room.places.values(), key=lambda one: (_pod(one), one.container.name, one.container.id))
        pins = [(one, plan.containers.get(one.container.id, Pin())) for one in places]
        return {
            "mode": self.mode,
            "unsupported": self.unsupported,
            "runtime": f"{standing.runtime} {standing.version}".strip() if standing else "",
            "connected": standing.connected if standing else False,
            "reason": standing.reason if standing else "",
            "shared_cpus": str(plan.shared),
            "containers": len(places),
            "drifts": sum(one.drifts for one in places) + sum(self._room.drifts.values()),
            "errors": dict(self.confining.errors),
            "pinned": [self._place(one, pin) for one, pin in pins if pin.grants or pin.unproven],
        }

    def _place(self, place: Place, pin: Pin) -> dict[str, Any]:
        state = self._enforcer.states.get(place.path) if self._enforcer is not None else None
        pod = self._room.pods.get(place.container.pod_uid, "")
        return {
            "namespace": place.container.namespace,
            "pod": place.container.pod_name,
            "pod_uid": place.container.pod_uid,
            "container": place.container.name,
            "id": place.container.id,
            "state": place.container.state,
            "grants": list(pin.grants),
            "granted_cpus": str(pin.held),
            "effective_cpus": str(state.cpus_effective or "") if state is not None else "",
            "granted_mems": str(pin.mems or ""),
            "effective_mems": str(state.mems_effective or "") if state is not None else "",
            "hugepage_limits": {format_size(size): limit for size, limit in pin.hugepage_limits.items()},
            "lost_cpus": str(pin.lost),
            "drifts": place.drifts + self._room.drifts.get(place.container.pod_uid, 0),
            "quota_cpus": place.quota_cpus,
            "unproven": list(pin.unproven),
            "error": self.confining.errors.get(place.path, "") or self.confining.errors.get(pod, ""),
        }


def _pod(place: Place) -> tuple[str, str]:
    return place.container.namespace, place.container.pod_name
