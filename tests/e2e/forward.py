"""Connections to one address forwarded to another, which kube-proxy does on a real node."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

CHUNK_BYTES = 65536
Address = tuple[str, int]


@contextlib.contextmanager
def forwarding(listen: Address, server: Address) -> Iterator[None]:
    """Forward for as long as the block runs. OSError where the address is in use."""

    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.create_connection(server) as other:
                back = threading.Thread(target=_pump, args=(other, self.request), daemon=True)
                back.start()
                _pump(self.request, other)
                back.join()

    with _Server(listen, Connection) as forwarder:
        threading.Thread(target=forwarder.serve_forever, daemon=True).start()
        yield
        forwarder.shutdown()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    block_on_close = False


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Until the source has ended."""
    with contextlib.suppress(OSError):
        while some := source.recv(CHUNK_BYTES):
            sink.sendall(some)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
