"""The colours of holders. Black text is readable on each."""

from __future__ import annotations

import colorsys

_GOLDEN = 0.381966
"""Part of the circle of hues between one holder and the next: neighbours in the legend differ most."""
_LIGHTNESS = (0.72, 0.62, 0.82)


def colour_of(holder: int) -> str:
    """Return the colour of the holder with this index as #rrggbb."""
    hue = (0.58 + holder * _GOLDEN) % 1
    parts = colorsys.hls_to_rgb(hue, _LIGHTNESS[holder // 8 % len(_LIGHTNESS)], 0.65)
    return "#" + "".join(f"{round(part * 255):02x}" for part in parts)
