"""What containers request of device plugins, from manifests as they are applied."""

from __future__ import annotations

from typing import Any

import pytest

from nodeagent.core.advice.pod_forecast import ContainerDemand
from nodeagent.errors import InputError
from nodeagent.kube.pod_demand import demands, of_the_node, pod_spec

CPU = "nodeagent.dev/cpu"


def container(name: str, limits: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "resources": {"limits": limits}, **more}


def test_containers_come_in_kubelets_order_with_their_extended_resources() -> None:
    """Init containers first; what the node itself has is named apart, as the agent does not count it."""
    spec = {
        "containers": [container("main", {CPU: 4, "cpu": "4", "memory": "1Gi"})],
        "initContainers": [container("warm", {CPU: "2"}), container("side", {CPU: "1"}, restartPolicy="Always")],
    }
    assert demands(spec) == (
        ContainerDemand(name="warm", amounts={CPU: 2}, init=True),
        ContainerDemand(name="side", amounts={CPU: 1}, init=True, sidecar=True),
        ContainerDemand(name="main", amounts={CPU: 4}),
    )
    assert of_the_node(spec) == ["cpu", "memory"]


def test_workloads_are_read_by_their_template() -> None:
    spec = {"containers": [container("main", {CPU: 1})]}
    workload = {"spec": {"template": {"spec": spec}}}
    assert pod_spec({"kind": "Pod", "spec": spec}) == spec
    assert pod_spec({"kind": "Deployment", **workload}) == spec
    assert pod_spec({"kind": "CronJob", "spec": {"jobTemplate": workload}}) == spec
    assert pod_spec({"kind": "PodTemplate", "template": {"spec": spec}}) == spec


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ({"requests": {CPU: 1}}, "only as a limit"),
        ({"requests": {CPU: 1}, "limits": {CPU: 2}}, "is requested with 1 and 2"),
        ({"limits": {CPU: "100m"}}, "it is not a whole number"),
        ({"limits": {CPU: "many"}}, 'cannot read quantity "many"'),
    ],
)
def test_what_the_api_server_would_refuse_is_refused(resources: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=f"cannot read container main: .*{why}"):
        demands({"containers": [{"name": "main", "resources": resources}]})


def test_what_has_no_containers_is_no_pod() -> None:
    for document in (
        {"kind": "Pod"},
        {"kind": "Job", "spec": {"template": []}},
        {"kind": "Pod", "spec": {"containers": 1}},
    ):
        with pytest.raises(InputError, match="it has no containers"):
            pod_spec(document)
