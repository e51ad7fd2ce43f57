"""Attributes with several values, with the gate DRAListTypeAttributes on at the API server and the scheduler (1.37)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e import nodeview
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.grounds import minor_version
from tests.e2e.kubeapi import claim, request, until
from tests.e2e.nodeview import NUMA, devices, run_pod

GATE = "DRAListTypeAttributes"
FIRST_MINOR = 37
node = nodeview.node


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if (minor := minor_version()) and minor < FIRST_MINOR:
        pytest.skip(f"the scheduler of Kubernetes 1.{minor} matches no lists: it came with 1.{FIRST_MINOR}")
    with cluster(request.module.__name__, gates=(GATE,)) as made:
        yield made
        for log in made.logs.glob("nodeagent*.log"):
            assert "Traceback" not in log.read_text(), made.last_words()


def numa_of(node: Cluster, kind: str) -> list[dict[str, object]]:
    return [one["attributes"].get(NUMA, {}) for one in devices(node, kind).values()]


def test_a_group_of_cpus_names_the_nodes_near_it_and_matches_a_device_on_one_of_them(node: Cluster) -> None:
    """A claim for CPUs and a GPU on one NUMA node is allocated and prepared."""
    node.write_agent_config(listAttributes=True)
    until("CPUs have lists", lambda: (found := numa_of(node, "cpu")) and all("ints" in one for one in found))
    both = request("cpus", "cpu", cpus="1"), request("gpu", "gpu")
    node.api.create(claim("both", *both, match=NUMA))
    run_pod(node, "aligned", {"both": "both"})
    assert {one["claim"] for one in node.grants()} == {"both"}
    node.write_agent_config()
    until("CPUs have one node", lambda: (found := numa_of(node, "cpu")) and all("int" in one for one in found))
