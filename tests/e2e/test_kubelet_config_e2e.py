"""The configuration that the agent works out is the one that a real kubelet logs when it starts (from 1.37 on)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.kube.kubelet_files import config as kubelet_config
from nodeagent.kube.kubelet_files.config import API_VERSION, DEFAULTS, KIND
from nodeagent.kube.kubelet_files.flags import parse

KUBELET = Path(os.environ.get("NODEAGENT_E2E_BIN") or "/nonexistent") / "kubelet"
LOGGED = re.compile(r'"Effective KubeletConfiguration" config=<\n(.*?)\n >', re.DOTALL)
ENDS = "--healthz-port=99999999"
"""Refused by kubelet right after it has logged its configuration: it changes nothing on this machine."""
EXAMPLES = 60

TEXT = ("cpuManagerPolicy", "memoryManagerPolicy", "reservedSystemCPUs", "cgroupRoot", "topologyManagerPolicy")
MAPS = ("systemReserved", "kubeReserved", "cpuManagerPolicyOptions")
texts = st.sampled_from(["", "0", "0,8", "1-3", "static", "none"])
maps = st.dictionaries(st.sampled_from(["cpu", "memory", "pid"]), st.sampled_from(["1", "2Gi"]), max_size=3)
spelled = st.sampled_from([str, str, str, str.lower, str.upper])


def documents(*, patch: bool) -> st.SearchStrategy[dict[str, Any]]:
    """A file of kubelet's configuration; a patch may take keys back with null."""
    null: Any = st.none() if patch else st.nothing()
    values: Any = st.sampled_from(["1", None] if patch else ["1"])
    inner = st.dictionaries(st.sampled_from(["cpu", "pid"]), values, max_size=2)
    text = st.dictionaries(st.sampled_from(TEXT), st.one_of(texts, null), max_size=4)
    pairs = st.dictionaries(st.sampled_from(MAPS), st.one_of(maps, inner, null), max_size=2)
    head = {"apiVersion": API_VERSION, "kind": KIND}
    return st.builds(
        lambda one, two, spell: head | {(spell(key) if patch else key): value for key, value in (one | two).items()},
        text,
        pairs,
        spelled,
    )


FLAGS = st.one_of(
    st.builds("--{}={}".format, st.sampled_from(["cpu-manager-policy", "reserved_cpus", "cgroup-root"]), texts),
    st.builds("--{}={}".format, st.sampled_from(["system-reserved", "kube-reserved"]), st.sampled_from(["", "cpu=2"])),
    st.sampled_from(["--fail-swap-on", "--v=2", "--cpu-manager-policy-options=a=b,c=d", "--max-pods=9"]),
)
NAMES = st.sampled_from(["10.conf", "9.conf", "a.conf", "A.conf", "a/z.conf", "x.yaml", ".conf"])


def logged(words: list[str]) -> dict[str, Any]:
    """What kubelet says that its configuration is."""
    done = subprocess.run([KUBELET, *words, ENDS], capture_output=True, text=True, check=False, timeout=60)
    if (found := LOGGED.search(done.stderr)) is None:
        pytest.skip(f"{KUBELET} does not log its effective configuration: {done.stderr[-300:]}")
    whole: dict[str, Any] = yaml.safe_load(re.sub("^\t", "", found[1], flags=re.MULTILINE))
    return whole


@pytest.mark.skipif(not os.access(KUBELET, os.X_OK), reason="NODEAGENT_E2E_BIN is not set: the folder with kubelet")
@settings(max_examples=EXAMPLES)
@given(
    file=st.one_of(st.none(), documents(patch=False)),
    drop_ins=st.dictionaries(NAMES, documents(patch=True), max_size=3),
    flags=st.lists(FLAGS, max_size=3),
)
def test_kubelet_logs_the_configuration_that_the_agent_works_out(
    file: dict[str, Any] | None,
    drop_ins: dict[str, dict[str, Any]],
    flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("kubelet")
    base, drops = folder / "c.yaml", folder / "d"
    drops.mkdir()
    for name, document in drop_ins.items():
        (drops / name).parent.mkdir(exist_ok=True)
        (drops / name).write_text(yaml.safe_dump(document))
    if file is not None:
        base.write_text(yaml.safe_dump(file))
    there = [f"--config={base}"] if file is not None else []
    theirs = logged([*there, "--config-dir", str(drops), *flags])
    ours = kubelet_config.read(str(base) if there else "", str(drops), parse(flags, "kubelet"), "kubelet").values
    for key in (*TEXT, *MAPS, *DEFAULTS):
        assert (theirs.get(key) or None) == (ours.get(key) or None), key
