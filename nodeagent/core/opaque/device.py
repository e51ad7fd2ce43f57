"""The forms of configurations of devices in general, and of disks."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from nodeagent.config import hints
from nodeagent.core.model.quantity import parse_quantity
from nodeagent.core.opaque.form import ClassName, Form, Interrupts, at
from nodeagent.core.opaque.settings import OpaqueConfig
from nodeagent.errors import InputError

OWN_VARIABLES = "NODEAGENT_"
"""Prefix of the variables that describe what was granted; no configuration may set them."""
LEAST_BPS, MOST_BPS = 2, 10**15
"""Limits of I/O, in bytes per second. Older kernels do not take 1 (tg_set_limit in block/blk-throttle.c)."""
_Bytes = Annotated[int, msgspec.Meta(ge=2, le=MOST_BPS)] | str
_Operations = Annotated[int, msgspec.Meta(ge=2, le=1_000_000_000)]
_Weight = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
_Microseconds = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class DeviceForm(Form, frozen=True):
    """The form of every kind without a specific form."""

    env: dict[str, Any] = {}
    interrupts: Interrupts = ""

    def settings(self) -> OpaqueConfig:
        for name, value in self.env.items():
            if not (_VARIABLE.fullmatch(name) and isinstance(value, str) and "\0" not in value):
                raise InputError(f"{name}: {hints.shown(value)} at $.env, expected the name of a variable and a text")
            if name.startswith(OWN_VARIABLES):
                raise InputError(f"{name} at $.env: variables that start with {OWN_VARIABLES} say what was granted")
        return OpaqueConfig(env=MappingProxyType(dict(self.env)), interrupts=self.interrupts)


class BlockForm(DeviceForm, frozen=True):
    """Disks: what any device has, and limits of I/O."""

    read_bytes_per_second: _Bytes | None = None
    write_bytes_per_second: _Bytes | None = None
    read_iops: _Operations | None = msgspec.field(default=None, name="readIOPS")
    write_iops: _Operations | None = msgspec.field(default=None, name="writeIOPS")
    weight: _Weight | None = None
    latency_target_microseconds: _Microseconds | None = None
    io_class: ClassName = ""

    def settings(self) -> OpaqueConfig:
        rates = {
            "io_read_bps": bytes_per_second(self.read_bytes_per_second, "$.readBytesPerSecond"),
            "io_write_bps": bytes_per_second(self.write_bytes_per_second, "$.writeBytesPerSecond"),
            "io_read_iops": self.read_iops,
            "io_write_iops": self.write_iops,
            "io_weight": self.weight,
            "io_latency_us": self.latency_target_microseconds,
        }
        if self.io_class and any(one is not None for one in rates.values()):
            raise InputError("$.ioClass excludes all limits: they are those of the class")
        return replace(super().settings(), **rates, io_class=self.io_class)


def bytes_per_second(said: int | str | None, path: str) -> int | None:
    """Return a rate that is a number or a quantity such as "100Mi". Raise InputError with its path."""
    if not isinstance(said, str):
        return said
    with at(path):
        rate = parse_quantity(said)
        if not LEAST_BPS <= rate <= MOST_BPS:
            raise InputError(f"{said[:40]!r} is not {LEAST_BPS} to {MOST_BPS} bytes per second")
    return rate
