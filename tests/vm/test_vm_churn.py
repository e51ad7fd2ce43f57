"""Pods that come and go at random, while a program of its own reads what every container may run on."""

from __future__ import annotations

import json
import os

from tests.vm.vmguest import Guest
from tests.vm.vmpods import PYTHON, pinning

SEED = int(os.environ.get("NODEAGENT_VM_SEED", "2026"))
SECONDS, PODS = 120, int(os.environ.get("NODEAGENT_VM_PODS", "40"))
LIMIT_S = 1500.0
"""One core of the host is all 16 of the guest: a pod's life, with all who look on, takes 12 s of it."""
LEAST_READS = 75 * PODS
"""In a slow guest a pod's life is read some three hundred times."""


def test_no_container_ever_shares_a_cpu_with_one_that_holds_it(pods_guest: Guest) -> None:
    """At no time between the return of StartContainer and StopContainer, sandboxes and containers that are just being
    started among the others."""
    before = pods_guest.run("journalctl --no-pager -u nodeagent | grep -c '\"drift\"' || true")
    said = json.loads(pods_guest.run(f"{PYTHON} /share/inside/churn.py {SECONDS} {PODS} {SEED}", LIMIT_S))
    after = pods_guest.run("journalctl --no-pager -u nodeagent | grep -c '\"drift\"' || true")
    made = sum(said["made"].values())
    print(f"vm: churn: seed {SEED}, {made} pods {said['made']} in {said['seconds']:.0f} s")
    print(
        f"vm: churn: {said['rounds']} rounds, {said['reads']} reads, {said['pairs']} pairs, {said['overlaps']} overlaps"
    )
    print(f"vm: churn: {int(after) - int(before)} drifts repaired; the slowest pod took {said['longest_s']:.1f} s")
    assert said["failures"] == []
    assert said["overlaps"] == 0 and said["wrong"] == 0, json.dumps(said["shown"], indent=1)
    assert made >= PODS and said["reads"] > LEAST_READS and said["pairs"] > LEAST_READS
    assert all(said["made"].values())


def test_nothing_is_left_of_the_pods(pods_guest: Guest) -> None:
    pods_guest.kubelet("admit", name="next", wants={})
    pods_guest.kubelet("delete", name="next")
    pods_guest.run("test \"$(nodeagent grants -o json | tr -d '[:space:]')\" = '[]'", until=True)
    standing = pinning(pods_guest)
    assert standing["pinned"] == [] and standing["errors"] == {}
    assert pods_guest.run("ls -d /run/systemd/system/kubepods-pod*.slice.d 2>/dev/null || true") == ""
