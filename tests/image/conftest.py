"""One image for all tests: built once, with the network, in about a minute."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.image.bundle import Bundle
from tests.support.image import lacking_tools

if TYPE_CHECKING:
    from image.build import Image

EPOCH_S = 1_600_000_000


def lacking() -> str:
    """Why no image is built here; "" where one is."""
    if os.environ.get("NODEAGENT_IMAGE") != "1":
        return "NODEAGENT_IMAGE=1 is not set: building an image takes a minute and needs the network"
    return lacking_tools()


@pytest.fixture(scope="session")
def epoch() -> Iterator[int]:
    """The time that the images of these tests count as made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", str(EPOCH_S))
        yield EPOCH_S


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, epoch: int) -> Image:
    """The image, built from the checkout."""
    if reason := lacking():
        pytest.skip(reason)
    from image.build import build
    from image.debs import HINT
    from image.errors import ImageError

    try:
        made = build(tmp_path_factory.mktemp("image"), source="https://sources.example/nodeagent")
    except ImageError as error:
        if HINT not in str(error):
            raise
        pytest.skip(f"apt has not the packages of the image: {error}")
    mib = 1 << 20
    for name, layer in (("base", made.base), ("product", made.product)):
        print(f"image: {name} {layer.unpacked_bytes / mib:.1f} MiB unpacked, {layer.blob.size_bytes / mib:.1f} packed")
    return made


@pytest.fixture(scope="session")
def bundle(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The archive's content, and the tree that its layers make."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(image.archive) as archive:
        archive.extractall(folder / "layout", filter="data")
    return Bundle(folder / "layout", folder / "tree")
