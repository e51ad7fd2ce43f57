"""The first process of the node's own namespaces: mounts what the node shall have to itself, then starts and signals
processes as it is told, a line of JSON for each request and each answer.

Promises: whatever ends it, the end of its standard input among that, ends every process and every mount of the node:
containers too live in its PID namespace. Nothing outside the namespaces was changed by the mounts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.02
FULL = os.makedev(1, 7)
"""What every made-up device node is: /dev/full reads as zeros."""


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"cannot mount {' '.join(map(str, words))}: {done.stderr.strip()}")


def overlay(place: Path, scratch: Path) -> None:
    """From here on, what is written below `place` is written to `scratch`."""
    for name in ("upper", "work", "merged"):
        (scratch / name).mkdir(parents=True)
    options = f"lowerdir={place},upperdir={scratch / 'upper'},workdir={scratch / 'work'}"
    mount("-t", "overlay", "overlay", "-o", options, scratch / "merged")


def prepare(folder: Path, device_nodes: list[str]) -> None:
    """/dev, /run and /var that belong to the node, and what containerd needs a real file system for."""
    scratch = folder / "scratch"
    scratch.mkdir()
    mount("-t", "tmpfs", "tmpfs", scratch)
    overlay(Path("/dev"), scratch / "dev")
    for name in ("pts", "shm", "mqueue"):
        if os.path.ismount(f"/dev/{name}"):
            mount("--rbind", f"/dev/{name}", scratch / "dev/merged" / name)
    mount("--move", scratch / "dev/merged", "/dev")
    for path in device_nodes:
        os.mknod(path, stat.S_IFCHR | 0o660, FULL)
    mount("-t", "tmpfs", "tmpfs", "/run")
    overlay(Path("/var"), scratch / "var")
    (scratch / "var/merged/lib/kubelet").mkdir(parents=True, exist_ok=True)
    (folder / "kubelet").mkdir()
    mount("--bind", folder / "kubelet", scratch / "var/merged/lib/kubelet")
    mount("--move", scratch / "var/merged", "/var")
    # As on a host with systemd. Kubelet would mount its folder once more, and containerd looks at the lower mount.
    mount("--make-rshared", "/var/lib/kubelet")


class Processes:
    """What was started, by name."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._codes: dict[int, int] = {}

    def start(self, name: str, words: list[str], env: dict[str, str], log: str) -> int:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        files = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2), (os.POSIX_SPAWN_CLOSE, 0)]
        program = shutil.which(words[0], path=env["PATH"]) or words[0]
        self._pids[name] = os.posix_spawn(program, words, {**os.environ, **env}, file_actions=files, setsid=True)
        os.close(output)
        return self._pids[name]

    def signal(self, name: str, number: int) -> None:
        if self.ended(name) is None:
            os.kill(self._pids[name], number)

    def wait(self, name: str, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None: it still runs."""
        end = time.monotonic() + timeout_s
        while self.ended(name) is None and time.monotonic() < end:
            time.sleep(POLL_S)
        return self.ended(name)

    def ended(self, name: str) -> int | None:
        self._reap()
        return self._codes.get(self._pids[name])

    def _reap(self) -> None:
        """Of children, and of orphans of any process here."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._codes[pid] = os.waitstatus_to_exitcode(status)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes = Processes()
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        answer: Any
        try:
            if verb == "prepare":
                answer = prepare(Path(arguments[0]), arguments[1])
            elif verb in ("mknod", "unlink"):
                answer = (
                    os.mknod(arguments[0], stat.S_IFCHR | 0o660, FULL) if verb == "mknod" else os.unlink(arguments[0])
                )
            else:
                answer = getattr(processes, verb)(*arguments)
            print(json.dumps({"answer": answer}), flush=True)
        except OSError as error:
            print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
