"""Real network namespaces for tests, which live as long as they are open here, and iproute2 as the second opinion of
what is in them.

With the fixture `adapters`, the end of a pair of virtual interfaces stands for the interface of a device: what the
kernel tells of it is read as of a device (no kind; its parent by the group that it is in, which no move changes), and
when its namespace ends, it is returned as the kernel returns a device's.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from msgspec.structs import replace

from nodeagent.host.netlink import interfaces
from nodeagent.host.netlink.interfaces import Link
from nodeagent.host.netlink.messages import attributes, read_number

_CLONE_NEWNET = 0x40000000
GROUP = 27
"""IFLA_GROUP."""
FIRST_GROUP = 1000


def missing() -> str:
    """Why there can be no namespaces here, or ""."""
    if os.geteuid():
        return "network namespaces need root"
    lacking = [name for name in ("ip", "nsenter") if shutil.which(name) is None]
    return f"{', '.join(lacking)} is not installed" if lacking else ""


needs_namespaces = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


class Namespace:
    """A network namespace of its own."""

    def __init__(self) -> None:
        found: list[int] = []

        def make() -> None:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0:
                found.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        (self._fd,) = found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """With the last that has it open the kernel ends it."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def ip(self, *words: str, lines: str = "") -> str:
        """iproute2 in it. lines: what it reads, for -batch."""
        command = ["nsenter", f"--net={self.path}", "ip", *words]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def shown(self, *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.ip("-j", *words) or "[]")
        return found

    def link(self, name: str) -> dict[str, Any]:
        (found,) = [one for one in self.shown("link", "show") if one["ifname"] == name]
        return found

    def names(self) -> set[str]:
        return {str(one["ifname"]) for one in self.shown("link", "show")} - {"lo"}

    def addresses(self, name: str) -> set[str]:
        found = [one for one in self.shown("address", "show") if one.get("ifname") == name]
        return {
            f"{one['local']}/{one['prefixlen']}" for it in found for one in it["addr_info"] if one["scope"] == "global"
        }

    def routes(self, name: str) -> set[tuple[str, str]]:
        found = [*self.shown("route", "show"), *self.shown("-6", "route", "show")]
        mine = [one for one in found if one.get("dev") == name and one.get("protocol") != "kernel"]
        return {(str(one["dst"]), str(one.get("gateway", ""))) for one in mine}

    def veth(self, name: str, *, mac: str = "", mtu: int = 1500, group: int = 0, up: bool = False) -> None:
        """A pair of virtual interfaces, of which the other end is called NAME-far."""
        words = [*(("address", mac) if mac else ()), "mtu", str(mtu), "group", str(group)]
        self.ip("link", "add", name, *words, "type", "veth", "peer", "name", f"{name}-far")
        if up:
            self.ip("link", "set", name, "up")

    def end(self, host: Namespace) -> None:
        """End it as the kernel does: the interfaces of devices return to the host, down, without their addresses, under
        another name if theirs is taken there."""
        for one in self.shown("link", "show"):
            if int(one.get("group", 0) if str(one.get("group", "0")).isdigit() else 0) >= FIRST_GROUP:
                name = str(one["ifname"])
                free = name if name not in host.names() else f"dev{one['ifindex']}"
                words = [f"set {name} down", f"set {name} name {free}", f"set {free} netns {host.path}"]
                self.ip("-batch", "-", lines="".join(f"link {line}\n" for line in words))
        self.close()


def device_of(group: int) -> str:
    """The PCI address that a group stands for."""
    return f"0000:5e:00.{group - FIRST_GROUP}"


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends of pairs in a group from FIRST_GROUP on are read as interfaces of devices."""
    real = interfaces._read_link

    def read(data: bytes) -> Link:
        link, group = real(data), read_number(attributes(data[16:]).get(GROUP))
        return replace(link, kind="", parent=device_of(group)) if group >= FIRST_GROUP else link

    monkeypatch.setattr(interfaces, "_read_link", read)
    yield


def has_driver(folder: Path) -> Path:
    """A root with the files of two adapters that have drivers."""
    for group in (FIRST_GROUP + 1, FIRST_GROUP + 2):
        (folder / "sys/bus/pci/devices" / device_of(group) / "driver").mkdir(parents=True, exist_ok=True)
    return folder
