"""What a claim says of its work queue, and what the queue is set to."""

from __future__ import annotations

import msgspec


class QueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a claim says of a work queue that is made for it. None: as the node's configuration has it."""

    mode: str | None = None
    """dedicated or shared."""
    priority: int | None = None
    """1 to 15, among the queues of its group."""
    threshold: int | None = None
    """Of a shared queue: how many entries its users may fill."""
    block_on_fault: bool | None = None
    """Whether the accelerator waits for pages that are not there, instead of ending the operation with an error."""


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue is set to before it is enabled."""

    mode: str
    priority: int
    threshold: int
    """0 for a dedicated queue."""
    block_on_fault: bool
