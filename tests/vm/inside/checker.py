"""Runs in the guest: reads what containers may run on, again and again, and finds those that share a CPU.

    checker.py EXCLUSIVE OUT    until SIGTERM; then OUT has one object of JSON

EXCLUSIVE is what the maker of the pods knows: {CONTAINER ID: CPUS} of containers that have started and are not being
stopped, replaced as a whole. A container counts as exclusive in a round where the file said so before the round and
after it. Nothing of the product is used here.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

PODS = Path("/sys/fs/cgroup/kubepods.slice")
ALLOWED = re.compile(r"Cpus_allowed_list:\t(\S*)")
PAUSE = 2.0
"""After a round, in its own time: the guest's processors are one thread of the host's, others need some of it too."""
MOST_SHOWN = 20


def cpus(text: str) -> set[int]:
    """ "0-2,5" -> {0, 1, 2, 5}"""
    ends = [one.split("-") for one in text.strip().split(",") if one]
    return {cpu for one in ends for cpu in range(int(one[0]), int(one[-1]) + 1)}


class Checker:
    def __init__(self, exclusive: Path) -> None:
        self._exclusive = exclusive
        self.rounds = self.reads = self.pairs = self.empty = 0
        self.overlaps: list[dict[str, Any]] = []
        self.wrong: list[dict[str, Any]] = []

    def round(self) -> None:
        before = self._known()
        seen = {scope: self._seen(scope) for scope in self._scopes()}
        after = self._known()
        self.rounds += 1
        for one, held in before.items():
            if after.get(one) == held:
                self._check(one, cpus(held), seen)

    def _known(self) -> dict[str, str]:
        known: dict[str, str] = json.loads(self._exclusive.read_text())
        return known

    def _scopes(self) -> list[Path]:
        """crun has the processes in a cgroup below the scope."""
        forms = ("*.scope", "*.scope/container")
        return [scope for pod in PODS.glob("*.slice") for form in forms for scope in pod.glob(form)]

    def _seen(self, scope: Path) -> dict[str, set[int]]:
        """What its cgroup lets it run on, and what each of its processes may run on, by what was read. Where nothing
        runs, on no CPU: a cgroup is there before systemd has written to it and put a process in."""
        found: dict[str, set[int]] = {}
        try:
            processes = (scope / "cgroup.procs").read_text().split()
            if not processes:
                self.empty += 1
                return found
            found["cgroup"] = cpus((scope / "cpuset.cpus.effective").read_text())
            self.reads += 1
            for process in processes:
                found[process] = cpus(ALLOWED.search(Path(f"/proc/{process}/status").read_text())[1])  # type: ignore[index]
                self.reads += 1
        except OSError:
            pass  # it has ended meanwhile
        return found

    def _check(self, container: str, held: set[int], seen: dict[Path, dict[str, set[int]]]) -> None:
        for scope, found in seen.items():
            for where, may in found.items():
                said = {"at_s": time.monotonic(), "exclusive": container, "cpus": sorted(held)}
                said |= {"scope": str(scope), "where": where, "may": sorted(may)}
                if container in str(scope):
                    if may != held:
                        self.wrong.append(said)
                else:
                    self.pairs += 1
                    if may & held:
                        self.overlaps.append(said)

    def document(self) -> dict[str, Any]:
        counts = {"rounds": self.rounds, "reads": self.reads, "pairs": self.pairs, "empty": self.empty}
        counts |= {"overlaps": len(self.overlaps), "wrong": len(self.wrong)}
        return {**counts, "shown": [*self.overlaps[:MOST_SHOWN], *self.wrong[:MOST_SHOWN]]}


def main(exclusive: str, out: str) -> None:
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    checker = Checker(Path(exclusive))
    while not ended:
        began = time.monotonic()
        checker.round()
        time.sleep(PAUSE * (time.monotonic() - began))
    Path(out).write_text(json.dumps(checker.document()))


if __name__ == "__main__":
    main(*sys.argv[1:])
