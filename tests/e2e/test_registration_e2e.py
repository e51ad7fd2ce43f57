"""Registration of the device plugin with a real kubelet: whatever happens to its socket, to ours and to both processes,
kubelet shows what is advertised within seconds, and pods get it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

from nodeagent.kube.kubelet.pod_resources import PodResources
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import until
from tests.e2e.nodefiles import DRIVER, PORTS
from tests.e2e.nodeview import delete_pod, run_pod
from tests.support.long_form import LONG

node, started = nodeview.node, nodeview.started

PORT = f"{DRIVER}/port"
AGAIN_S = 2.0
REGISTER_S = 20.0
"""A Register's deadline, and some more."""
RESTARTS, KUBELET_RESTARTS, REPLACED = (200, 50, 20) if LONG else (10, 2, 3)
"""How often each is done: NODEAGENT_LONG=1 for all that is promised."""
STOPPED_S = 48.0 if LONG else 0.0
"""For how long kubelet stands still at least."""


def ports(node: Cluster) -> int:
    """How many ports kubelet counts as allocatable at this moment; -1 where it cannot be asked."""
    try:
        every = asyncio.run(PodResources(node.folder / "kubelet/pod-resources/kubelet.sock").allocatable())
    except Exception:
        return -1
    return len(every.get(PORT, ()))


def shown(node: Cluster, count: int = len(PORTS)) -> None:
    until(f"kubelet shows {count} ports", lambda: ports(node) == count, AGAIN_S)


def registrations(node: Cluster) -> int:
    return sum(one.get("resource") == PORT for one in node.agent_said("registered"))


def given(node: Cluster, name: str) -> None:
    """A pod gets a port: what is shown is no list of a plugin that is gone."""
    run_pod(node, name, port="1")
    delete_pod(node, name)


def test_a_touched_kubelet_socket_is_no_new_kubelet(node: Cluster) -> None:
    """Nothing is registered again, though the folder changes too."""
    folder, times = node.folder / "kubelet/device-plugins", registrations(node)
    for change in (os.utime, lambda path: path.chmod(0o750), lambda path: os.chown(path, 0, 0)):
        change(folder / "kubelet.sock")
        (folder / "news").touch()
        (folder / "news").unlink()
        given(node, "touched")
    assert registrations(node) == times
    shown(node)


def test_a_deleted_plugin_socket_is_replaced(node: Cluster) -> None:
    """Several times in a row; each time on another path."""
    folder, paths = node.folder / "kubelet/device-plugins", set[str]()
    for _ in range(REPLACED):
        times = registrations(node)
        (path,) = folder.glob(f"nodeagent-{DRIVER}_port-*.sock")
        paths.add(path.name)
        path.unlink()
        until("the port is registered again", lambda times=times: registrations(node) > times, AGAIN_S)
        shown(node)
    assert len(paths) == REPLACED
    given(node, "replaced")


def test_a_reload_keeps_what_is_shown(node: Cluster) -> None:
    """SIGHUP again and again registers nothing again."""
    times = registrations(node)
    for _ in range(REPLACED):
        node.send("nodeagent", signal.SIGHUP)
    given(node, "reloaded")
    assert registrations(node) == times
    shown(node)


def restarted(node: Cluster, how: signal.Signals) -> None:
    node.stop("nodeagent", how)
    shown(node, 0)
    node.start("nodeagent")
    node.agent_ready()
    shown(node)


def test_an_agent_that_restarts_again_and_again_keeps_being_shown(node: Cluster) -> None:
    """In order and by kill -9; kubelet shows nothing between, and dead sockets do not pile up."""
    for turn in range(RESTARTS):
        restarted(node, signal.SIGKILL if turn % 2 else signal.SIGTERM)
    assert len([*(node.folder / "kubelet/device-plugins").glob(f"nodeagent-{DRIVER}_port-*.sock")]) == 1
    given(node, "restarted")


def test_a_kubelet_that_restarts_shows_everything_again(node: Cluster) -> None:
    """In order and by kill -9: as soon as it can be asked."""
    for turn in range(KUBELET_RESTARTS):
        node.restart("kubelet", signal.SIGKILL if turn % 2 else signal.SIGTERM)
        until("kubelet answers", lambda: ports(node) >= 0)
        shown(node)
    node.agent_ready()
    given(node, "after")


def test_a_kubelet_that_stood_still_shows_what_is_advertised_when_it_goes_on(node: Cluster) -> None:
    """For longer than a Register may take, first with an agent that was restarted meanwhile, then with the same one."""
    for act in (lambda: late(node), lambda: None):
        node.send("kubelet", signal.SIGSTOP)
        began = time.monotonic()
        try:
            act()
            time.sleep(max(0.0, began + STOPPED_S - time.monotonic()))
        finally:
            node.send("kubelet", signal.SIGCONT)
        shown(node)
    given(node, "later")
    restarted(node, signal.SIGTERM)


def late(node: Cluster) -> None:
    """Restart the agent, and wait until it has given up a Register."""
    said = failures(node)
    node.stop("nodeagent", signal.SIGKILL)
    node.start("nodeagent")
    until("a Register has exceeded its deadline", lambda: failures(node) > said, REGISTER_S)


def failures(node: Cluster) -> int:
    return sum("DEADLINE_EXCEEDED" in one["error"] for one in node.agent_said("not-registered"))
