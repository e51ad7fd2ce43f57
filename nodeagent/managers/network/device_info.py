"""Keeps the device information files of granted adapters in a folder where CNI meta-plugins such as Multus look for
them.

The files are a function of the ledger, the inventory and the configuration. They are written after a decision is
durable and before kubelet is answered, restored if they are missing, and removed after the release; what a killed agent
left is removed by the next. The folder belongs to all plugins: which resources' files in it are the agent's is recorded
before the first of them is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from nodeagent.aio.revision import Revision
from nodeagent.aio.supervise import after_each, run_to_end
from nodeagent.config.schema import Config
from nodeagent.core.deviceplugin.devices import DeviceResource
from nodeagent.core.model.device import Device
from nodeagent.core.network.device_info import files_of, resource_of_file
from nodeagent.errors import HostError
from nodeagent.host.devices import all_kinds
from nodeagent.host.sysfs import atomic_file as files
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.manager import Manager
from nodeagent.resources.offer import Offer, offers
from nodeagent.state.agent import Agent
from nodeagent.telemetry.once import Once

LOOK_S = 30.0
"""How often the folder is compared with the ledger without any change of it."""
_MODE = 0o444
log = structlog.get_logger()


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A resource whose files may be in a folder."""

    folder: str
    resource: str


class DeviceInfoManager(Manager):
    """The files. `lead` removes too; `granted` is for each agent that answers kubelet."""

    name = "device information"

    def __init__(
        self, agent: Agent, families: Sequence[all_kinds.Kind], memory: Path, config: Callable[[], Config]
    ) -> None:
        """Set up without writing anything. memory: the file of what is recorded. config: returns the current
        configuration."""
        self._agent = agent
        self._news = Revision(*agent.revisions)
        self._families = families
        self._memory = memory
        self._config = config
        self._alone = asyncio.Lock()
        self._failing = Once("device-info-not-kept")

    def notes(self) -> list[str]:
        """Return why files are not as they should be."""
        return [f"network.deviceInfoDir: {self._failing.last}"] if self._failing.last else []

    async def granted(self) -> None:
        """Write the missing files of what is granted. A failure is reported and holds up no pod: CNI plugins do without
        the file."""
        await run_to_end(self._keep(remove=False))

    async def lead(self) -> None:
        """Write missing files and remove those of what is no longer held: after each change, and periodically."""
        await after_each(self._news, self.settle, every_s=LOOK_S)

    async def settle(self) -> None:
        """Look once, as `lead` does."""
        await self._agent.refresh()
        await run_to_end(self._keep(remove=True))

    async def _keep(self, *, remove: bool) -> None:
        async with self._alone:
            folder, wanted, shown = self._wanted()
            # A loss of the ledger may hide what is held: nothing is removed until it is found again.
            gone = remove and not self._agent.loss
            try:
                await asyncio.to_thread(self._write, folder, wanted, shown)
                if gone:
                    await asyncio.to_thread(self._remove, folder, wanted, shown)
            except HostError as error:
                self._failing.report(str(error))
            else:
                self._failing.clear()

    # ---------------------------------------------------------------- what is wanted

    def _wanted(self) -> tuple[str, Mapping[str, bytes], list[_Shown]]:
        """Return the folder, "" for none; the content of its files, by name; whose files these are."""
        config = self._config()
        folder = config.network.device_info_dir
        if not folder:
            return "", {}, []
        mine = [one for one in offers(config, self._families) if one.resource.kind == "nic"]
        resources = {one.name: one.config.vhost_net for one in mine}
        grants = self._agent.newest.grants.values()
        wanted = files_of(self._agent.inventory, grants, resources, lambda device: _by_claims(mine, device))
        return folder, wanted, [_Shown(folder=folder, resource=name) for name in resources]

    # ---------------------------------------------------------------- in a thread

    def _write(self, folder: str, wanted: Mapping[str, bytes], shown: Sequence[_Shown]) -> None:
        if wanted:
            self._record(lambda known: [*known, *(one for one in shown if one not in known)])
        for name, content in wanted.items():
            if files.replace(Path(folder) / name, content, mode=_MODE, durable=False):
                log.debug("device-info-written", file=name)

    def _remove(self, folder: str, wanted: Mapping[str, bytes], shown: Sequence[_Shown]) -> None:
        known = _load(self._memory)
        for where in sorted({one.folder for one in known}):
            mine = [one.resource for one in known if one.folder == where]
            keep = wanted if where == folder else {}
            for path in files.entries(Path(where)):
                if resource_of_file(path.name, mine) and path.name not in keep:
                    files.remove(path, durable=False)
                    log.info("device-info-removed", file=path.name)
        done = [one for one in known if not (wanted and one in shown)]
        self._record(lambda now: [one for one in now if one not in done])

    def _record(self, change: Callable[[list[_Shown]], list[_Shown]]) -> None:
        """Record what a function makes of what is recorded, unless that is the same."""
        with RecordFile(self._memory, list[_Shown]).alone() as save:
            known = _load(self._memory)
            if (after := change(known)) != known:
                save(after or None)


def _by_claims(mine: Iterable[Offer], device: Device) -> str:
    """Return the full name of the resource through which claims get a device, or "" if there is none."""
    serving = (one.resource for one in mine if one.by_dra and isinstance(one.resource, DeviceResource))
    return next((one.name for one in serving if one.serves(device)), "")


def left_files(memory: Path) -> list[Path]:
    """Return the files that an agent left. memory: the file of what is recorded. Raise HostError if it cannot be
    read."""
    known = _load(memory)
    return [
        path
        for folder in sorted({one.folder for one in known})
        for path in files.entries(Path(folder))
        if resource_of_file(path.name, [one.resource for one in known if one.folder == folder])
    ]


def _load(memory: Path) -> list[_Shown]:
    return RecordFile(memory, list[_Shown]).load() or []
