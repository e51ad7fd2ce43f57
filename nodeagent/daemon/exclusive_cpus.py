"""Wires what looks after the CPUs that containers hold exclusively, besides confining the containers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nodeagent.config.isolation import PinningConfig, TuningConfig
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.memo import kept_by
from nodeagent.core.pinning.device_interrupts import DeviceInterrupts, device_interrupts
from nodeagent.core.pinning.pools import exclusive_cpus
from nodeagent.daemon.paths import Paths
from nodeagent.managers.isolation.manager import MOVED, IsolationManager
from nodeagent.managers.manager import Manager
from nodeagent.managers.on_demand import OnDemand
from nodeagent.managers.pinning.manager import PinningManager
from nodeagent.managers.state_files import TUNING
from nodeagent.state.agent import Agent

if TYPE_CHECKING:
    from nodeagent.managers.tuning.manager import TuningManager

NOT_TUNED = {"cpus": "", "set": 0, "refused": {}, "notes": []}
"""What is shown of the tuning of CPUs where nothing has asked for it."""


class ExclusiveCpus:
    """Intruders on these CPUs, and how they run."""

    def __init__(
        self, agent: Agent, where: Paths, config: Callable[[], PinningConfig], pinning: PinningManager
    ) -> None:
        """`pinning` knows the CPUs of everybody else."""

        def exclusive() -> CpuSet:
            return exclusive_cpus(agent.ledger) & agent.inventory.cpus_usable

        def others() -> CpuSet:
            return pinning.shared_cpus or agent.inventory.cpus_online - agent.ledger.cpus_held

        changed, set_before = pinning.revision.changed, where.state_dir / TUNING

        def tuning() -> TuningManager:
            from nodeagent.managers.tuning.manager import TuningManager

            return TuningManager(where.sysfs, exclusive, config, changed, set_before)

        def is_tuned() -> bool:
            return config().tuning != TuningConfig() or set_before.exists()

        def devices() -> tuple[DeviceInterrupts, ...]:
            ledger, inventory, default = agent.ledger, agent.inventory, config().device_interrupts
            return kept_by(
                ledger,
                "_device_interrupts",
                lambda: device_interrupts(ledger.grants.values(), inventory, default),
                (inventory, default),
            )

        self._isolation = IsolationManager(
            where.sysfs, exclusive, others, config, changed, where.state_dir / MOVED, devices=devices
        )
        self._tuning = OnDemand("tuning", tuning, is_tuned, agent.revisions.ledger)

    @property
    def managers(self) -> Sequence[Manager]:
        """Return the managers, in start order."""
        return self._isolation, self._tuning

    def document(self) -> dict[str, Any]:
        """Return the state of both, in plain types."""
        return {"intruders": self._isolation.document(), "tuning": self._tuning.document() or NOT_TUNED}
