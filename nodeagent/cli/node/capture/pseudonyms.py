"""Replacements for names, UUIDs, addresses and serial numbers: the same thing gets the same one everywhere in a
capture, and another one in the next capture. They are made with a random key that is kept nowhere."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from functools import cached_property

KEPT = frozenset({"", "default", "kube-system", "kube-public", "kube-node-lease"})
"""Names that every cluster has."""
DISTINCTIVE = 8
"""A name of so many characters is replaced inside of longer words too, a shorter one only where it is a word."""
SHORTEST_SERIAL = 4
_SPECIAL = re.compile(
    r"(?P<uuid>[0-9a-fA-F]{8}(?P<sep>[-_])[0-9a-fA-F]{4}(?:(?P=sep)[0-9a-fA-F]{4}){2}(?P=sep)[0-9a-fA-F]{12}"
    r"(?![0-9a-fA-F]))"
    r"|(?P<hex>(?:(?<![0-9a-fA-F])|(?<=pod))(?:[0-9a-fA-F]{64}|[0-9a-fA-F]{32})(?![0-9a-fA-F]))"
    r"|(?P<mac>(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2}:){5,19}[0-9a-fA-F]{2}(?![0-9a-fA-F:]))"
    r"|(?P<guid>(?<![0-9a-fA-F:])[0-9a-fA-F]{4}(?::[0-9a-fA-F]{4}){3}(?![0-9a-fA-F:]))"
    r"|(?P<ip4>(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]))"
    r"|(?P<ip6>(?<![\w:.])(?:[0-9a-fA-F]{1,4}|:)(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:]))"
    r"|(?P<wwn>\b(?:eui|naa|t10|nvme|uuid)\.[0-9A-Za-z._+-]{8,})"
)


class Pseudonyms:
    """The replacements of one capture. Collect all names first, then replace."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)
        self._names: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._protected: set[str] = set()

    # ---------------------------------------------------------------- collecting

    def add(self, kind: str, name: str) -> str:
        """Return the replacement of a name, such as "pod-3". What has a form of its own, like a UUID, keeps it."""
        if name in KEPT:
            return name
        known = self._names.get(name)
        if known is None:
            replaced = _SPECIAL.sub(self._special, name)
            if replaced == name:
                self._counts[kind] = self._counts.get(kind, 0) + 1
                replaced = f"{kind}-{self._counts[kind]}"
            known = self._names[name] = replaced
            self.__dict__.pop("_pattern", None)
        return known

    def add_claim(self, name: str, pod_claim: str) -> None:
        """Add a claim that was made from a pod's template, POD-CLAIM-SUFFIX: its replacement has that form too."""
        pod, middle, _ = name.rpartition(f"-{pod_claim}-")
        if pod_claim and middle and name not in self._names:
            short = f"{self.add('pod', pod)}-{self.add('podclaim', pod_claim)}"
            self._names[name] = f"{short}-{self._digits(name, 5)}"
            self.__dict__.pop("_pattern", None)
        else:
            self.add("claim", name)

    def add_serial(self, text: str) -> None:
        """Add a serial number. Its replacement is as long, so that it fits where its length is written down."""
        one = text.strip("\0 \t\r\n")
        if len(one) >= SHORTEST_SERIAL and one not in self._names and set(one) - set("0.:-_ xX"):
            replaced = _SPECIAL.sub(self._special, one)
            self._names[one] = self._digits(one, len(one)).upper() if replaced == one else replaced
            self.__dict__.pop("_pattern", None)

    def protect(self, words: Iterable[str]) -> None:
        """Name words that have a meaning of their own: a pod of such a name is replaced where it is known to be one."""
        self._protected |= set(words)
        self.__dict__.pop("_pattern", None)

    # ---------------------------------------------------------------- replacing

    def name(self, kind: str, name: str) -> str:
        """Return the replacement of what is known to be a name."""
        return self.add(kind, name)

    def text(self, text: str) -> str:
        """Return a text with everything in it replaced."""
        return self.special(self._pattern.sub(lambda found: self._names[found[0]], text) if self._pattern else text)

    def special(self, text: str) -> str:
        """Return a text with what has a form of its own replaced: UUIDs, addresses, ids of containers."""
        return _SPECIAL.sub(self._special, text)

    def serials(self, text: str) -> str:
        """Return a text with long names and everything that has a form of its own replaced."""
        return self.special(
            self._distinctive.sub(lambda found: self._names[found[0]], text) if self._distinctive else text
        )

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        self.__dict__.pop("_distinctive", None)
        usable = sorted((one for one in self._names if one not in self._protected), key=len, reverse=True)
        return _alternatives(usable)

    @cached_property
    def _distinctive(self) -> re.Pattern[str] | None:
        usable = (one for one in self._names if len(one) >= DISTINCTIVE and one not in self._protected)
        return _alternatives(sorted(usable, key=len, reverse=True))

    def _special(self, found: re.Match[str]) -> str:
        text, kind = found[0], found.lastgroup
        if kind in ("uuid", "sep", "hex", "guid"):
            return self._like(text)
        if kind == "mac":
            return text if not set(text) - set("0:") else self._like(text, keep=0, first="02")
        if kind in ("ip4", "ip6"):
            return self._address(text)
        head, _, tail = text.partition(".")
        return f"{head}.{self._like(tail)}"

    def _like(self, text: str, keep: int = 0, first: str = "") -> str:
        """Return another text of the same form: hexadecimal digits by such, letters by letters. Zeros alone stay."""
        digits = [one for one in text if one.isalnum()]
        if not set(digits) - {"0"}:
            return text
        drawn = iter(first + self._digits("".join(digits).lower(), len(digits))[len(first) :])
        return "".join((_cased(next(drawn), one) if one.isalnum() else one) for one in text)

    def _address(self, text: str) -> str:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return text
        if address.is_loopback or address.is_unspecified:
            return text
        drawn = int(self._digits(str(address), 16), 16)
        if address.version == 4:
            return str(ipaddress.IPv4Address((10 << 24) | (drawn % (1 << 24))))
        return str(ipaddress.IPv6Address((0xFD << 120) | drawn))

    def _digits(self, text: str, count: int) -> str:
        """Return hexadecimal digits that depend on a text and the key."""
        found = ""
        while len(found) < count:
            found += hmac.new(self._key, f"{len(found)}:{text}".encode(), hashlib.sha256).hexdigest()
        return found[:count]


def _cased(digit: str, like: str) -> str:
    return digit.upper() if like.isupper() else digit


def _alternatives(names: list[str]) -> re.Pattern[str] | None:
    """Return a pattern of names, the longest first."""
    if not names:
        return None
    return re.compile("|".join(_one(name) for name in names))


def _one(name: str) -> str:
    if len(name) >= DISTINCTIVE or "/" in name:
        return re.escape(name)
    return rf"(?<![\w-]){re.escape(name)}(?![\w-])"
