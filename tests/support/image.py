"""The container image, built for tests by what `make image` runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from image.build import Image

TOOLS = ("apt-get", "apt-cache", "dpkg", "dpkg-deb")


def lacking_tools() -> str:
    """Why no image can be built here; "" where there is all that it takes."""
    absent = [name for name in TOOLS if shutil.which(name) is None]
    return f"{', '.join(absent)} not found: the image is made of Debian packages" if absent else ""


def build_image(folder: Path) -> Image:
    """Build the image from the checkout into a folder; the test is skipped, saying why, where that cannot be."""
    if reason := lacking_tools():
        pytest.skip(reason)
    from image.build import build
    from image.errors import ImageError

    try:
        return build(folder, source="https://sources.example/nodeagent")
    except ImageError as error:
        pytest.skip(f"no image: {error}")
