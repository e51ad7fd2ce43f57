"""Rescans the machine whenever it may have changed, queries NVML, and reports both to the agent. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec.structs import replace

from nodeagent.aio.supervise import cancel_all, supervise
from nodeagent.config.schema import Config
from nodeagent.core.advice.repair import health_notes
from nodeagent.core.dsa.division import Division
from nodeagent.core.model.health import HEALTHY, Evidence, Said, latched_causes
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.xid import ASK_NVML, effect_of
from nodeagent.errors import HostError
from nodeagent.host import uevents as udev
from nodeagent.host.devices import all_kinds
from nodeagent.host.health.source import Readings
from nodeagent.host.health.sources import sources
from nodeagent.host.nvml.client import Failure, Mig, Probe, Snapshot, Xid
from nodeagent.host.nvml.library import has_library
from nodeagent.host.nvml.values import for_scans
from nodeagent.host.pci import driver_binding
from nodeagent.host.snapshot import Selectors, scan
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers.inventory import quarantine
from nodeagent.managers.inventory.gpu_faults import FILE as FAULTS
from nodeagent.managers.inventory.gpu_faults import FaultMemory
from nodeagent.managers.inventory.gpu_health import (
    OF_NVML,
    forgotten,
    instance_evidence,
    not_looked_at,
    nvidia_gpus,
    nvlink_evidence,
    nvml_evidence,
    xid_evidence,
)
from nodeagent.managers.inventory.gpu_sources import readings
from nodeagent.managers.inventory.kernel_health import KernelHealth
from nodeagent.managers.inventory.latches import FILE as LATCHES
from nodeagent.managers.inventory.latches import LatchMemory
from nodeagent.managers.inventory.nvlinks import FILE as NVLINKS
from nodeagent.managers.inventory.nvlinks import NvlinkErrors, NvlinkMemory
from nodeagent.managers.inventory.quarantine import quarantined
from nodeagent.managers.inventory.recovery import recoveries
from nodeagent.managers.manager import Manager
from nodeagent.managers.partitions.table import InstanceTable
from nodeagent.resources.offer import selectors
from nodeagent.state.agent import Agent
from nodeagent.state.audit import HEALTH, Happening
from nodeagent.telemetry import metrics
from nodeagent.telemetry.once import Once

FOLLOW_S = 0.2
"""How long the kernel may take to update cpusets after it has announced that a CPU came or went."""
LONGEST_REST_S = 1.0
"""Longest pause between two scans while the kernel keeps announcing changes."""
log = structlog.get_logger()


class InventoryScanner(Manager):
    """Rescans the machine whenever it may have changed, and passes the snapshot to the agent."""

    name = "machine"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        families: Sequence[all_kinds.Kind],
        state_dir: Path,
        config: Callable[[], Config],
        holders: Callable[[], Iterable[str] | None] = lambda: None,
        instances: InstanceTable | None = None,
        connected_nqns: Callable[[], frozenset[str]] = frozenset,
        divided: Callable[[], Mapping[str, Division]] = dict,
    ) -> None:
        """Set up without reading anything.

        `config` returns the configuration in force; `holders` returns the cgroups of all containers that hold
        hugepages, relative to the cgroup v2 mount, or None if not all are known; `instances` has the MIG instances that
        the agent made; `connected_nqns` returns the NVMe subsystems on the network that it has connected, and blocks;
        `divided` returns the accelerators that it has divided into work queues, by PCI address, and blocks.
        """
        self._instances = instances
        self._connected_nqns = connected_nqns
        self._divided = divided
        self._agent = agent
        self._sysfs = sysfs
        self._families = families
        self._config = config
        self._holders = holders
        self._live = sysfs.root == "/"
        """False for a captured tree: it emits no events, and NVML would describe another machine."""
        binding = functools.partial(driver_binding, sysfs)
        self._latches = LatchMemory(state_dir / LATCHES, agent.settings.boot_id, binding)
        self.kernel_health = KernelHealth(agent, sysfs, config, sources(families))
        self._nvlinks = NvlinkMemory(state_dir / NVLINKS, agent.settings.boot_id)
        self._nvlink_errors = NvlinkErrors()
        self._faults = FaultMemory(state_dir / FAULTS, agent.settings.boot_id, binding)
        self._asks_nvml = self._live or has_library(Path(sysfs.root))
        self.probe = Probe(root=sysfs.root, by_loader=self._live)
        """The only client of NVML."""
        self.answered = asyncio.Event()
        """Set once NVML has answered, or there is nothing to ask it."""
        self._nvml: Snapshot | Failure | None = None
        self._scanned: tuple[object, object] | None = None
        """What NVML said and which MIG instances were the agent's own when the machine was last read."""
        self._turn = asyncio.Lock()
        self._latching = asyncio.Lock()
        """Apart from `_turn`: a scan that hangs delays neither an error of a GPU nor an admin's word."""
        self._ask_now = asyncio.Event()
        """Set when NVML is to be asked before it is due."""
        self._deaf = Once("no-device-events")
        self._unused: Sequence[str] = ()
        """Patterns of health.quarantine that match no device."""

    async def apply(self, config: Config) -> None:
        """Keep devices out before anything is offered."""
        self._keep_out()

    async def close(self) -> None:
        await self.probe.close()

    def notes(self) -> list[str]:
        """Return which devices to keep out are not here, and what an admin can do about the health of others."""
        return [*quarantine.notes(self._unused), *health_notes(self._agent.inventory, self._agent.health)]

    def health_readings(self) -> Mapping[Said, Readings]:
        """Return the numbers that were read of the devices, by device and source, as last seen."""
        gpus = self._nvml.gpus if isinstance(self._nvml, Snapshot) else ()
        there = self._agent.inventory.device_by_id
        of_nvml = {
            (gpu.pci_address, source): numbers
            for gpu in gpus
            if gpu.pci_address in there
            for source, numbers in readings(gpu)
        }
        return {**self.kernel_health.readings(), **of_nvml}

    async def serve(self) -> None:
        """Follow kernel events, the devices' health and NVML, and let devices recover; each continues if another
        fails."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(supervise("machine", self.follow))
            tasks.create_task(supervise("health", self.kernel_health.follow))
            tasks.create_task(supervise("nvml", self.follow_nvml))
            tasks.create_task(supervise("recoveries", lambda: recoveries(self._agent)))

    async def follow(self) -> None:
        """Take a new snapshot on every kernel event, and periodically without one."""
        while True:
            resync = self._config().resync_seconds
            async with contextlib.aclosing(self._changes(resync)) as changes:
                async for change in changes:
                    # The first of many events is handled at once; an event storm may use at most a tenth of a core.
                    await asyncio.sleep(min(LONGEST_REST_S, 9 * await self.rescan(change.arrived_s)))
                    if self._config().resync_seconds != resync:
                        break

    async def _changes(self, resync_s: float) -> AsyncGenerator[udev.MachineChange, None]:
        """Yield events and ticks. If events cannot be received, yield only the next tick; the caller then tries
        again."""
        if self._live:
            try:
                async with contextlib.aclosing(udev.watch(resync_s=resync_s)) as changes:
                    async for change in changes:
                        self._deaf.clear()
                        yield change
            except HostError as error:
                self._deaf.report(str(error), resync_s=resync_s)
        async with contextlib.aclosing(udev.ticks(resync_s)) as ticks:
            yield await anext(ticks)

    async def rescan(self, event_s: float | None = None) -> float:
        """Read everything again and return how many seconds it took. event_s: when the kernel's event came that is the
        reason (time.monotonic), or None if there is another."""
        async with self._turn:
            began = time.perf_counter()
            inventory = await self._scan()
            took_s = time.perf_counter() - began
            metrics.SCANS.observe(took_s)
            if inventory.cpus_outside - self._agent.inventory.cpus_outside:
                # Cpusets lag behind CPU hotplug: a CPU that is outside only now may still be added.
                await asyncio.sleep(FOLLOW_S)
                inventory = await self._scan()
            for warning in sorted(set(inventory.warnings) - set(self._agent.inventory.warnings)):
                log.warning("machine-unreadable", warning=warning)
            self._agent.see(inventory, event_s)
            self._keep_out()
            async with self._latching:
                await self._look_at_latches()
            return took_s

    def _keep_out(self) -> None:
        """Apply what the configuration keeps from being granted."""
        patterns = self._config().health.quarantine
        evidence, freed, self._unused = quarantined(self._agent.inventory, patterns, self._agent.health)
        self._agent.observe(evidence, freed)

    async def _look_at_latches(self) -> None:
        """Apply what was latched before the agent started, and what has ended since with the driver."""
        holding, ended = await asyncio.to_thread(self._latches.standing, list(self._agent.inventory.device_by_id))
        if self._latches.damaged:
            holding = forgotten(self._agent.inventory, LATCHES)
            await asyncio.to_thread(self._latches.keep, holding)
        for device in ended:
            if self._agent.clear_health(device):
                log.info("health-cleared", device=device, why="the machine was rebooted or the driver bound again")
        # What another agent of the node has cleared is no longer in the file.
        standing = {one.device for one in holding}
        for one in latched_causes(self._agent.health):
            there = one.device in self._agent.inventory.device_by_id
            if there and one.device not in standing and self._latches.readable:
                self._agent.clear_health(one.device)
        self._agent.observe(holding)

    async def clear_health(self, device: str, who: str) -> bool:
        """Clear what is remembered against a device, as an admin asks: latched causes, its NVLinks, and what NVML said
        of it. NVML is asked at once: a fault that it still sees comes back. Return whether there was anything."""
        async with self._latching:
            had = self._agent.clear_health(device)
            await asyncio.to_thread(self._latches.clear, device)
            had |= await asyncio.to_thread(self._nvlinks.forget, device)
            known = self._agent.health.get(device)
            said = known.seen.items() if known is not None else ()
            remembered = [(device, source) for source, one in said if source in OF_NVML and one.state != HEALTHY]
            self._agent.observe([], [*remembered, (device, "nvlink")])
        if had or remembered:
            log.info("health-cleared", device=device, why="cleared by an admin", who=who)
            happened = Happening(action=HEALTH, what=f"{device} cleared", why=f"cleared by an admin ({who})")
            self._agent.record_happenings([happened])
            self._ask_now.set()
        return had or bool(remembered)

    async def _scan(self) -> Inventory:
        config, known, nvml = self._config(), self._agent.inventory.pods_cgroup, self._nvml
        read = functools.partial(
            scan,
            self._sysfs,
            self._families,
            nvml=nvml,
            holders=self._holders(),
            cgroup_root=config.pinning.cgroup_root,
            known=known,
        )

        def scanned() -> Inventory:
            selectors = self._selectors(config)
            inventory = read(selectors=selectors)
            self._scanned = for_scans(nvml), selectors.partitions
            return inventory

        return await asyncio.to_thread(scanned)

    def _is_scanned(self) -> bool:
        """Return whether the machine was read with all that NVML and the journal of MIG instances say of it; blocks."""
        return self._scanned == (for_scans(self._nvml), self._selectors(self._config()).partitions)

    def _selectors(self, config: Config) -> Selectors:
        """Return what to look for, with the MIG instances, connections and work queues that the agent made; blocks."""
        found = selectors(config)
        dsa = replace(found.dsa, divided=self._divided)
        found = replace(found, connected_nqns=self._connected_nqns(), dsa=dsa)
        if found.partitions is None or self._instances is None:
            return found
        return replace(found, partitions=self._instances.selector())

    # ---------------------------------------------------------------- NVML

    async def follow_nvml(self) -> None:
        """Query NVML periodically if there is an NVIDIA GPU, and forward every Xid."""
        if not self._asks_nvml:
            self.answered.set()
            return
        xids = asyncio.create_task(supervise("xids", self._follow_xids))
        try:
            while True:
                if nvidia_gpus(self._agent.inventory):
                    await self._look_at_nvml()
                self.answered.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._config().health.nvml_seconds):
                        await self._ask_now.wait()
                self._ask_now.clear()
        finally:
            await cancel_all([xids])

    @property
    def nvml(self) -> Snapshot | Failure | None:
        """NVML's last answer, or None before the first."""
        return self._nvml

    async def ask_nvml(self) -> None:
        """Ask NVML, and report the machine and its health as they are now."""
        await self._look_at_nvml(rescan=True)

    async def _look_at_nvml(self, *, rescan: bool = False) -> None:
        """Ask NVML, and report the health of the GPUs as it is now. The machine is read again if something else than
        that has changed, or if `rescan` says so."""
        asked_s = time.monotonic()
        self._nvml = await self.probe.snapshot()
        if self._instances is not None:
            self._instances.asked(asked_s)
        if rescan or not await asyncio.to_thread(self._is_scanned):
            await self.rescan()
        else:
            async with self._latching:
                await self._look_at_latches()
        nvml, inventory, ignored = self._nvml, self._agent.inventory, self._config().health.ignore
        if not self.answered.is_set():
            self._agent.observe(await asyncio.to_thread(self._faults.standing))
        self._agent.observe(nvml_evidence(nvml, inventory, ignored), not_looked_at(nvml, inventory, ignored))
        of_instances = await asyncio.to_thread(self._of_instances, nvml)
        self._agent.observe(*of_instances)
        if isinstance(nvml, Snapshot):
            gpus = [gpu.id for gpu in nvidia_gpus(inventory) if gpu.parent is None]
            await asyncio.to_thread(self._faults.keep, self._agent.health, gpus)
        await self._look_at_nvlinks(nvml, asked_s)

    def _of_instances(self, nvml: Snapshot | Failure) -> tuple[list[Evidence], list[Said]]:
        """Return the evidence of MIG instances: of the place of one of the agent's own, or of the instance itself.
        Blocks."""
        inventory = self._agent.inventory
        own = self._instances.partitions(inventory) if self._instances is not None else {}

        def part_of(gpu: str, mig: Mig) -> str:
            return own.get((gpu, mig.gpu_instance), f"{gpu}/mig-{mig.gpu_instance}-{mig.compute_instance}")

        return instance_evidence(nvml, inventory, self._agent.health, part_of)

    def _part(self, xid: Xid) -> str | None:
        """Return the device of the agent's own MIG instance that an error is of, or None if it is of none."""
        if self._instances is None or xid.instance is None:
            return None
        return self._instances.partition_of(self._agent.inventory, xid.pci_address, xid.instance[0])

    async def _look_at_nvlinks(self, nvml: Snapshot | Failure, asked_s: float) -> None:
        errors: Mapping[str, str] = {}
        if isinstance(nvml, Snapshot):
            await asyncio.to_thread(self._nvlinks.learn, nvml.gpus)
            errors = self._nvlink_errors.grown(nvml.gpus, asked_s)
        ignored = "nvlink" in self._config().health.ignore
        active_once = {} if ignored else self._nvlinks.active_once
        self._agent.observe(*nvlink_evidence(nvml, self._agent.inventory, active_once, errors))

    async def _follow_xids(self) -> None:
        async for xid in self.probe.events():
            effect = effect_of(xid.code)
            log.warning("xid", device=xid.pci_address, code=xid.code, effect=effect, instance=xid.instance)
            metrics.XIDS.labels(xid.pci_address, str(xid.code), effect).inc()
            evidence = xid_evidence(xid, self._agent.inventory, self._part(xid))
            async with self._latching:
                self._agent.observe(evidence)
                # The GPU may have left the bus already: the agent knows nothing of it, and it may come back.
                away = [one for one in evidence if one.latched and one.device not in self._agent.health]
                await asyncio.to_thread(self._latches.keep, [*latched_causes(self._agent.health), *away])
            if xid.code in ASK_NVML:
                self._ask_now.set()
