"""What the agent is told to do, and what it answers. Values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from nodeagent.core.ledger.release import Patience
from nodeagent.core.model import health as health_of
from nodeagent.core.model.cpuset import EMPTY, CpuSet
from nodeagent.core.model.grant import Grant


class Unprepared(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of unpreparing claims."""

    released: tuple[Grant, ...] = ()
    living: Mapping[str, str] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    """Why a claim keeps what it holds, by UID: one of its pods is alive."""


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the configuration that the agent itself applies."""

    boot_id: str = ""
    reserved: CpuSet = EMPTY
    patience: Patience = msgspec.field(default_factory=Patience)
    recover_s: float = health_of.RECOVER_S
