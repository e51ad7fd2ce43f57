"""Pods made through the CRI of a real containerd, beside the agent."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from vmguest import Guest
from vmnode import prepare_runtime, started

CPU = "nodeagent.dev/cpu"
PODS = "/opt/nodeagent/bin/python /share/inside/pods.py"
FIRST_LINES = "grep -h _allowed_list /proc/self/status; echo CPUS=$NODEAGENT_CPUS; exec sleep infinity"


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with started() as booted:
        prepare_runtime(booted)
        yield booted


def run_pod(guest: Guest, name: str, *, cpus: str = "", env: str = "X=") -> tuple[str, dict[str, str]]:
    """The sandbox's id and what the container's first lines say, by their first word."""
    made, _ = guest.run(f"{PODS} run {name} uid-{name} '{FIRST_LINES}' '{cpus}' {env}").split()
    log = f"/var/log/pods/{name}/main.log"
    guest.run(f"grep -q CPUS= {log}", until=True)
    texts = [line.split(" ", 3)[3] for line in guest.run(f"cat {log}").splitlines()]
    return made, dict(text.replace(":\t", "=").split("=", 1) for text in texts)


def test_the_runtime_offers_nri_and_cdi(guest: Guest) -> None:
    guest.run("test -S /var/run/nri/nri.sock")
    assert "enable_cdi = true" in guest.run("containerd config dump")


def test_a_pod_runs_on_the_cpuset_that_the_runtime_was_given(guest: Guest) -> None:
    """What the scenarios of pinning stand on: the container's own first line and the kernel's cgroup agree."""
    made, said = run_pod(guest, "given", cpus="4-7")
    assert said["Cpus_allowed_list"] == "4-7"
    effective = guest.run("cat /sys/fs/cgroup/kubepods.slice/kubepods-poduid_given.slice/*/cpuset.cpus.effective")
    assert "4-7" in effective.split()
    guest.run(f"{PODS} remove {made}")
    guest.run("test ! -e /sys/fs/cgroup/kubepods.slice/kubepods-poduid_given.slice/cri-containerd-*", until=True)


def test_a_container_gets_what_kubelet_was_answered(guest: Guest) -> None:
    answer = guest.kubelet("admit", name="answered", wants={CPU: 2})
    (grant,) = json.loads(guest.run("nodeagent grants -o json"))
    made, said = run_pod(guest, "answered", env=f"NODEAGENT_CPUS={answer['envs']['NODEAGENT_CPUS']}")
    assert said["CPUS"] == grant["cpus"]
    guest.run(f"{PODS} remove {made}")
