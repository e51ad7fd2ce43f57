"""The status socket, kept served while this agent leads, and who may read it."""

from __future__ import annotations

import grp
from pathlib import Path

import msgspec
import structlog

from nodeagent.admin.http import Handler
from nodeagent.admin.unix_server import UnixHttpServer
from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.config.schema import Config
from nodeagent.managers.manager import Manager

FOLDER_POLL_S = 30.0
"""Fallback for the folder watch."""
log = structlog.get_logger()


class StatusEndpoint(Manager):
    """Serves the status socket, and again if another process removes it."""

    name = "status"

    def __init__(self, path: Path, handler: Handler, config: Config) -> None:
        """path: of the socket. config: names the group that may read it."""
        self._group = config.status.group
        self._readers = status_readers(config)
        self._server = UnixHttpServer(path, handler, group_id=self._readers.group_id)

    async def lead(self) -> None:
        """Serve until cancelled."""
        if self._readers.missing:
            log.warning("no-status-group", group=self._group, reason=self._readers.missing)
        server = self._server
        try:
            with FolderWatch(server.path.parent, poll_s=FOLDER_POLL_S) as folder:
                while True:
                    if server.lost:
                        await server.stop()
                        server.start()
                    await folder.wait()
        finally:
            await server.stop()

    def notes(self) -> list[str]:
        """Return that the configured group does not exist, if so."""
        return [self._readers.missing] if self._readers.missing else []


class StatusReaders(msgspec.Struct, frozen=True):
    """Who may read the status socket in addition to root: the members of a group, if one is configured and exists."""

    group_id: int | None = None
    missing: str = ""
    """Why a configured group may not read it, or ""."""


def status_readers(config: Config) -> StatusReaders:
    """Return the readers that `status.group` names on this host. A group may come later, as from a directory service
    that is not up yet, so a missing one does not stop the agent."""
    name = config.status.group
    if not name:
        return StatusReaders()
    try:
        return StatusReaders(grp.getgrnam(name).gr_gid)
    except KeyError:
        remedy = "only root can read the status socket until the group exists and the agent is restarted"
        return StatusReaders(None, f"status.group: there is no group {name!r} here; {remedy}")
