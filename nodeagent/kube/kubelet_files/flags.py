"""Kubelet's command line: its flags, and their effect on its configuration. Pure.

Flags are parsed as kubelet parses them (spf13/pflag): `--flag=value` or `--flag value`, `_` equals `-`, and a repeated
flag replaces its earlier value or, if it holds KEY=VALUE pairs, adds to it. A flag overrides the configuration, except
that feature gates are merged with those of the configuration. Source: cmd/kubelet/app/options and
component-base/cli/flag of Kubernetes 1.33 to 1.37.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from nodeagent.errors import InputError

CONFIG, CONFIG_DIR, ROOT_DIR, HOSTNAME = "config", "config-dir", "root-dir", "hostname-override"
Given = Sequence[str]
Setter = Callable[[Any, Given], Any]
"""(configured value, values of the flag in order) -> value that kubelet uses. Raises ValueError with what is
expected."""


class Flags(msgspec.Struct, frozen=True):
    """The relevant flags, each with all its values in the order given."""

    given: Mapping[str, tuple[str, ...]] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    ends_at_once: bool = False
    """Whether it was asked for its version or help, so this kubelet runs no pods."""

    def last(self, name: str) -> str:
        """Return the value in force, or "" if the flag is not given."""
        return self.given.get(name, ("",))[-1]

    def over(self, values: Mapping[str, Any], source: str) -> Iterator[tuple[str, str, Any]]:
        """Yield (flag, key, value) for each configuration value that a flag overrides.

        `source` names the command line in messages. Raise InputError naming flag and value if kubelet would reject it.
        """
        for name, (key, setter) in _SETTINGS.items():
            if (given := self.given.get(name)) is None:
                continue
            try:
                yield name, key, setter(values.get(key), given)
            except ValueError as error:
                shown = " ".join(repr(one) for one in given)
                raise InputError(f"cannot read --{name} of {source}: {shown}, {error}") from None


def parse(words: Sequence[str], source: str) -> Flags:
    """Parse a command line without the program name. Raise InputError if a flag has no value.

    Kubelet accepts only flags and their values, so a word that belongs to no flag known here is the value of an
    irrelevant one.
    """
    given: dict[str, list[str]] = {}
    ends, rest = False, iter(words)
    for word in rest:
        if word == "--":
            break
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        ends = ends or word == "-h" or (word.startswith("--") and name in _ENDING and value != "false")
        if not word.startswith("--") or name not in _KNOWN:
            continue
        if not equals and (following := next(rest, None)) is None:
            raise InputError(f"cannot read --{name} of {source}: it has no value")
        given.setdefault(name, []).append(value if equals else following or "")
    return Flags(MappingProxyType({name: tuple(values) for name, values in given.items()}), ends)


# ---------------------------------------------------------------- effect of a flag on a value


def _text(_: Any, given: Given) -> str:
    return given[-1]


def _pairs(_: Any, given: Given) -> dict[str, str]:
    return dict(_pair(one) for text in given for one in text.split(",") if one)


def _one_pair_each(_: Any, given: Given) -> dict[str, str]:
    return dict(_pair(text) for text in given)


def _gates(before: Any, given: Given) -> dict[str, Any]:
    found = {name: _truth(text) for name, text in _pairs(None, given).items()}
    return {**(before if isinstance(before, Mapping) else {}), **found}


def _reservations(before: Any, given: Given) -> Any:
    found = [_reservation(one) for text in given if text for one in text.split(";")]
    return found or before


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("expected KEY=VALUE")
    return key.strip(), value.strip()


def _truth(text: str) -> bool:
    """Parse a boolean as Go's strconv.ParseBool does."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError("expected true or false")


def _reservation(text: str) -> dict[str, Any]:
    node, colon, limits = text.partition(":")
    if not colon or not (node.isascii() and node.isdigit()):
        raise ValueError("expected NODE:TYPE=SIZE[,TYPE=SIZE]")
    return {"numaNode": int(node), "limits": dict(_pair(one) for one in limits.split(","))}


_SETTINGS: Mapping[str, tuple[str, Setter]] = MappingProxyType(
    {
        "cpu-manager-policy": ("cpuManagerPolicy", _text),
        "cpu-manager-policy-options": ("cpuManagerPolicyOptions", _one_pair_each),
        "reserved-cpus": ("reservedSystemCPUs", _text),
        "system-reserved": ("systemReserved", _pairs),
        "kube-reserved": ("kubeReserved", _pairs),
        "memory-manager-policy": ("memoryManagerPolicy", _text),
        "reserved-memory": ("reservedMemory", _reservations),
        "topology-manager-policy": ("topologyManagerPolicy", _text),
        "topology-manager-scope": ("topologyManagerScope", _text),
        "topology-manager-policy-options": ("topologyManagerPolicyOptions", _pairs),
        "cgroup-driver": ("cgroupDriver", _text),
        "cgroup-root": ("cgroupRoot", _text),
        "feature-gates": ("featureGates", _gates),
    }
)
"""Flags that override a configuration key."""
KEYS = frozenset(key for key, _ in _SETTINGS.values())
_KNOWN = frozenset((*_SETTINGS, CONFIG, CONFIG_DIR, ROOT_DIR, HOSTNAME))
"""All of them take a value."""
_ENDING = ("help", "version")
