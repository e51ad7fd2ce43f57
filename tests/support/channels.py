"""Both ends of gRPC as peers of the product have them: grpcio's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import grpc

_OPTIONS = (
    # By default channels share connections, and with them a back-off of seconds after a refused connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


def channel(path: Path, *, largest_answer_bytes: int = 4 << 20) -> grpc.aio.Channel:
    """A channel to the socket at `path`; it connects on its first call."""
    limit = ("grpc.max_receive_message_length", largest_answer_bytes)
    return grpc.aio.insecure_channel(_address(path), options=(*_OPTIONS, limit))


async def serve(path: Path, add: Callable[[grpc.aio.Server], None]) -> grpc.aio.Server:
    """A started server at `path` with what `add` registers."""
    server = grpc.aio.server()
    add(server)
    server.add_insecure_port(_address(path))
    await server.start()
    return server


def _address(path: Path) -> str:
    return f"unix:{quote(os.fsencode(path))}"
