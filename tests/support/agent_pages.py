"""The status socket of an agent that lives in the test: its real pages, over a real socket."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodeagent.admin.status import Status
from nodeagent.admin.unix_server import UnixHttpServer
from nodeagent.kube.kubelet.registration import Registration
from nodeagent.resources.offer import Offer
from nodeagent.state.agent import Agent


class AgentAlone:
    """What the pages need of a daemon, where there is only an agent."""

    def __init__(self, agent: Agent, offers: Sequence[Offer] = ()) -> None:
        self.agent = agent
        self.started_at = time.time()
        self.config_error = ""
        self.config_file = ""
        self.notes: list[str] = []
        self.refused: Mapping[str, str] = {}
        self._offers = tuple(offers)

    def offers(self) -> Sequence[Offer]:
        return self._offers

    def configured(self) -> Sequence[Offer]:
        return self._offers

    def registrations(self) -> Sequence[Registration]:
        return ()

    def kubelet_document(self) -> dict[str, Any]:
        return {"pid": None, "error": "", "settings": {}, "sources": []}

    def dra_document(self) -> dict[str, Any]:
        return {}

    def gpus_document(self) -> dict[str, Any]:
        return {"sharing": {}, "mig": {}}

    def pinning_document(self) -> dict[str, Any]:
        return {"mode": "off", "unsupported": "a test", "pinned": []}

    def health_readings(self) -> Mapping[tuple[str, str], Mapping[str, int]]:
        return {}

    async def clear_health(self, device: str) -> bool:
        return self.agent.clear_health(device)

    def not_ready(self) -> Sequence[str]:
        return ()

    async def reload(self) -> list[str]:
        return []


class _Metrics:
    async def text(self) -> bytes:
        return b"# HELP nodeagent_grants Grants.\n# TYPE nodeagent_grants gauge\nnodeagent_grants 1\n"


@contextlib.asynccontextmanager
async def pages_of(agent: Agent, path: Path, offers: Sequence[Offer] = ()) -> AsyncIterator[AgentAlone]:
    """Serve the pages of an agent at a socket."""
    alone = AgentAlone(agent, offers)
    server = UnixHttpServer(path, Status(alone, _Metrics()).handle)  # type: ignore[arg-type]
    server.start()
    try:
        yield alone
    finally:
        await server.stop()
