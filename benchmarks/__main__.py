"""`make bench`: every figure of the README, with the machine and the versions it was measured on."""

from __future__ import annotations

import importlib
import platform
import sys
from pathlib import Path

import grpc
import h2

from nodeagent.version import VERSION

PARTS = ("placement", "batch", "scan", "allocate", "daemon", "dra", "slices", "fleet", "pinning", "scrape", "commands")


def machine() -> str:
    """The processor, the kernel and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    cores = sum(1 for line in lines if line.startswith("processor"))
    libraries = f"h2 {h2.__version__}, grpcio {grpc.__version__} (clients)"
    versions = f"Python {platform.python_version()}, {libraries}, nodeagent {VERSION}"
    return f"{model}, {cores} CPUs, Linux {platform.release()}, {versions}"


def main() -> int:
    print(machine())
    for name in sys.argv[1:] or PARTS:
        print(f"\n## {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
