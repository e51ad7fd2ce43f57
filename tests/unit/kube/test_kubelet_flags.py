"""Kubelet's flags are read as kubelet reads them: each line of these tables was tried on kubelet 1.37."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent.errors import InputError
from nodeagent.kube.kubelet_files.flags import CONFIG, CONFIG_DIR, HOSTNAME, ROOT_DIR, parse

FILE: dict[str, Any] = {
    "cpuManagerPolicy": "static",
    "reservedSystemCPUs": "0",
    "systemReserved": {"cpu": "100m", "memory": "1Gi"},
    "cpuManagerPolicyOptions": {"full-pcpus-only": "true"},
    "featureGates": {"CPUManagerPolicyAlphaOptions": True},
    "reservedMemory": [{"numaNode": 0, "limits": {"memory": "1Gi"}}],
}


def changed(*words: str) -> dict[str, Any]:
    """What these flags make of FILE."""
    return {key: value for _, key, value in parse(words, "kubelet").over(FILE, "kubelet")}


@pytest.mark.parametrize(
    ("words", "reserved"),
    [
        (("--reserved-cpus", "3"), "3"),
        (("--reserved-cpus=3",), "3"),
        (("--reserved_cpus=3",), "3"),
        (("--reserved-cpus=3", "--reserved-cpus", "4"), "4"),
        (("--reserved-cpus=",), ""),
        (("--reserved-cpus", ""), ""),
        (("--reserved-cpus", "--cpu-manager-policy=none"), "--cpu-manager-policy=none"),
        (("--fail-swap-on", "--reserved-cpus=7"), "7"),
        (("--fail-swap-on=false", "--reserved-cpus=7"), "7"),
        (("--max-pods", "-1", "--reserved-cpus=7"), "7"),
        (("-v", "4", "--reserved-cpus=7"), "7"),
        (("-v=4", "--v", "3", "--reserved-cpus=7"), "7"),
        (("--node-labels=a=b,c=d", "--reserved-cpus=7"), "7"),
    ],
)
def test_a_value_is_found_however_it_is_written(words: tuple[str, ...], reserved: str) -> None:
    assert changed(*words) == {"reservedSystemCPUs": reserved}


@pytest.mark.parametrize(
    ("words", "after"),
    [
        (("--cpu-manager-policy=none",), {"cpuManagerPolicy": "none"}),
        (("--memory-manager-policy", "Static"), {"memoryManagerPolicy": "Static"}),
        (("--topology-manager-policy=restricted",), {"topologyManagerPolicy": "restricted"}),
        (("--topology-manager-scope=pod",), {"topologyManagerScope": "pod"}),
        (("--topology-manager-policy-options=a=b,c=d",), {"topologyManagerPolicyOptions": {"a": "b", "c": "d"}}),
        (("--cgroup-root=/a", "--cgroup-driver=systemd"), {"cgroupRoot": "/a", "cgroupDriver": "systemd"}),
        (("--kube-reserved=cpu=1",), {"kubeReserved": {"cpu": "1"}}),
        (("--system-reserved=cpu=1",), {"systemReserved": {"cpu": "1"}}),
        (
            ("--system-reserved=cpu=1", "--system-reserved=pid=5, memory = 2Gi"),
            {"systemReserved": {"cpu": "1", "pid": "5", "memory": "2Gi"}},
        ),
        (("--system-reserved=",), {"systemReserved": {}}),
        (("--cpu-manager-policy-options=a=true,b=false",), {"cpuManagerPolicyOptions": {"a": "true,b=false"}}),
        (
            ("--cpu-manager-policy-options=a=1", "--cpu-manager-policy-options=b=2"),
            {"cpuManagerPolicyOptions": {"a": "1", "b": "2"}},
        ),
        (("--feature-gates=X=T",), {"featureGates": {"CPUManagerPolicyAlphaOptions": True, "X": True}}),
        (
            ("--feature-gates=CPUManagerPolicyAlphaOptions=f",),
            {"featureGates": {"CPUManagerPolicyAlphaOptions": False}},
        ),
        (
            ("--reserved-memory=0:memory=1Gi,hugepages-2Mi=2Mi;1:memory=2Gi", "--reserved-memory=2:memory=3Gi"),
            {
                "reservedMemory": [
                    {"numaNode": 0, "limits": {"memory": "1Gi", "hugepages-2Mi": "2Mi"}},
                    {"numaNode": 1, "limits": {"memory": "2Gi"}},
                    {"numaNode": 2, "limits": {"memory": "3Gi"}},
                ]
            },
        ),
        (("--reserved-memory=",), {"reservedMemory": FILE["reservedMemory"]}),
        ((), {}),
    ],
)
def test_a_flag_replaces_what_the_file_says_or_is_added_to_it(words: tuple[str, ...], after: dict[str, Any]) -> None:
    """Pairs replace all pairs of the file; only feature gates are added to those of the file."""
    assert changed(*words) == after


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reserved-cpus",), "cannot read --reserved-cpus of kubelet: it has no value"),
        (("--system-reserved=cpu",), "cannot read --system-reserved of kubelet: 'cpu', expected KEY=VALUE"),
        (("--feature-gates=X=yes",), "cannot read --feature-gates of kubelet: 'X=yes', expected true or false"),
        (("--reserved-memory=memory=1Gi",), "cannot read --reserved-memory of kubelet: 'memory=1Gi', expected NODE:"),
        (("--reserved-memory=x:memory=1Gi",), "cannot read --reserved-memory of kubelet: 'x:memory=1Gi', expected "),
    ],
)
def test_a_flag_that_kubelet_would_refuse_is_named_with_its_value(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as bad:
        changed(*words)
    assert str(bad.value).startswith(message)


def test_flags_that_are_no_configuration_are_read_too() -> None:
    """Where files lie, and what the node is called."""
    words = ("--config=a", "--config", "b", "--config_dir=d", "--root-dir=/r", "--hostname-override", "N", "--x", "y")
    flags = parse(words, "kubelet")
    assert [flags.last(one) for one in (CONFIG, CONFIG_DIR, ROOT_DIR, HOSTNAME)] == ["b", "d", "/r", "N"]
    assert parse((), "kubelet").last(CONFIG) == ""


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("-h",), ("--version=raw",), ("--v=2", "--help")])
def test_a_kubelet_that_is_asked_for_its_version_or_its_help_runs_no_pods(words: tuple[str, ...]) -> None:
    assert parse(words, "kubelet").ends_at_once
    assert not parse(("--version=false", "--v=2"), "kubelet").ends_at_once


def test_what_follows_two_dashes_is_no_flag() -> None:
    assert changed("--", "--reserved-cpus=7") == {}
