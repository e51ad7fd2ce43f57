"""Runs in the guest, with nothing but the standard library: executes what the host asks for, one request at a time.

Lines of JSON on the virtio port, after a first one that says the guest is up:
    {"command": "...", "limit_s": 60, "until": false}  ->  {"rc": 0, "out": "..."}; until: again until it ends with 0
    {"kubelet": {...}}                                 ->  the answer of kubelet.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from typing import Any

PORT = "/dev/virtio-ports/vm.control"
KUBELET = "/run/vm-kubelet.sock"
BETWEEN_S = 0.1


def run(command: str, limit_s: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            env={**os.environ, "HOME": "/root"},
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return {"rc": 124, "out": (late.stdout or b"").decode(errors="replace")}
    return {"rc": done.returncode, "out": done.stdout.decode(errors="replace")}


def run_until(command: str, limit_s: float) -> dict[str, Any]:
    """The first good answer, or the last bad one."""
    end = time.monotonic() + limit_s
    while True:
        done = run(command, max(1.0, end - time.monotonic()))
        if done["rc"] == 0 or time.monotonic() >= end:
            return done
        time.sleep(BETWEEN_S)


def ask_kubelet(request: dict[str, Any]) -> Any:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(KUBELET)
        line.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(line.makefile().readline())


def answer(request: dict[str, Any]) -> Any:
    if "kubelet" in request:
        return ask_kubelet(request["kubelet"])
    how = run_until if request["until"] else run
    return how(request["command"], request["limit_s"])


def main() -> None:
    with open(PORT, "r+b", buffering=0) as port:
        port.write(json.dumps({"up_s": time.monotonic()}).encode() + b"\n")
        buffered = b""
        while True:
            buffered += os.read(port.fileno(), 1 << 16)
            while b"\n" in buffered:
                line, buffered = buffered.split(b"\n", 1)
                try:
                    said = answer(json.loads(line))
                except (OSError, ValueError, KeyError) as error:
                    said = {"error": repr(error)}
                rest = memoryview(json.dumps(said).encode() + b"\n")
                while rest:
                    rest = rest[port.write(rest) :]


if __name__ == "__main__":
    main()
