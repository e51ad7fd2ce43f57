"""10,000 placements in one batch on a recorded machine with 256 CPUs: the whole command, with its start."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.scan import MACHINE, recorded_tree

REQUESTS, RUNS = 10_000, 5


def main() -> None:
    if not MACHINE.exists():
        print("skipped: it needs the recorded machines alongside the checkout")
        return
    with recorded_tree() as tree:
        requests = tree / "requests.jsonl"
        lines = ({"cpus": 1 + number % 16, "held": str(number % 16)} for number in range(REQUESTS))
        requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
        took = [seconds(tree, "--batch", str(requests)) for _ in range(RUNS)]
        alone = [seconds(tree, "--cpus", "1") for _ in range(RUNS)]
    print(f"{'10,000 placements, 256 CPUs':44} {statistics.median(took):8.2f} s")
    print(f"{'of which one placement takes (start, scan)':44} {statistics.median(alone):8.2f} s")


def seconds(tree: Path, *words: str) -> float:
    """How long one call of the command takes."""
    command = [sys.executable, "-m", "nodeagent", "place", "--root", str(tree), *words]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
