"""Partitions AMD's GPUs as configured, and gives back what it has changed once it is configured no longer. Never a GPU
that is held or in use, and never one that an admin partitioned and the configuration does not name.

What is about to change is recorded first, and nothing of the GPU is granted meanwhile. The memory partition is only
requested: the agent loads no driver, and the notes say what waits for it. After kill -9 at any step the next agent
finds in the record what was its own, and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from msgspec.structs import replace

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.config.schema import Config
from nodeagent.core.ledger.exclusion import blocked, excluded_with, things_of
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.partitions.amd import (
    AmdModes,
    AmdPlan,
    AmdRecord,
    AmdRule,
    Kind,
    amd_gpus,
    before_change,
    plans,
    rule_of,
    still_true,
)
from nodeagent.errors import HostError, StateError
from nodeagent.host.amd.modes import AmdGpus
from nodeagent.host.amd.users import kfd_processes, users
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers import state_files
from nodeagent.managers.manager import Manager
from nodeagent.managers.partitions.amd_journal import AmdJournal
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "amd-partitions.lock"
LOCK_S = 20.0
LOOK_S, RETRY_S = 30.0, 60.0
"""How often the GPUs are compared with the configuration without any event; how long a driver that refused is left
alone while the configuration is the same."""
_HOLDER = Holder(api=DEVICE_PLUGIN, resource="a GPU whose partitions are about to change")
log = structlog.get_logger()


class AmdPartitionsManager(Manager):
    """Changes partitions while `lead` is running."""

    name = "AMD partitions"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        *,
        gpus: AmdGpus | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up without changing anything. config: returns the current configuration. rescan: reads the machine again.
        clock: in seconds."""
        self._agent = agent
        self._sysfs = sysfs
        self._news = Revision(*agent.revisions)
        self._gpus = gpus or AmdGpus(sysfs)
        self._journal = AmdJournal(state_dir / state_files.AMD_PARTITIONS, agent.settings.boot_id)
        self._turns = Turns(state_dir / LOCK, "cannot partition GPUs")
        self._config = config
        self._rescan = rescan
        self._clock = clock
        self._shown: Mapping[str, AmdModes | str] = {}
        """What the driver showed last, by PCI address."""
        self._failed: dict[tuple[str, Kind, str], tuple[float, str]] = {}
        """When and why a change was refused, by what it was."""
        self._left: Mapping[tuple[str, Kind], tuple[AmdPlan, str]] = {}
        """What is not as it shall be, and why."""
        self._said = Once("gpus-not-partitioned-as-configured")

    async def close(self) -> None:
        await self._turns.close()

    async def lead(self) -> None:
        """Compare the GPUs with the configuration after each change, and periodically."""
        await after_each(self._news, self.settle, every_s=LOOK_S)

    async def settle(self) -> None:
        """Change what is to be changed now."""
        if self._agent.loss:  # what is held may not be known
            return
        found = await asyncio.to_thread(self._plans)
        left = {(one.gpu, one.kind): (one, one.why) for one in found if one.why}
        for one in found:
            if not one.why and (why := await self._change(one)):
                left[one.gpu, one.kind] = one, why
        if any(not one.why for one in found):
            for one in await asyncio.to_thread(self._plans):
                left.setdefault((one.gpu, one.kind), (one, one.why))
        wanted = {(one.gpu, one.kind, one.wanted) for one in found}
        self._failed = {key: value for key, value in self._failed.items() if key in wanted}
        self._left = {key: (plan, why) for key, (plan, why) in sorted(left.items()) if why}
        self._said.report("; ".join(self.notes()))
        if await asyncio.to_thread(lambda: self._journal.is_outdated() or bool(self._stale())):
            with contextlib.suppress(HostError, StateError):
                async with self._turns.alone(LOCK_S):
                    await self._turns.in_thread(self._tidy_all)

    def _rules(self) -> list[AmdRule]:
        return [
            AmdRule(gpus=tuple(one.gpus), compute=one.compute or "", memory=one.memory or "")
            for one in self._config().amd.partitions
        ]

    def _plans(self) -> tuple[AmdPlan, ...]:
        """Return what differs; blocks."""
        inventory, ledger = self._agent.inventory, self._agent.ledger
        gpus, records = amd_gpus(inventory), self._journal.read()
        self._shown = {one.id: self._look(one.id) for one in gpus}
        return plans(gpus, self._shown, self._rules(), records, blocked(inventory, ledger))

    def _look(self, gpu: str) -> AmdModes | str:
        try:
            return self._gpus.modes(gpu)
        except HostError as error:
            return str(error)

    # ---------------------------------------------------------------- one change

    async def _change(self, plan: AmdPlan) -> str:
        """Make one change. Return why it was not made, or ""."""
        key = plan.gpu, plan.kind, plan.wanted
        at, why = self._failed.get(key, (0.0, ""))
        if why and self._clock() - at < RETRY_S:
            return why
        try:
            # Asked before anything is held back, and again then: to be refused for this moment would cost a pod.
            return await self._turns.in_thread(self._users, plan) or await run_to_end(self._changed(plan))
        except (HostError, StateError) as error:
            self._failed[key] = self._clock(), str(error)
            return str(error)

    async def _changed(self, plan: AmdPlan) -> str:
        async with self._turns.alone(LOCK_S):
            try:
                await self._agent.refresh()
                if plan not in await self._turns.in_thread(self._plans):  # something was granted meanwhile
                    return "it has just been granted, or changed by another program"
                self._hold_back(plan.gpu)
                if self._is_held(plan.gpu):
                    return "it or a part of it is held"
                why = await self._turns.in_thread(self._written, plan)
            finally:
                with contextlib.suppress(HostError):
                    await self._rescan()
                self._hold_back("")
        if not why:
            event = "gpu-partitioned" if plan.kind is Kind.COMPUTE else "gpu-partition-requested"
            log.info(event, gpu=plan.gpu, kind=str(plan.kind), before=plan.found, now=plan.wanted)
        return why

    def _hold_back(self, gpu: str) -> None:
        """Have nothing of a GPU granted, until this is called with ""."""
        things = things_of(self._agent.inventory, [gpu]) if gpu else ()
        held = {gpu: Grant(id=f"amd-{gpu}", holder=_HOLDER, ids=(gpu,), devices=(gpu,), things=things)} if gpu else {}
        self._agent.hold_back(held, by=self.name)

    def _is_held(self, gpu: str) -> bool:
        inventory, ledger = self._agent.inventory, self._agent.newest
        return not excluded_with(inventory, ledger, [gpu]).isdisjoint(ledger.devices_held)

    def _users(self, plan: AmdPlan) -> str:
        device = self._agent.inventory.device_by_id.get(plan.gpu)
        paths = device.paths if device is not None else ()
        return users(self._sysfs, plan.gpu, [one for one in paths if one.startswith("/dev/dri/")])

    def _written(self, plan: AmdPlan) -> str:
        """Change one GPU; in a thread. Return who uses it, or ""."""
        if used := self._users(plan):
            return used
        before, modes = self._journal.read().get(plan.gpu), self._gpus.modes(plan.gpu)
        intended = before_change(plan, modes, before)
        self._journal.write({plan.gpu: intended})
        try:
            self._gpus.change(plan.gpu, plan.kind, plan.wanted)
        except HostError as error:
            self._take_back(plan, before)
            others = kfd_processes(self._sysfs)
            hint = f" (older kernels change none while any program uses KFD: {others})" if others else ""
            raise HostError(f"{error}{hint}") from None
        if plan.kind is Kind.MEMORY:
            self._journal.write({plan.gpu: replace(intended, told=True)})
        else:
            self._tidy(plan.gpu)
        return ""

    def _take_back(self, plan: AmdPlan, before: AmdRecord | None) -> None:
        """What is set from now on is another program's, until the agent tries again."""
        with contextlib.suppress(HostError):
            if plan.kind is Kind.MEMORY or self._gpus.is_unchanged(plan.gpu, plan.found):
                self._journal.write({plan.gpu: before})

    def _stale(self) -> list[str]:
        """Return the GPUs of which something is recorded that holds no longer, as after a reload of the driver."""
        every = ((gpu, one, self._shown.get(gpu, "")) for gpu, one in self._journal.read().items())
        ended = ((gpu, one, modes) for gpu, one, modes in every if not self._gpus.hangs(gpu))
        return [gpu for gpu, one, modes in ended if not isinstance(modes, str) and still_true(one, modes) != one]

    def _tidy_all(self) -> None:
        if self._journal.is_outdated():
            self._journal.write({})
        for gpu in self._stale():
            self._tidy(gpu)

    def _tidy(self, gpu: str) -> None:
        """Forget what is recorded of a GPU and holds no longer."""
        record = self._journal.read().get(gpu)
        if record is not None and (now := still_true(record, self._gpus.modes(gpu))) != record:
            self._journal.write({gpu: now})

    # ---------------------------------------------------------------- what admins see

    def notes(self) -> list[str]:
        """Return what is not as configured, one sentence each."""
        return [f"amd.partitions: {plan}: {why}" for plan, why in self._left.values()]

    def document(self) -> dict[str, Any]:
        """Return the GPUs that are configured or were changed, in plain types; empty if there are none."""
        rules, records, found = self._rules(), self._journal.read(), []
        for gpu, modes in sorted(self._shown.items()):
            rule = rule_of(gpu, modes, rules)
            if rule is None and gpu not in records:
                continue
            shown = AmdModes() if isinstance(modes, str) else modes
            of_kinds = {
                str(kind): {
                    "now": now,
                    "configured": (rule.compute if kind is Kind.COMPUTE else rule.memory) if rule is not None else "",
                    "waits": self._left[gpu, kind][1] if (gpu, kind) in self._left else "",
                }
                for kind, now in ((Kind.COMPUTE, shown.compute), (Kind.MEMORY, shown.memory))
            }
            found.append({"gpu": gpu, **of_kinds})
        return {"partitions": found} if found else {}
