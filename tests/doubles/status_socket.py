"""A status socket with the page of the agent in front of any picture: as large as wanted, and changed at will."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nodeagent.admin.http import HttpAnswer, HttpRequest, problem
from nodeagent.admin.unix_server import UnixHttpServer
from nodeagent.admin.web.events import Events
from nodeagent.admin.web.page import asset, picture
from nodeagent.aio.revision import Revision
from nodeagent.core.model.cpuset import EMPTY
from nodeagent.core.model.grant import Grant
from nodeagent.core.model.health import NO_HEALTH
from nodeagent.core.model.inventory import Inventory
from nodeagent.state.decisions import Revisions

PINNING = {"mode": "off", "unsupported": "", "containers": 0, "pinned": []}
STATUS: dict[str, Any] = {
    "version": "1.0",
    "ready": False,
    "not_ready": ["a reason <b>in markup</b>"],
    "boot_id": "b",
    "inventory": {"generation": 1, "cpus_reserved": "", "warnings": []},
    "refused": {"nodeagent.dev/gpu": "another plugin offers it"},
    "pinning": PINNING,
    "conflicts": [],
    "disputed": [],
    "notes": [],
    "config_error": "",
    "config_file": "",
}
HEALTH = [
    {
        "device": "0000:81:00.0",
        "state": "unhealthy",
        "reason": "no carrier",
        "causes": [{"source": "carrier", "state": "unhealthy", "reason": "no carrier on ens0f0", "latched": False}],
    }
]


class StatusSocket:
    """What it shows can be replaced while it is served."""

    def __init__(self, inventory: Inventory, grants: Sequence[Grant], beat_s: float = 15.0) -> None:
        settings = SimpleNamespace(reserved=EMPTY)
        self.agent: Any = SimpleNamespace(
            inventory=inventory,
            ledger=SimpleNamespace(grants={}, foreign={}),
            settings=settings,
            health=NO_HEALTH,
            revisions=Revisions(Revision(), Revision(), Revision()),
        )
        self.events = Events(self.agent, beat_s)
        self.show(grants)

    def show(self, grants: Sequence[Grant]) -> None:
        """Replace what is held."""
        self.agent.ledger.grants = {one.id: one for one in grants}
        self.agent.revisions.ledger.bump()

    async def handle(self, request: HttpRequest) -> HttpAnswer:
        documents: dict[str, Any] = {"/v1/status": STATUS, "/v1/health": HEALTH}
        if request.path in documents:
            return HttpAnswer(200, json.dumps(documents[request.path]).encode())
        if request.path == "/v1/map":
            return picture(self.agent)
        if request.path == "/v1/events":
            return self.events.answer()
        try:
            return asset(request.path)
        except KeyError:
            return problem(404, f"cannot find {request.path}")


@contextlib.asynccontextmanager
async def status_socket(path: Path, shown: StatusSocket) -> AsyncIterator[StatusSocket]:
    """It, served at a path."""
    server = UnixHttpServer(path, shown.handle)
    server.start()
    try:
        yield shown
    finally:
        await server.stop()
