"""What all parts of the configuration share: the strict base and the types of values."""

from __future__ import annotations

from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400 * 366)]
LONGEST_DOMAIN = 253
NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
DOMAIN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+$"
NODE_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
RESOURCE_NAME = f"^({DOMAIN[1:-1]}/)?{NAME[1:]}"
Name = Annotated[str, msgspec.Meta(pattern=NAME)]
DevPath = Annotated[str, msgspec.Meta(pattern=r"^/dev/[^\0]+$")]
Absolute = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$")]
AbsoluteOrEmpty = Annotated[str, msgspec.Meta(pattern=r"^(/[^\0]*)?$")]
AT_START = msgspec.Meta(extra={"applied": "at start"})
"""Marks a key that takes effect only when the agent starts."""
Text = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*$")]
Match = dict[str, str | list[str]]


class Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of all parts of the configuration: frozen, keyword-only and strict."""
