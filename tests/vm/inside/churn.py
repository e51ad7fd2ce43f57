"""Runs in the guest: pods created and deleted at random, while checker.py looks on.

    churn.py SECONDS PODS SEED    at least so long and at least so many pods; prints one object of JSON

A pod has a container with one to three CPUs of its own, or none, or one alongside another that has none. What is
exclusive is told to the checker once the container has started, and taken back before it is stopped.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, "/share/inside")

from control import ask_kubelet
from pods import Runtime

CPU = "nodeagent.dev/cpu"
EXCLUSIVE, OUT = Path("/run/vm-exclusive.json"), Path("/run/vm-checked.json")
MOST_PODS, MOST_CPUS = 6, 12
WAIT = {"script": "exec sleep infinity"}
FAILED_S = 0.2
MOST_FAILURES = 20


class Churn:
    def __init__(self, runtime: Runtime, seed: int) -> None:
        self._runtime = runtime
        self._random = random.Random(seed)
        self._living: dict[str, dict[str, Any]] = {}
        self._exclusive: dict[str, str] = {}
        self.made = {"exclusive": 0, "shared": 0, "mixed": 0}
        self.failures: list[str] = []
        self.longest_s = 0.0
        self._tell()

    def step(self) -> None:
        """One pod more or less."""
        room = len(self._living) < MOST_PODS
        if self._living and (not room or self._random.random() < 0.4):
            self.end(self._random.choice(sorted(self._living)))
        else:
            self._begin(self._random.choice(sorted(self.made)))

    def _begin(self, kind: str) -> None:
        name, count = f"{kind}-{sum(self.made.values())}", self._random.randint(1, 3)
        if kind != "shared" and sum(one["count"] for one in self._living.values()) + count > MOST_CPUS:
            return
        began = time.monotonic()
        try:
            self._make(name, kind, count if kind != "shared" else 0)
        except (RuntimeError, grpc.RpcError) as error:
            self.failures.append(f"{name}: {error}")
            time.sleep(FAILED_S)
            return
        self.made[kind] += 1
        self.longest_s = max(self.longest_s, time.monotonic() - began)

    def _make(self, name: str, kind: str, count: int) -> None:
        others: dict[str, Any] = {"alongside": {}} if kind == "mixed" else {}
        answer = ask_kubelet({"do": "admit", "name": name, "wants": {CPU: count} if count else {}, "others": others})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        uid = answer["uid"]
        pod = self._living[name] = {"uid": uid, "count": count, "ids": [], "sandbox": ""}
        made = {"name": name, "uid": uid}
        pod["sandbox"] = self._runtime.sandbox(made)
        order = ["main", *others]
        self._random.shuffle(order)
        for one in order:
            container = {**WAIT, "name": one, "envs": answer["envs"] if one == "main" else {}}
            pod["ids"].append(self._runtime.container(pod["sandbox"], made, container))
            if count and one == "main":
                self._exclusive[pod["ids"][-1]] = answer["envs"]["NODEAGENT_CPUS"]
                self._tell()

    def end(self, name: str) -> None:
        pod = self._living.pop(name)
        for one in pod["ids"]:
            self._exclusive.pop(one, None)
        self._tell()
        if pod["sandbox"]:
            self._runtime.remove(pod["sandbox"], pod["uid"])
        ask_kubelet({"do": "delete", "name": name})

    def end_all(self) -> None:
        for name in sorted(self._living):
            self.end(name)

    def _tell(self) -> None:
        draft = EXCLUSIVE.with_suffix(".new")
        draft.write_text(json.dumps(self._exclusive))
        draft.replace(EXCLUSIVE)


def main(seconds: str, pods: str, seed: str) -> None:
    with Runtime() as runtime:
        churn = Churn(runtime, int(seed))
        began = time.monotonic()
        checker = subprocess.Popen([sys.executable, "/share/inside/checker.py", str(EXCLUSIVE), str(OUT)])
        try:
            while (took_s := time.monotonic() - began) < float(seconds) or sum(churn.made.values()) < int(pods):
                churn.step()
                if len(churn.failures) > MOST_FAILURES:
                    break
        finally:
            os.kill(checker.pid, signal.SIGTERM)
            checker.wait()
        churn.end_all()
    checked = json.loads(OUT.read_text())
    how = {"seconds": took_s, "made": churn.made, "failures": churn.failures, "longest_s": churn.longest_s}
    print(json.dumps({**how, **checked}))


if __name__ == "__main__":
    main(*sys.argv[1:])
