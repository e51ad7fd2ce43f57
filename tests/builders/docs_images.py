"""Makes docs/images/map.svg: a recorded machine with the grants of docs/images/map-grants.json.

python -m tests.builders.docs_images
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.builders import tables
from tests.support.paths import CHECKOUT

MACHINE = "32intel64-2p8co2t+8ve"
FOLDER = CHECKOUT / "docs" / "images"


def map_words(root: Path) -> list[str]:
    """The command line that draws the machine, whose tree is made below `root`."""
    tables.build(root, tables.load(MACHINE))
    state = ["--state", str(FOLDER / "map-grants.json"), "--reserved", "0-1,16-17"]
    return [sys.executable, "-m", "nodeagent", "map", "--root", str(root), *state]


def make(target: Path) -> None:
    """Draw it into a file."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*map_words(Path(folder) / "root"), "--svg", str(target), "--force"], check=True)


if __name__ == "__main__":
    make(FOLDER / "map.svg")
