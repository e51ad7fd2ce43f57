"""Sets the time slices of GPUs as grants ask for them, and restores what the GPUs had before.

What a GPU had is durable before it is changed, and stays recorded until it has it again, so that kill -9 at any step
loses nothing. A record is of one boot: the driver starts with its default.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import structlog

from nodeagent.errors import HostError
from nodeagent.host.nvidia_smi import NvidiaSmi
from nodeagent.managers.sharing.journal import SharingJournal, SliceRecord

log = structlog.get_logger()


class TimeSlices:
    """The time slices of a node. Every call blocks; one agent at a time may call it (managers/sharing/manager.py)."""

    def __init__(self, journal: SharingJournal, smi: NvidiaSmi) -> None:
        self._journal = journal
        self._smi = smi
        self._seen: dict[str, SliceRecord] = {}
        """What this agent has read back already: each reading starts a program."""

    def keep(self, wanted: Mapping[str, str], uuids: Mapping[str, str], *, ended: bool) -> dict[str, str]:
        """Give GPUs their time slices. Return why some do not have them, by device.

        wanted: time slices by device. uuids: of the GPUs that are there, by device. ended: whether others that were
        changed are restored, because the ledger is complete.
        """
        errors = self.restore(self._journal.slices().keys() - wanted.keys()) if ended else {}
        for device, interval in wanted.items():
            try:
                self._keep_one(device, interval, uuids.get(device, ""))
            except HostError as error:
                errors[device] = str(error)
        return errors

    def restore(self, devices: set[str]) -> dict[str, str]:
        """Give GPUs the time slice that they had before. Return why some do not have it, by device."""
        errors, recorded = dict[str, str](), self._journal.slices()
        for device in sorted(devices & recorded.keys()):
            try:
                self._restore_one(recorded[device])
            except HostError as error:
                errors[device] = str(error)
        return errors

    def records(self) -> dict[str, SliceRecord]:
        """Return what was changed, by device."""
        return self._journal.slices()

    def _keep_one(self, device: str, interval: str, uuid: str) -> None:
        if not uuid:
            raise HostError(f"cannot set the time slice of {device} to {interval}: its UUID is not known")
        record = self._journal.slices().get(device)
        if record is not None and self._seen.get(device) == record and record.interval == interval:
            return
        now = self._smi.time_slice(uuid)
        if record is None or record.uuid != uuid:
            record = SliceRecord(device=device, uuid=uuid, before=now, interval=interval)
        record = msgspec.structs.replace(record, interval=interval)
        self._journal.keep({record.key: record})
        if now != interval:
            self._smi.set_time_slice(uuid, interval)
            log.info("time-slice-set", device=device, uuid=uuid, interval=interval, before=record.before)
        self._seen[device] = record

    def _restore_one(self, record: SliceRecord) -> None:
        self._seen.pop(record.device, None)
        if self._smi.time_slice(record.uuid) != record.before:
            self._smi.set_time_slice(record.uuid, record.before)
            log.info("time-slice-restored", device=record.device, uuid=record.uuid, interval=record.before)
        self._journal.forget(record.key)
