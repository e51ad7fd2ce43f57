"""Accepting connections of a listening socket so that none is lost, however the caller ends.

asyncio's own ways lose some: `sock_accept` one that it has taken by the time that it is cancelled, and a Server those
whose transports it builds after its close (CPython 3.11 to 3.13), which nothing closes then.
"""

from __future__ import annotations

import asyncio
import socket

import structlog

ACCEPT_RETRY_S = 0.5
"""Rest after a connection could not be accepted, as when there are too many open files."""
log = structlog.get_logger()


async def next_connection(bound: socket.socket) -> socket.socket:
    """Return the next connection of a listening socket that does not block; it does not block either. What hinders
    one, such as too many open files, is logged and tried again. A caller that is cancelled loses none."""
    while True:
        try:
            connection, _ = bound.accept()
            connection.setblocking(False)
            return connection
        except BlockingIOError:
            await _readable(bound)
        except OSError as error:
            log.warning("connection-not-accepted", error=error.strerror or str(error))
            await asyncio.sleep(ACCEPT_RETRY_S)


async def _readable(bound: socket.socket) -> None:
    """Return once a socket has something to take."""
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(bound, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(bound)
