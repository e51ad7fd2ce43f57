"""The command line: from the start of a process to its end, on a node with 256 CPUs, 64 devices and 200 grants.

NODEAGENT_COMMAND names the program, where it is not the one of this interpreter: installed from its wheel, it starts
without what an editable installation looks through.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.daemon import LARGE, QUIET, large_machine, registered
from tests.doubles.kubelet import FakeKubelet
from tests.support.running import CPU, running

GRANTS, RUNS = 200, 11
COMMANDS: dict[str, str] = {"--help": "80 ms", "status": "150 ms", "grants": "150 ms", "map": ""}
"""What is asked, and the target."""


def program() -> list[str]:
    """The command, first in turn on its CPU where that is allowed: other processes are not measured."""
    here = os.environ.get("NODEAGENT_COMMAND", str(Path(sys.executable).with_name("nodeagent")))
    first = ["chrt", "-f", "50"] if os.geteuid() == 0 and shutil.which("chrt") else []
    return [*first, here]


def took_ms(words: Sequence[str]) -> list[float]:
    took = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([*program(), *words], check=True, capture_output=True)
        took.append((time.perf_counter() - began) * 1e3)
    return took


async def _main() -> None:
    with tempfile.TemporaryDirectory(prefix="na-") as name:
        folder, root = Path(name), await asyncio.to_thread(large_machine, Path(name) / "root")
        async with (
            FakeKubelet(folder / "kubelet") as kubelet,
            running(folder, log=QUIET, root=root, resources=LARGE) as agent,
        ):
            await registered(kubelet)
            for number in range(GRANTS):
                await kubelet.admit_pod("bench", f"pod-{number}", {"main": {CPU: 1}})
            for words, reach in COMMANDS.items():
                asked = [words] if words == "--help" else [words, "--socket", str(agent.socket)]
                took = await asyncio.to_thread(took_ms, asked)
                shown = f"{statistics.median(took):.0f} ms (worst {max(took):.0f})"
                print(f"| `nodeagent {words}`, {GRANTS} grants | {reach} | {shown} |", flush=True)


def main() -> None:
    print("| what | reach | measured |\n|---|---|---|")
    asyncio.run(_main())


if __name__ == "__main__":
    main()
