"""Which work queues are, or are about to be, enabled for claims: a small file, written before the kernel is asked.

After kill -9 at any step it says what to disable. An accelerator is the agent's as long as a queue of it is recorded.
What an earlier boot recorded is gone with it: the kernel keeps no configuration of accelerators.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from nodeagent.core.queues.layout import Layout
from nodeagent.core.queues.settings import Queue
from nodeagent.host.sysfs.record_file import RecordFile
from nodeagent.managers.journal import Journal
from nodeagent.managers.state_files import QUEUES


class Enabled(msgspec.Struct, frozen=True, kw_only=True):
    """One queue that is, or is about to be, enabled."""

    device: str
    """Device.id."""
    claim: str
    """UID."""
    grant: str
    """Grant.id."""
    address: str
    """PCI address of the accelerator."""
    accelerator: str
    """The kernel's name of it, dsa0."""
    queue: str
    """wq0.1"""
    name: str
    """What the queue is called for users; nothing else of the agent's is called so."""
    wanted: Queue
    layout: Layout
    """Of the whole accelerator, if this queue is the first of it."""
    ready: bool = False
    """Whether it was seen enabled, with its node."""
    lost: bool = False
    """Whether it was, and others have disabled it."""


class _File(msgspec.Struct, kw_only=True):
    boot_id: str
    queues: list[Enabled] = []


class QueueJournal(Journal[_File, str, Enabled]):
    """The records of this boot, by device."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        super().__init__(
            RecordFile(state_dir / QUEUES, _File),
            lambda file: {one.device: one for one in file.queues} if file.boot_id == boot_id else {},
            lambda records: _File(boot_id=boot_id, queues=list(records.values())),
            unreadable="queue-records-unreadable",
            left="queues stay enabled",
        )
