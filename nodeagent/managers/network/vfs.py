"""Keeps as many virtual functions as the configuration asks for: at the start, after a reload, and of adapters that are
plugged in.

A number is recorded before it is written. Functions that would go are held back first, so that none is granted
meanwhile; what is held, in use, or was made by others stays, and a note says so. A driver that refuses is asked again
after RETRY_S.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.config.schema import Config
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.network.vfs import VfPlan, VfRule, plans
from nodeagent.errors import HostError, StateError
from nodeagent.host.sriov import VirtualFunctions
from nodeagent.host.sysfs.sysfs import SysFs
from nodeagent.managers import state_files
from nodeagent.managers.manager import Manager
from nodeagent.managers.network.vf_journal import VfJournal
from nodeagent.managers.turns import Turns
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOCK = "vfs.lock"
LOCK_S = 20.0
LOOK_S, RETRY_S = 30.0, 60.0
"""How often the machine is compared with the configuration without any event; how long a driver that refused is left
alone while the configuration is the same."""
_HOLDER = Holder(api=DEVICE_PLUGIN, resource="virtual functions that are about to change")
log = structlog.get_logger()


class VfsManager(Manager):
    """Makes virtual functions while `lead` is running."""

    name = "virtual functions"

    def __init__(
        self,
        agent: Agent,
        sysfs: SysFs,
        state_dir: Path,
        config: Callable[[], Config],
        rescan: Callable[[], Awaitable[object]],
        *,
        functions: VirtualFunctions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up without changing anything. config: returns the current configuration. rescan: reads the machine again.
        clock: in seconds."""
        self._agent = agent
        self._news = Revision(*agent.revisions)
        self._functions = functions or VirtualFunctions(sysfs)
        self._journal = VfJournal(state_dir / state_files.VFS, agent.settings.boot_id)
        self._turns = Turns(state_dir / LOCK, "cannot change virtual functions")
        self._config = config
        self._rescan = rescan
        self._clock = clock
        self._failed: dict[tuple[str, int], tuple[float, str]] = {}
        """When and why a number was refused, by physical function and number."""
        self._problems: Mapping[str, str] = {}
        self._said = Once("virtual-functions-not-as-configured")

    async def close(self) -> None:
        await self._turns.close()

    def notes(self) -> list[str]:
        """Return what is not as configured, one sentence each."""
        return [f"network.vfs: {pf}: {why}" for pf, why in self._problems.items()]

    async def lead(self) -> None:
        """Compare the machine with the configuration after each change, and periodically."""
        await after_each(self._news, self.settle, every_s=LOOK_S)

    async def settle(self) -> None:
        """Change what is to be changed now."""
        found = self._plans()
        if not found and not self._problems:
            return
        problems = {one.pf: f"{one.wanted} wanted, {one.found} there: {one.why}" for one in found if one.why}
        for one in found:
            if one.due and (why := await self._change(one)):
                problems[one.pf] = why
        self._failed = {key: value for key, value in self._failed.items() if key in {(p.pf, p.wanted) for p in found}}
        self._problems = problems
        self._said.report("; ".join(self.notes()))

    def _plans(self) -> tuple[VfPlan, ...]:
        rules = [
            VfRule(match=one.match, count=one.count, autoprobe=one.drivers_autoprobe)
            for one in self._config().network.vfs
        ]
        if not rules or self._agent.loss:  # what is held may not be known
            return ()
        return plans(self._agent.inventory, self._agent.ledger, rules, self._journal.read())

    async def _change(self, plan: VfPlan) -> str:
        """Change one number. Return why it was not done, or ""."""
        at, why = self._failed.get((plan.pf, plan.wanted), (0.0, ""))
        if why and self._clock() - at < RETRY_S:
            return why
        try:
            await run_to_end(self._changed(plan))
        except (HostError, StateError) as error:
            self._failed[plan.pf, plan.wanted] = self._clock(), str(error)
            return str(error)
        self._failed.pop((plan.pf, plan.wanted), None)
        return ""

    async def _changed(self, plan: VfPlan) -> None:
        async with self._turns.alone(LOCK_S):
            held = [Grant(id=f"vfs-{id}", holder=_HOLDER, ids=(id,), devices=(id,)) for id in plan.vfs]
            try:
                await self._agent.refresh()
                if plan not in self._plans():  # something was granted meanwhile
                    return
                self._agent.hold_back({one.id: one for one in held}, by=self.name)
                if any(self._is_held(id) for id in (plan.pf, *plan.vfs)):
                    return
                await self._turns.in_thread(self._write, plan)
            finally:
                with contextlib.suppress(HostError):
                    await self._rescan()
                self._agent.hold_back({}, by=self.name)
        log.info("virtual-functions-made", pf=plan.pf, before=plan.found, now=plan.wanted)

    def _is_held(self, id: str) -> bool:
        return any(id in (*one.devices, *one.shares) for one in self._agent.newest.grants.values())

    def _write(self, plan: VfPlan) -> None:
        """In a thread. Killed at any step, the next agent finds what it may remove, and completes it."""
        if plan.found:
            self._functions.remove(plan.pf, plan.found)
        self._journal.write(plan.pf, plan.wanted)
        if plan.wanted:
            try:
                self._functions.make(plan.pf, plan.wanted, autoprobe=plan.autoprobe)
            except HostError:
                self._forget(plan.pf)
                raise

    def _forget(self, pf: str) -> None:
        """What is made from now on is another program's, until the agent tries again."""
        with contextlib.suppress(HostError):
            if self._functions.has_none(pf):
                self._journal.write(pf, 0)
