"""The configuration of a running agent: when it has to be read again, and how all parts take it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog

from nodeagent.aio.folder_watch import FolderWatch
from nodeagent.aio.supervise import race
from nodeagent.config.load import differences, placed
from nodeagent.config.load import load as load_config
from nodeagent.config.schema import Config, keys_applied_at_start
from nodeagent.daemon.foundation import Foundation
from nodeagent.daemon.paths import check_served
from nodeagent.errors import ConfigError
from nodeagent.host.systemd.notify import Notifier
from nodeagent.managers.manager import Manager
from nodeagent.state.audit import CONFIGURATION, Happening
from nodeagent.telemetry import log as log_of

CONFIG_POLL_S = 5.0
"""Fallback for the watch of the configuration's folder."""
log = structlog.get_logger()


class Configuration:
    """Has the managers take a new configuration, or what another kubelet means for the one in force."""

    def __init__(
        self,
        base: Foundation,
        managers: Sequence[Manager],
        rescan: Callable[[], Awaitable[object]],
        notifier: Notifier,
    ) -> None:
        """managers: in the order in which they take it. rescan: reads the machine again."""
        self.asked = asyncio.Event()
        """Set to have the file read again."""
        self.error = ""
        """Why the newest configuration is not in force."""
        self.refused: Mapping[str, str] = {}
        """What cannot be served, as it was when the managers were last told."""
        self._base = base
        self._managers = managers
        self._rescan = rescan
        self._notifier = notifier
        self._turn = asyncio.Lock()

    async def follow(self) -> None:
        """Reload when the file changes or a reload is asked for."""
        path = self._base.where.config_file
        if path is None:
            return
        async with contextlib.aclosing(rewrites(path, self.asked)) as reasons:
            async for why in reasons:
                await self._reload_said(why)

    async def _reload_said(self, why: str) -> None:
        try:
            log.info("configuration-reloaded", why=why, changed=await self.reload())
        except ConfigError as error:
            log.error("configuration-refused", why=why, error=str(error), kept="the old one")

    async def reload(self) -> list[str]:
        """Read the configuration again, apply it and return what changed. On ConfigError the old one stays."""
        async with self._turn:
            self._notifier.reloading()
            try:
                changed = await self._take(self._base.where.config_file)
                self.error = ""
                self._note(f"applied: {'; '.join(changed) or 'nothing has changed'}")
            except ConfigError as error:
                self.error = str(error)
                self._note("refused", self.error)
                raise
            finally:
                self._notifier.ready()
        return changed

    def _note(self, what: str, why: str = "") -> None:
        self._base.agent.record_happenings([Happening(action=CONFIGURATION, what=what, why=why)])

    async def _take(self, path: Path | None) -> list[str]:
        """Apply a configuration. Everything that can be refused comes before anything that changes."""
        base = self._base
        new = load_config(path) if path is not None else base.config
        with placed(path):
            check_served(new, base.families, base.where.kubelet_dir)
            now = base.settings(new)
        changed, base.config = differences(base.config, new), new
        log_of.configure(new.log.level, new.log.format)
        base.agent.apply_settings(now)
        await self._rescan()
        await self.apply(new)
        at_start = keys_applied_at_start()
        return [f"{one} (after a restart)" if one.partition(":")[0] in at_start else one for one in changed]

    async def apply(self, config: Config) -> None:
        """Have all managers take a configuration."""
        self.refused = self._base.refused(config)
        for one in self._managers:
            await one.apply(config)

    async def apply_kubelet_settings(self) -> None:
        """Apply kubelet's settings. A kubelet that starts may reserve and manage other CPUs than before, so look
        before it asks for anything."""
        base = self._base
        if (now := base.settings(base.config)) != base.agent.settings:
            base.agent.apply_settings(now)
        async with self._turn:
            await self.apply(base.config)

    def is_outdated(self) -> bool:
        """Return whether kubelet or other plugins are no longer as they were when the managers were last told."""
        base = self._base
        return base.kubelet.recovered(base.config) or base.refused(base.config) != self.refused


async def rewrites(path: Path, asked: asyncio.Event) -> AsyncGenerator[str, None]:
    """Yield why a file has to be read again: it changed, or a reload was requested. Only the poll finds a file
    that is rewritten in place."""
    seen = _content(path)
    with FolderWatch(path.parent, poll_s=CONFIG_POLL_S) as folder:
        while True:
            await race(folder.wait(), asked.wait())
            now, told = _content(path), asked.is_set()
            asked.clear()
            if told or (now != seen and now is not None):
                yield "SIGHUP" if told else "file changed"
            seen = now


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
