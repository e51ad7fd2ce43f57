"""What each dependency weighs: the time and resident memory that importing it adds to a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

RUNS = 5
MODULES = {
    "asyncinotify": "watching folders for sockets that come and go",
    "h2.connection": "kubelet speaks gRPC, over HTTP/2 (h2)",
    "h11": "HTTP/1.1 of the status socket",
    "msgspec": "strict typed decoding of configuration and JSON",
    "psutil": "the machine as it runs; imported by the command line only",
    "pynvml": "NVML; imported by the helper process only (nvidia-ml-py)",
    "prometheus_client": "the metrics text format",
    "pyudev": "kernel events",
    "yaml": "the configuration's syntax (pyyaml)",
    "structlog": "events with fields",
    "zstandard": "archives of captures; imported by the command line only",
}
_PROBE = """
import importlib, os, time
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, began = resident(), time.perf_counter()
importlib.import_module({module!r})
print((time.perf_counter() - began) * 1e3, (resident() - before) / 2**20)
"""


def weigh(module: str) -> tuple[float, float]:
    """(milliseconds, MiB), medians."""
    found = []
    for _ in range(RUNS):
        command = [sys.executable, "-c", _PROBE.format(module=module)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found.append((float(out[0]), float(out[1])))
    return statistics.median(ms for ms, _ in found), statistics.median(mib for _, mib in found)


def main() -> None:
    for module, reason in MODULES.items():
        took_ms, mib = weigh(module)
        print(f"| `{module}` | {reason} | {took_ms:.0f} | {mib:.1f} |")


if __name__ == "__main__":
    main()
