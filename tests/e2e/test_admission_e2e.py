"""The shipped admission policy on a real API server: it refuses what the driver would refuse, when it is applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nodeagent.core.opaque.decode import API_VERSION
from tests.e2e import nodeview
from tests.e2e.cluster import Cluster
from tests.e2e.kubeapi import Object, Refusal, claim, claim_path, request, template, until
from tests.support.opaque_cases import RIGHT, STRANGE, WRONG
from tests.support.running import CHECKOUT

node, started = nodeview.node, nodeview.started
POLICY = "parameters.nodeagent.dev"
BINDINGS = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"


def config(parameters: Mapping[str, Any], driver: str = "nodeagent.dev") -> list[Object]:
    return [{"opaque": {"driver": driver, "parameters": dict(parameters)}}]


def claim_with(parameters: Mapping[str, Any], **more: Any) -> Object:
    made = claim("policy", request("r", "cpu"))
    made["spec"]["devices"]["config"] = config(parameters, **more)
    return made


def refusal(node: Cluster, document: Object) -> str:
    """Why the server does not take a document, or "" if it does; nothing is stored."""
    try:
        node.api.create(document, dry_run=True)
    except Refusal as refused:
        return str(refused)
    return ""


def in_force(node: Cluster) -> None:
    """A policy is in force some seconds after it was made."""
    until("the policy is in force", lambda: refusal(node, claim_with({"kind": "CpuConfig"})))


def test_what_the_driver_refuses_cannot_be_applied_and_all_else_can(node: Cluster) -> None:
    in_force(node)
    wrong = [{"apiVersion": API_VERSION, "kind": kind, **said} for kind, said, _ in WRONG]
    for parameters in (*wrong, *(one for one, _ in STRANGE)):
        said = refusal(node, claim_with(parameters))
        assert POLICY in said and "expression" not in said, f"{parameters}: {said or 'accepted'}"
        assert refusal(node, claim_with(parameters, driver="another.example.com")) == ""
    for kind, said in RIGHT:
        assert refusal(node, claim_with({"apiVersion": API_VERSION, "kind": kind, **said})) == ""
    assert refusal(node, claim("policy", request("r", "cpu"))) == ""


def test_templates_and_classes_are_checked_alike_and_the_key_is_named(node: Cluster) -> None:
    in_force(node)
    parameters = {"apiVersion": API_VERSION, "kind": "CpuConfig", "option": []}
    made = template("policy", request("r", "cpu"))
    made["spec"]["spec"]["devices"]["config"] = config(parameters)
    device_class: Object = {"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass"}
    device_class |= {"metadata": {"name": "policy"}, "spec": {"config": config(parameters)}}
    for document in (claim_with(parameters), made, device_class):
        assert "unknown key option of CpuConfig, expected one of options, numa, coreType" in refusal(node, document)


def test_what_was_stored_before_the_policy_can_still_be_changed_elsewhere(node: Cluster) -> None:
    """Else its finalizers could never be removed."""
    documents = yaml.safe_load_all((CHECKOUT / "deploy" / "admission.yaml").read_text())
    (binding,) = [one for one in documents if one["kind"].endswith("Binding") and one["metadata"]["name"] == POLICY]
    node.api.delete(f"{BINDINGS}/{POLICY}")
    wrong = claim_with({"kind": "CpuConfig"})
    until("the policy is no longer in force", lambda: not refusal(node, wrong))
    node.api.create(wrong)
    node.api.create(binding)
    in_force(node)
    patch = {"metadata": {"labels": {"a": "b"}}}
    stored = node.api.call("PATCH", claim_path("policy"), patch, content="application/merge-patch+json")
    assert stored["metadata"]["labels"] == {"a": "b"}
