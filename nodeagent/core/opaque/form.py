"""What the forms of all kinds of configurations share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from nodeagent.core.opaque.settings import NO_SETTINGS, OpaqueConfig
from nodeagent.errors import InputError

Percent = Annotated[int, msgspec.Meta(ge=1, le=100)]
ClassName = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?)?$")]
VfioDriver = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9_-]{0,48}vfio[_-]pci)?$")]

Interrupts = Literal["follow", "avoid", "leave", ""]


@contextlib.contextmanager
def at(path: str) -> Iterator[None]:
    """Append the path to an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} at {path}") from None


class Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """The keys allowed in a configuration of one kind, in addition to apiVersion and kind."""

    def settings(self) -> OpaqueConfig:
        """Return the settings. Raise InputError with the path for anything that the types alone do not check."""
        return NO_SETTINGS
