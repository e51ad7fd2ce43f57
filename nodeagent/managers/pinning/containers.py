"""Which pods, containers and monitors exist and where their cgroups are; and, for a plan, the desired state of each.

There are two sources: the runtime (NRI) reports containers with names and environment, the cgroup watch reports paths.
Either may be first. A container that only the watch has seen has no name unless its bundle has one: most of these are
sandboxes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from nodeagent.aio.revision import Revision
from nodeagent.config.isolation import PinningConfig
from nodeagent.core.events.happenings import PodRef
from nodeagent.core.model.container import RUNNING, STOPPED, Container, PageLimits
from nodeagent.core.model.cpuset import EMPTY
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.topology import HugepagePool
from nodeagent.core.pinning.plan import Pin, PinPlan
from nodeagent.errors import InputError
from nodeagent.host.cgroup.enforcer import Target
from nodeagent.host.cgroup.layout import CONTAINER, MONITOR, POD, Cgroup, CgroupLayout, runtime_path
from nodeagent.host.cgroup.read import MEMBER


class ContainerEntry(msgspec.Struct, kw_only=True):
    """A container, and the status of its confinement."""

    container: Container
    path: str
    """Path of its cgroup, or "" if unknown."""
    named: bool
    """Whether the runtime or its bundle has identified it."""
    ran: bool
    """Whether it ran, or may have run, before it could be confined."""
    asked: bool = False
    """Whether the runtime called before creating it: then it is confined from the start, unless the runtime continued
    without the answer."""
    seen: bool = False
    """Whether its cgroup has been seen and is not known to be gone."""


class ContainerTable:
    """All known containers and pods, from the runtime, bundles and the kernel. Only its methods modify it."""

    def __init__(self, layouts: tuple[CgroupLayout, ...]) -> None:
        self.layouts = layouts
        self.revision = 0
        """Increases with every change."""
        self.ended = Revision()
        """Increases with each end of a pod or container."""
        self.told_by_runtime = False
        """Whether the runtime is currently reporting every container."""
        self._entries: dict[str, ContainerEntry] = {}
        self.entries: Mapping[str, ContainerEntry] = MappingProxyType(self._entries)
        """By container id."""
        self._pod_paths: dict[str, str] = {}
        self.pods: Mapping[str, str] = MappingProxyType(self._pod_paths)
        """Path of each pod's cgroup, by pod UID."""
        self._monitors: dict[str, str] = {}
        """UID of the pod of each monitor, by the path of its cgroup."""
        self._ran: set[str] = set()
        """UIDs of pods that existed before they could be confined."""
        self._refs: Mapping[str, PodRef] = {}
        self._refs_of = 0
        """The revision of _refs."""

    # ---------------------------------------------------------------- what exists

    def containers(self) -> list[Container]:
        """Return all known containers, including stopped ones."""
        return [one.container for one in self._entries.values()]

    def by_path(self) -> dict[str, ContainerEntry]:
        """Return the entries by cgroup path."""
        return {one.path: one for one in self._entries.values() if one.path}

    def pod_of(self, uid: str) -> PodRef | None:
        """Return the pod with a UID, or None if no container has shown its name."""
        if self._refs_of != self.revision:
            named = (one for one in self.containers() if one.pod_uid and one.pod_name)
            self._refs = {one.pod_uid: PodRef(one.namespace, one.pod_name, one.pod_uid) for one in named}
            self._refs_of = self.revision
        return self._refs.get(uid)

    def unnamed(self, pod_uid: str = "") -> frozenset[str]:
        """Return the ids of containers, in one pod or in all, of which only the cgroup has been seen."""
        every = self._entries.items()
        return frozenset(id for id, one in every if not one.named and pod_uid in ("", one.container.pod_uid))

    def is_unnamed(self, container_id: str) -> bool:
        """Return whether a container has not been identified yet."""
        entry = self._entries.get(container_id)
        return entry is None or not entry.named

    def runtime_connected(self, connected: bool) -> None:
        """Record whether the runtime is connected and reports every container."""
        self.told_by_runtime = connected

    def tell(self, container: Container, *, ran: bool = False) -> ContainerEntry:
        """Record a container as the runtime or its bundle describes it; return its entry.

        `ran`: whether it is running already, for one that was not announced before.
        """
        entry = self._entries.get(container.id)
        if entry is None:
            entry = self._entries[container.id] = ContainerEntry(container=container, path="", named=True, ran=ran)
        entry.container = _as_asked(entry.container, container)
        entry.ran, entry.named = entry.ran or (ran and not entry.named), True
        entry.path = entry.path or self._path(container)
        self._pod_of(entry.path, container.pod_uid)
        self._ran |= {container.pod_uid} if ran else set()
        self.revision += 1
        return entry

    @contextlib.contextmanager
    def asking(self, container: Container) -> Iterator[None]:
        """Record a container that the runtime wants to create. If the context ends in an error, forget it again, unless
        its cgroup has appeared because the runtime did not wait for the answer."""
        entry = self.tell(container)
        entry.asked = True
        try:
            yield
        except BaseException:
            if not entry.seen:
                self.forget(container.id)
            raise

    def tell_all(self, containers: Iterable[Container]) -> None:
        """Record all containers of the runtime. A named container that is neither listed nor seen in a cgroup is
        gone."""
        listed = {one.id: one for one in containers}
        every = self._entries.items()
        for gone in [id for id, one in every if one.container.name and not one.seen and id not in listed]:
            self.forget(gone)
        for one in listed.values():
            self.tell(one, ran=one.state == RUNNING)

    def stopped(self, container_id: str) -> None:
        if (entry := self._entries.get(container_id)) is not None:
            entry.container = replace(entry.container, state=STOPPED)
            self.revision += 1
            self.ended.bump()

    def forget(self, container_id: str) -> None:
        if self._entries.pop(container_id, None) is not None:
            self.revision += 1
            self.ended.bump()

    def came(self, cgroup: Cgroup, *, ran: bool = False) -> None:
        """Record a cgroup that was seen. `ran`: it may have existed for a while, so its processes count as having
        run."""
        if cgroup.kind == POD:
            self._pod_paths[cgroup.pod_uid] = cgroup.path
            self._ran |= {cgroup.pod_uid} if ran else set()
            self.revision += 1
        if cgroup.kind == CONTAINER:
            entry = self._entries.get(cgroup.container_id)
            if entry is None:
                bare = Container(id=cgroup.container_id, pod_id="", pod_uid=cgroup.pod_uid, name="")
                entry = ContainerEntry(container=bare, path=cgroup.path, named=False, ran=ran)
                self._entries[cgroup.container_id] = entry
            entry.path, entry.seen = cgroup.path, True
            self.revision += 1
        if cgroup.kind == MONITOR:
            self._monitors[cgroup.path] = cgroup.pod_uid
            self.revision += 1

    def gone(self, cgroup: Cgroup) -> None:
        """Record that a cgroup is gone."""
        if cgroup.kind == POD:
            self._pod_paths.pop(cgroup.pod_uid, None)
            self._ran.discard(cgroup.pod_uid)
            self.revision += 1
            self.ended.bump()
        if cgroup.kind == CONTAINER:
            self.forget(cgroup.container_id)
        if cgroup.kind == MONITOR and self._monitors.pop(cgroup.path, None) is not None:
            self.revision += 1

    def _path(self, container: Container) -> str:
        with contextlib.suppress(InputError):
            return runtime_path(container.cgroup_path) if container.cgroup_path else ""
        return ""

    def _pod_of(self, path: str, uid: str) -> None:
        above = path.rpartition("/")[0]
        found = next((one for layout in self.layouts if (one := layout.parse(above)) is not None), None)
        if found is not None and found.kind == POD and uid:
            self._pod_paths.setdefault(uid, above)

    def ran_before(self, path: str, entry: ContainerEntry | None) -> bool:
        """Return whether the processes in a cgroup may have run before they could be confined.

        `entry` is the container there, or None for a pod's cgroup. A container without a name is a sandbox, which does
        nothing.
        """
        if entry is not None:
            return (entry.ran or entry.asked) and bool(entry.container.name)
        return any(self._pod_paths.get(uid) == path for uid in self._ran)

    def inhabited(self) -> dict[str, list[Container]]:
        """Return the containers, and sandboxes, by the UIDs of pods that have any and a cgroup: kubelet makes none
        before it has set the pod's own limits."""
        found: dict[str, list[Container]] = {}
        for one in self.containers():
            if one.pod_uid in self._pod_paths:
                found.setdefault(one.pod_uid, []).append(one)
        return found

    def pod_ran_before(self, uid: str) -> bool:
        """Return whether a pod existed before it could be confined."""
        return uid in self._ran

    # ---------------------------------------------------------------- desired state

    def targets(self, plan: PinPlan, inventory: Inventory, config: PinningConfig) -> dict[str, Target]:
        """Return the desired state by path; pods come before their containers."""
        whole = {
            size: sum(pool.page_bytes * pool.total_pages for pool in _pools(inventory, size))
            for size in {size for pod in plan.pods.values() for size in pod.hugepages_at_least}
        }
        pods = dict(self._pods(plan, whole, config))
        live = [one for one in self._entries.values() if one.path and one.container.state != STOPPED]
        containers = {one.path: self._target(plan, one.container, config) for one in live}
        return pods | containers | dict(self._of_monitors(plan))

    def _pods(self, plan: PinPlan, whole: dict[int, int], config: PinningConfig) -> Iterator[tuple[str, Target]]:
        for uid, path in self._pod_paths.items():
            pin = plan.pod(uid)
            yield (
                path,
                Target(
                    cpus=pin.cpus,
                    hugepages_at_least=pin.hugepages_at_least,
                    hugepages_above=MappingProxyType({size: whole[size] for size in pin.hugepages_at_least}),
                    let_go=pin.cpus - plan.shared if pin.cpus and config.partition != "none" else EMPTY,
                ),
            )

    def _of_monitors(self, plan: PinPlan) -> Iterator[tuple[str, Target]]:
        """Yield the desired state of monitors whose pod as a whole may run on more than the shared pool. Elsewhere the
        pod's cgroup confines them."""
        for path, uid in self._monitors.items():
            if plan.shared and (plan.pod(uid).cpus or EMPTY) - plan.shared:
                yield path, Target(cpus=plan.shared)

    def _target(self, plan: PinPlan, container: Container, config: PinningConfig) -> Target:
        pin = plan.containers.get(container.id, Pin())
        return Target(
            cpus=pin.cpus,
            mems=pin.mems,
            hugepage_limits=pin.hugepage_limits,
            within=None if pin.exclusive else plan.pod(container.pod_uid).cpus,
            partition=_partition(config) if pin.exclusive and not (pin.pools or pin.lost) else MEMBER,
        )


def _as_asked(before: Container, now: Container) -> Container:
    """Return a container as it is described now, with the resources that kubelet asked for if they are known: later
    descriptions have those that the agent has set."""
    if before.page_limits != PageLimits.FOUND and now.page_limits == PageLimits.FOUND:
        now = replace(now, resources=before.resources, page_limits=before.page_limits)
    return before if before == now else now


def _partition(config: PinningConfig) -> str:
    return MEMBER if config.partition == "none" else config.partition


def _pools(inventory: Inventory, page_bytes: int) -> Iterator[HugepagePool]:
    return (pool for node in inventory.numa_nodes for pool in node.hugepages if pool.page_bytes == page_bytes)
