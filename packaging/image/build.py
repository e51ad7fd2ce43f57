"""One build, from nothing to the archive and the list of its content under their final names."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from image.base import make_base
from image.debs import Deb
from image.errors import ImageError
from image.layer import Layer, entries, write_layer
from image.oci import configuration, write_archive
from image.product import distributions, make_product
from image.programs import need, run
from image.recipe import CHECKOUT, LARGEST_PRODUCT_BYTES, NAME, SBOM
from image.sbom import document
from nodeagent.version import VERSION

DOWNLOADS = CHECKOUT / ".cache" / "image" / "debs"
ARCHITECTURES = ("amd64", "arm64")
_BASE_MTIME_S = 0
"""The base has no date of its own: it stays the same layer from one version of the product to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a build made."""

    archive: Path
    sbom: Path
    digest: str
    base: Layer
    product: Layer


def build(out: Path, *, source: str = "") -> Image:
    """Build the image into a folder. source: the address of the sources, for the label, or "".

    Raise ImageError if it cannot be built; the folder then has what it had before."""
    need("apt-cache", "apt-get", "dpkg", "dpkg-deb")
    architecture, epoch_s = _architecture(), epoch()
    os.umask(0o022)  # the modes in the image are not this user's taste
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".image-", dir=out) as scratch:
        return _build(Path(scratch), out, architecture, epoch_s, source)


def _build(scratch: Path, out: Path, architecture: str, epoch_s: int, source: str) -> Image:
    tree, listing, archive = scratch / "tree", scratch / "sbom.json", scratch / "image.tar"
    tree.mkdir()
    debs = make_base(tree, DOWNLOADS)
    below = entries(tree)
    base = write_layer(tree, scratch / "base", mtime_s=_BASE_MTIME_S)
    make_product(tree, scratch)
    listing.write_bytes(_sbom(tree, debs, epoch_s))
    (tree / SBOM).parent.mkdir(parents=True)
    shutil.copy(listing, tree / SBOM)
    product = write_layer(tree, scratch / "product", mtime_s=epoch_s, without=below)
    _check_size(product)
    described = configuration((base, product), architecture=architecture, epoch_s=epoch_s, source=source)
    digest = write_archive(archive, (base, product), described, mtime_s=epoch_s)
    name = f"{NAME}-{VERSION}-linux-{architecture}"
    return Image(
        sbom=listing.rename(out / f"{name}.sbom.json"),
        archive=archive.rename(out / f"{name}.oci.tar"),
        digest=digest,
        base=base,
        product=product,
    )


def _check_size(product: Layer) -> None:
    if product.unpacked_bytes > LARGEST_PRODUCT_BYTES:
        sizes = f"{product.unpacked_bytes} bytes unpacked, at most {LARGEST_PRODUCT_BYTES} are allowed"
        raise ImageError(f"the product takes {sizes}")


def _sbom(tree: Path, debs: tuple[Deb, ...], epoch_s: int) -> bytes:
    release = dict(word.split("=", 1) for word in shlex.split((tree / "etc/os-release").read_text()) if "=" in word)
    system = f"{release['ID']}-{release.get('VERSION_ID', '')}".rstrip("-")
    created = datetime.fromtimestamp(epoch_s, UTC).isoformat()
    return document(debs, distributions(tree), system=system, created=created)


def _architecture() -> str:
    found = run(["dpkg", "--print-architecture"]).strip()
    if found not in ARCHITECTURES:
        raise ImageError(f"this machine is {found}; images are made for {' and '.join(ARCHITECTURES)}")
    return found


def epoch() -> int:
    """Return the time that the image counts as made, in seconds since 1970: SOURCE_DATE_EPOCH, or the commit's time
    (reproducible-builds.org/specs/source-date-epoch). Raise ImageError if there is neither."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        try:
            given = run(["git", "log", "-1", "--format=%ct"], cwd=CHECKOUT).strip()
        except (ImageError, OSError) as error:
            raise ImageError(
                f"no time for its files: set SOURCE_DATE_EPOCH, or build in a git checkout ({error})"
            ) from error
    if not given.isascii() or not given.isdigit():
        raise ImageError(f"SOURCE_DATE_EPOCH is {given!r}, not a number of seconds")
    return int(given)
