"""Compiled Python files that are the same in every build and that no start has to check against their sources."""

from __future__ import annotations

from pathlib import Path

from image.errors import ImageError
from image.programs import run
from image.recipe import PYTHON


def compile_tree(tree: Path, folder: str) -> None:
    """Compile all files below a folder of the tree with the tree's own interpreter, as unchecked-hash files (PEP 552).
    They name their sources as in the image."""
    environment = {"PYTHONHOME": str(tree / "usr"), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-f", "--invalidation-mode", "unchecked-hash", "-s", tree, "-p", "/"]
    run([*_interpreter(tree), "-S", "-m", "compileall", *options, tree / folder], env=environment)


def _interpreter(tree: Path) -> list[object]:
    """Return how the tree's interpreter is run outside it: through its own loader, with its own libraries."""
    loaders = sorted((*tree.glob("lib/*/ld-linux-*.so.*"), *tree.glob("usr/lib/*/ld-linux-*.so.*")))
    if not loaders:
        raise ImageError("libc6 has no loader")
    libraries = ":".join(str(tree / top / loaders[0].parent.name) for top in ("lib", "usr/lib"))
    return [loaders[0], "--library-path", libraries, tree / "usr/bin" / PYTHON]
