"""What the agent is told to do, and what it answers. Values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from nodeagent.core.ledger.release import Patience
from nodeagent.core.model import health as health_of
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.grant import Grant


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprepared:
    """The outcome of unpreparing claims."""

    released: tuple[Grant, ...] = ()
    living: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Why a claim keeps what it holds, by UID: one of its pods is alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """The part of the configuration that the agent itself applies."""

    boot_id: str = ""
    reserved: CpuSet = EMPTY
    patience: Patience = field(default_factory=Patience)
    recover_s: float = health_of.RECOVER_S
