"""The kernel's part of the properties of virtual functions: what becomes of RTM_GETLINK and RTM_SETLINK messages for
interfaces that have virtual functions, which dummy and veth interfaces do not.

As strict as net/core/rtnetlink.c (do_setlink, do_setvfinfo, rtnl_set_vf_rate, rtnl_fill_vfinfo) with a driver like
drivers/net/netdevsim/netdev.c, of which each operation can be missing: what the driver cannot do is EOPNOTSUPP, a VLAN
above 4095, a priority above 7, a group's MAC address, a minimum above the maximum or another function than there are is
EINVAL, an attribute that is too short for its struct is ERANGE or EINVAL. It reads and writes the bytes by itself, with
nothing of the package. The state can be in a file: then another process goes on with it.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nodeagent.host.netlink.connection import NetlinkError

GETLINK, SETLINK = 18, 19
ALL = frozenset({"mac", "vlan", "rate", "spoofchk", "link_state", "trust"})
"""What a driver can do: its ndo_set_vf_*."""
LINE_MBPS = 25_000
INT_MAX = (1 << 31) - 1
UNTOLD = 0xFFFFFFFF
Q, AD = 0x8100, 0x88A8


@dataclass
class Vf:
    """What a driver keeps of one function; -1: it does not report it."""

    mac: str = "00" * 6
    vlan: int = 0
    qos: int = 0
    proto: int = Q
    min_rate: int = 0
    max_rate: int = 0
    spoofchk: int = 1
    link_state: int = 0
    trust: int = 0


@dataclass
class Pf:
    """An interface. silent: functions of which the driver knows nothing."""

    name: str
    index: int
    parent: str
    vfs: list[Vf]
    can: frozenset[str] = ALL
    protocols: frozenset[int] = frozenset({Q, AD})
    silent: frozenset[int] = frozenset()
    takes_no_zero_mac: bool = False


@dataclass
class VfKernel:
    """Interfaces by name; `open` is to be given to what exchanges messages."""

    pfs: dict[str, Pf] = field(default_factory=dict)
    file: Path | None = None
    before: Callable[[str], None] = lambda step: None
    """Called before and after each change takes effect; may raise."""
    changes: list[tuple[str, int, str]] = field(default_factory=list)
    """What was set: (interface, function, operation)."""
    may: bool = True
    """Whether the caller has CAP_NET_ADMIN."""
    opened: int = 0

    def add(self, name: str, parent: str, count: int) -> Pf:
        made = Pf(name, len(self.pfs) + 2, parent, [Vf() for _ in range(count)])
        self.pfs[name] = made
        return made

    def open(self) -> VfKernel:
        self.opened += 1
        return self

    def close(self) -> None:
        self.opened -= 1

    def get(self, what: str, kind: int, body: bytes) -> bytes | None:
        """Answer a request as the kernel does, with its error as the connection raises it."""
        try:
            self.load()
            return self._answered(kind, body)
        except OSError as error:
            raise NetlinkError(what, error.errno or 0) from None

    def _answered(self, kind: int, body: bytes) -> bytes | None:
        family, _, _, index, flags, change = struct.unpack_from("=BBHiII", body)
        _require(family == 0 and flags == 0 and change == 0, errno.EINVAL)
        found = dict(_each(body[16:]))
        if kind == GETLINK:
            return self._filled(self._named(index, found), found)
        assert kind == SETLINK, kind
        _require(self.may, errno.EPERM)
        self._set(self._named(index, found), found)
        return None

    def _named(self, index: int, found: dict[int, bytes]) -> Pf:
        name = found.get(3, b"").split(b"\0")[0].decode()
        _require(index > 0 or bool(name), errno.EINVAL)
        mine = [one for one in self.pfs.values() if (one.index == index if index > 0 else one.name == name)]
        _require(bool(mine), errno.ENODEV)
        return mine[0]

    # ---------------------------------------------------------------- reading

    def _filled(self, pf: Pf, asked: dict[int, bytes]) -> bytes:
        mask = struct.unpack("=I", asked[29])[0] if 29 in asked else 0
        body = struct.pack("=BBHiII", 0, 0, 1, pf.index, 0x1003, 0)
        body += _attr(3, pf.name.encode() + b"\0") + _attr(4, struct.pack("=I", 1500))
        if mask & 1:
            body += _attr(21, struct.pack("=I", len(pf.vfs)))
            infos = [_info(i, one, stats=not mask & 8) for i, one in enumerate(pf.vfs) if i not in pf.silent]
            whole = b"".join(infos)
            _require(len(whole) + 4 <= 0xFFFF, errno.EMSGSIZE)
            body += _attr(22, whole) if pf.vfs else b""
        return body + _attr(56, pf.parent.encode() + b"\0")

    # ---------------------------------------------------------------- setting

    def _set(self, pf: Pf, found: dict[int, bytes]) -> None:
        _require(not found.keys() - {3, 22}, errno.EOPNOTSUPP)
        for kind, info in _each(found.get(22, b"")):
            _require(kind == 1, errno.EINVAL)
            parts = dict(_each(info))
            for part in (1, 12, 6, 4, 5, 9):  # in the kernel's order
                if part in parts:
                    self._set_one(pf, part, parts[part])
            assert not parts.keys() - {1, 12, 6, 4, 5, 9}, "the double knows nothing else"

    def _set_one(self, pf: Pf, kind: int, data: bytes) -> None:
        name, size = {
            1: ("mac", 36),
            12: ("vlan", 0),
            6: ("rate", 12),
            4: ("spoofchk", 8),
            5: ("link_state", 8),
            9: ("trust", 8),
        }[kind]
        _require(len(data) >= size, errno.ERANGE)
        if kind == 12:
            _require(name in pf.can, errno.EOPNOTSUPP)
            infos = list(_each(data))
            _require(bool(infos) and all(one == 1 and len(info) >= 16 for one, info in infos), errno.EINVAL)
            _require(len(infos) == 1, errno.EOPNOTSUPP)
            data = infos[0][1]
        (index,) = struct.unpack_from("=I", data)
        _require(index < INT_MAX, errno.EINVAL)
        if kind == 6:
            _, least, most = struct.unpack_from("=III", data)
            _require(name in pf.can, errno.EOPNOTSUPP)
            _require(not most or least <= most, errno.EINVAL)
        _require(name in pf.can, errno.EOPNOTSUPP)
        _require(index < len(pf.vfs), errno.EINVAL)
        changed = _driver(pf, pf.vfs[index], kind, data)
        self.before(f"{pf.name}/{index}/{name}")
        pf.vfs[index] = changed
        self._save()
        self.changes.append((pf.name, index, name))
        self.before(f"{pf.name}/{index}/{name}")

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps({pf.name: [asdict(vf) for vf in pf.vfs] for pf in self.pfs.values()}))

    def load(self) -> None:
        """Read the state that another process has written."""
        if self.file is not None and self.file.exists():
            for name, vfs in json.loads(self.file.read_text()).items():
                self.pfs[name].vfs = [Vf(**one) for one in vfs]

    def reboot(self) -> None:
        """Every function is as its driver makes it."""
        for pf in self.pfs.values():
            pf.vfs = [Vf() for _ in pf.vfs]
        self._save()


def _driver(pf: Pf, vf: Vf, kind: int, data: bytes) -> Vf:
    """Return what a function is afterwards."""
    made = Vf(**asdict(vf))
    if kind == 1:
        address = data[4:10]
        _require(not address[0] & 1 and not (pf.takes_no_zero_mac and not any(address)), errno.EINVAL)
        made.mac = address.hex()
    elif kind == 12:
        _, made.vlan, made.qos = struct.unpack_from("=III", data)
        (made.proto,) = struct.unpack_from(">H", data, 12)
        _require(made.vlan <= 4095 and made.qos <= 7, errno.EINVAL)
        _require(made.proto in pf.protocols, errno.EPROTONOSUPPORT)
    elif kind == 6:
        _, made.min_rate, made.max_rate = struct.unpack_from("=III", data)
        _require(made.min_rate <= LINE_MBPS and made.max_rate <= LINE_MBPS, errno.EINVAL)
    elif kind == 5:
        made.link_state = struct.unpack_from("=II", data)[1]
        _require(made.link_state <= 2, errno.EINVAL)
    else:
        name = {4: "spoofchk", 9: "trust"}[kind]
        setattr(made, name, int(bool(struct.unpack_from("=II", data)[1])))
    return made


def _info(index: int, vf: Vf, *, stats: bool) -> bytes:
    """Return IFLA_VF_INFO of one function, in the kernel's order."""
    vlan = struct.pack("=III", index, vf.vlan, vf.qos)
    parts = [
        _attr(1, struct.pack("=I32s", index, bytes.fromhex(vf.mac))),
        _attr(13, bytes(32)),
        _attr(2, vlan),
        _attr(6, struct.pack("=III", index, vf.min_rate, vf.max_rate)),
        _attr(3, struct.pack("=II", index, vf.max_rate)),
        _attr(4, struct.pack("=II", index, UNTOLD if vf.spoofchk < 0 else vf.spoofchk)),
        _attr(5, struct.pack("=II", index, vf.link_state)),
        _attr(7, struct.pack("=II", index, UNTOLD)),
        *([_attr(9, struct.pack("=II", index, vf.trust))] if vf.trust >= 0 else []),
        _attr(12, _attr(1, vlan + struct.pack(">H", vf.proto) + bytes(2))),
        *([_attr(8, b"".join(_attr(one, bytes(8)) for one in range(6)))] if stats else []),
    ]
    return _attr(1, b"".join(parts))


def _attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def _each(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        _require(4 <= length <= len(data), errno.EINVAL)
        yield kind & 0x3FFF, data[4:length]
        data = data[length + (-length % 4) :]


def _require(holds: bool, code: int) -> None:
    if not holds:
        raise OSError(code, "")
