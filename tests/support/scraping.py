"""A scraper on a TCP socket, with TLS where wanted, and ports for agents to listen on."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


async def scrape(
    port: int,
    path: str = "/metrics",
    method: str = "GET",
    headers: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> tuple[int, str, str]:
    """Status, head and body of one answer. Raises OSError where none comes."""
    name = "localhost" if tls is not None else None
    reader, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname=name)
    try:
        lines = (f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", "")
        writer.write("\r\n".join(lines).encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        if not head:
            raise ConnectionResetError("no answer")
        return int(head.split()[1]), head, body
    finally:
        writer.close()


async def refused(port: int) -> bool:
    """Whether nothing answers at a port of this host."""
    try:
        await scrape(port, "/healthz")
    except OSError:
        return True
    return False


async def certificate(port: int, tls: ssl.SSLContext) -> bytes:
    """The certificate that a server shows, as DER."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname="localhost")
    try:
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return found
    finally:
        writer.close()
