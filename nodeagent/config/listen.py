"""Addresses to listen on, as the configuration names them."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

_FORM = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+)):(?P<port>[0-9]{1,5})")


class ListenAddress(NamedTuple):
    """An IP address and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Return the address in a text such as "127.0.0.1:9464" or "[::]:9464". Raise ValueError with what is expected:
        names are not looked up, as that could take any time."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("expected an IP address and a port, such as 127.0.0.1:9464 or [::]:9464")
        try:
            host = str(ipaddress.IPv6Address(found["v6"]) if found["v6"] else ipaddress.IPv4Address(found["v4"]))
        except ValueError:
            raise ValueError("expected an IP address and a port, such as 127.0.0.1:9464 or [::]:9464") from None
        if not 1 <= int(found["port"]) <= 65535:
            raise ValueError("expected a port from 1 to 65535")
        return cls(host, int(found["port"]))
