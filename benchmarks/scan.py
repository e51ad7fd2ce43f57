"""A full scan of a recorded machine against lstopo on the same tree, in turn, in one run."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nodeagent.host.devices import all_kinds
from nodeagent.host.snapshot import scan
from nodeagent.host.sysfs.sysfs import SysFs

MACHINE = Path(__file__).resolve().parents[2] / "shared" / "machines" / "256ppc-8n8s4t.tar.bz2"
RUNS = 15


def median_ms(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Medians of two things done in turn."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(RUNS):
        for work, times in zip((one, other), took, strict=True):
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took[0]), statistics.median(took[1])


def lstopo(tree: Path) -> None:
    env = {**os.environ, "HWLOC_FSROOT": str(tree), "HWLOC_COMPONENTS": "linux,stop"}
    command = ["lstopo-no-graphics", "--of", "xml", "-f", os.devnull]
    subprocess.run(command, env=env, check=True, capture_output=True)


@contextlib.contextmanager
def recorded_tree() -> Iterator[Path]:
    """The tree of a recorded machine with 256 CPUs."""
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(MACHINE) as tar:
            tar.extraction_filter = lambda member, _: member  # an argument would need Python 3.11.4
            tar.extractall(name)
        yield next(Path(name).iterdir())


def main() -> None:
    if not MACHINE.exists() or shutil.which("lstopo-no-graphics") is None:
        print(
            "skipped: it needs the recorded machines alongside the checkout and lstopo-no-graphics (package hwloc-nox)"
        )
        return
    with recorded_tree() as tree:
        families = all_kinds.load_kinds()
        ours, theirs = median_ms(lambda: scan(SysFs(tree), families), lambda: lstopo(tree))
        files = sum(len(found) for _, _, found in os.walk(tree))
    print(f"{'full scan, 256 CPUs':44} {ours:8.1f} ms in the running agent")
    print(f"{'lstopo-no-graphics --of xml, same tree':44} {theirs:8.1f} ms as a process")
    print(f"{'ratio':44} {ours / theirs:8.2f}   ({files} files in the tree)")


if __name__ == "__main__":
    main()
