"""What runs keeps what it holds on a real node: while kubelet knows none of its pods, and after the ledger was lost."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from nodeagent.core.model.cpuset import CpuSet
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import claim, request, until
from tests.e2e.nodeview import delete_pod, grants, run_pod, said
from tests.e2e.test_restarts_e2e import containers, hold_some

node, started = nodeview.node, nodeview.started
SILENT_S = 12.0
"""Longer than every patience of the agent's configuration here."""


@contextmanager
def silent_api_server(node: Cluster) -> Iterator[None]:
    """It keeps its connections and answers nothing."""
    node.send("kube-apiserver", signal.SIGSTOP)
    try:
        yield
    finally:
        node.send("kube-apiserver", signal.SIGCONT)


def ledger(node: Cluster) -> Path:
    return node.folder / "agent/state/ledger.db"


def listed_since(node: Cluster, since: float) -> bool:
    return float(node.status().get("listed_at") or 0) > since


def test_pods_keep_what_they_hold_while_a_restarted_kubelet_cannot_reach_the_api_server(node: Cluster) -> None:
    """Kubelet answers with a list that has none of them, for longer than any patience."""
    before, alive = hold_some(node), containers(node)
    with silent_api_server(node):
        node.restart("kubelet")
        began = time.time()
        until("kubelet lists pods again", lambda: listed_since(node, began + 1))
        until("it has done so for long", lambda: listed_since(node, began + SILENT_S))
        assert grants(node) == before
    node.agent_ready()
    assert (grants(node), containers(node)) == (before, alive)
    delete_pod(node, "plugged")
    until("the deleted pod's port is released", lambda: len(grants(node)) == len(before) - 1, 5.0)


def test_a_prepared_claim_outlives_an_overwritten_ledger(node: Cluster) -> None:
    """The same grants afterwards, and no other pod gets the CPUs of the containers that run on."""
    before, alive = hold_some(node), containers(node)
    assert node.stop("nodeagent", signal.SIGKILL) == -signal.SIGKILL
    for journal in ledger(node).parent.glob("ledger.db-*"):
        journal.unlink()
    ledger(node).write_bytes(b"\xa5" * 20_000)
    node.start("nodeagent")
    node.agent_ready()
    after = until("everything is held again", lambda: len(found := grants(node)) == len(before) and found)
    assert sorted(one[1:] for one in after) == sorted(one[1:] for one in before)
    assert containers(node) == alive
    node.api.create(claim("later", request("cpus", "cpu", cpus="1")))
    run_pod(node, "later", {"cpus": "later"})
    held = [CpuSet.parse(one["cpus"]) for one in node.grants() if one["cpus"]]
    assert sum(map(len, held)) == len({cpu for one in held for cpu in one})


def test_a_newer_versions_ledger_ends_the_agent_and_is_left_alone(node: Cluster) -> None:
    """Its own build reads it again."""
    before = hold_some(node)
    said(node, "claimed")
    assert node.stop("nodeagent") == 0
    with closing(sqlite3.connect(ledger(node))) as db:
        db.execute("PRAGMA user_version = 99")
    node.start("nodeagent")
    assert node.wait("nodeagent") == 2
    with closing(sqlite3.connect(ledger(node))) as db:
        db.execute("PRAGMA user_version = 1")
    node.start("nodeagent")
    node.agent_ready()
    assert grants(node) == before
