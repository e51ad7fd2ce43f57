"""`make image`: build the image, and print where it is and how large."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from image.build import Image, build
from image.errors import ImageError
from image.layer import Layer
from image.oci import REFERENCE

_MIB = 1 << 20


def main() -> int:
    """Build. Return the exit code."""
    parser = argparse.ArgumentParser(prog="make image", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="the folder for the archive")
    parser.add_argument("--source", default="", help="the address of the sources, for the image's label")
    wanted = parser.parse_args()
    began = time.monotonic()
    try:
        image = build(wanted.out, source=wanted.source)
    except (ImageError, OSError) as error:
        print(f"cannot build the image: {error}", file=sys.stderr)
        return 1
    print(_report(image, time.monotonic() - began))
    return 0


def _report(image: Image, took_s: float) -> str:
    return "\n".join(
        (
            f"image: {image.archive}, {REFERENCE}, {image.digest}",
            f"image: content listed in {image.sbom}",
            f"image: base {_size(image.base)}; product {_size(image.product)}; {took_s:.0f} s",
        )
    )


def _size(layer: Layer) -> str:
    return f"{layer.unpacked_bytes / _MIB:.1f} MiB unpacked, {layer.blob.size_bytes / _MIB:.1f} MiB packed"


if __name__ == "__main__":
    raise SystemExit(main())
