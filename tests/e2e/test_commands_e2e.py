"""The verbs of the command line on a node with a real kubelet, run in its namespaces as an admin there would. `run` is
what runs there; `bench placement`, which needs the real CPUs, is tried in the guest, `web` with a browser.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

import yaml

from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import claim, pod, request, until
from tests.e2e.nodeview import allocatable, run_pod

node, started = nodeview.node, nodeview.started
GRANTED = "default/old"
TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


class Answer(NamedTuple):
    code: int
    text: str
    """stdout and stderr, as a terminal shows them."""


def ask(node: Cluster, words: Sequence[str], *, terminal: bool = False) -> Answer:
    """Run a verb in the node's namespaces. terminal: in a terminal."""
    command = shlex.join([sys.executable, "-m", "nodeagent", *words])
    if terminal:
        command = f"TERM=xterm {shlex.quote(sys.executable)} -c {shlex.quote(TERMINAL)} {command} </dev/null"
    *lines, last = node.output("sh", "-c", f"{command} 2>&1; echo exit $?").splitlines()
    assert "Traceback" not in "\n".join(lines)
    return Answer(int(last.removeprefix("exit ")), "\n".join(lines))


def prepared(node: Cluster) -> dict[str, str]:
    """A pod with CPUs and a port through the device plugin, one with a claim; what commands may name."""
    until("kubelet shows everything", lambda: allocatable(node, "cpu") == 8 and allocatable(node, "port"))
    run_pod(node, "old", cpu="2", port="1")
    node.api.create(claim("c", request("r", "cpu", cpus="2")))
    run_pod(node, "mine", {"m": "c"})
    manifest = node.folder / "pod.yaml"
    manifest.write_text(yaml.safe_dump(pod("p", limits={"nodeagent.dev/cpu": "1"})))
    agent = node.folder / "agent"
    named = {"socket": agent / "run/status.sock", "config": agent / "config.yaml", "state": agent / "state"}
    return {name: str(path) for name, path in {**named, "manifest": manifest, "folder": node.folder}.items()}


ON_SOCKET = {
    "status": "ready",
    "grants": GRANTED,
    "devices": "nodeagent.dev/cpu",
    "map": "old",
    "health": "",
    "metrics": "nodeagent_held",
    "explain pod default/old": "nodeagent.dev/port",
    "explain claim default/c": "default/c",
    "explain cpu 0": "0",
    "explain --cpus 2": "fits",
    "advise --cpus 4": "",
    "forecast --pod {manifest}": "more",
    "template": "ResourceSlice",
    "doctor --config {config}": "kubelet",
    "wait --for=ready": "ready",
    "version": "nodeagent",
    "reload": "",
}
"""What is asked of a running agent, and a word of each answer."""
HERE = {
    "inventory": "NUMA",
    "place --cpus 2": "cpus",
    "config check {config}": "",
    "config schema": "$defs",
    "history --state-dir {state}": GRANTED,
    "ledger export --state-dir {state}": GRANTED.rpartition("/")[2],
    "import kubelet-state --config {config}": "",
    "completion bash": "complete",
    "uninstall --dry-run": "would be refused",
}
"""What needs no agent."""
NOT_WELL = {"doctor": (0, 1, 2), "advise": (0, 3), "uninstall": (3,), "import": (0, 2)}
"""Exit codes of verbs that depend on the machine, or that pods in use forbid."""


def test_the_verbs_answer_on_a_real_node(node: Cluster) -> None:
    named = prepared(node)
    asked = [(words, wanted, ["--socket", named["socket"]]) for words, wanted in ON_SOCKET.items()]
    asked += [(words, wanted, []) for words, wanted in HERE.items()]
    wrong = {}
    for words, wanted, more in asked:
        answer = ask(node, [*words.format(**named).split(), *more])
        if answer.code not in NOT_WELL.get(words.split()[0], (0,)) or wanted not in answer.text:
            wrong[words] = answer
    assert wrong == {}


def test_top_redraws_in_a_terminal(node: Cluster) -> None:
    named = prepared(node)
    socket = ["--socket", named["socket"]]
    assert GRANTED in ask(node, ["top", "-b", "-n", "1", *socket]).text
    assert ask(node, ["top", "-n", "2", "-d", "1", *socket], terminal=True).text.count(GRANTED) == 2


def test_a_capture_of_a_real_node_answers_as_the_node(node: Cluster) -> None:
    named = prepared(node)
    archive = f"{named['folder']}/capture.tar.zst"
    socket = ["--socket", named["socket"]]
    assert ask(node, ["capture", "-o", archive, *socket, "--config", named["config"]]).code == 0
    for words in ("status", "map", "doctor"):
        assert ask(node, ["replay", archive, words]).code in NOT_WELL.get(words, (0,))
    explained = ask(node, ["replay", archive, "explain", "pod", GRANTED])
    assert explained.code == 0 and "nodeagent.dev/cpu" in explained.text


def test_a_grant_in_use_is_not_taken_back_without_the_word(node: Cluster) -> None:
    named = prepared(node)
    grants = sorted(one["id"] for one in node.grants())
    answer = ask(node, ["release", grants[0], "--socket", named["socket"]])
    assert answer.code != 0 and "--yes" in answer.text
    assert sorted(one["id"] for one in node.grants()) == grants
