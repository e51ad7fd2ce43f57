"""The API server as tests talk to it: objects as plain dicts, blocking calls, waiting with a deadline."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

POLL_S = 0.1
CALL_S = 30.0
_PLURALS = {
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "ConfigMap": "configmaps",
    "CustomResourceDefinition": "customresourcedefinitions",
    "DaemonSet": "daemonsets",
    "DeviceClass": "deviceclasses",
    "Namespace": "namespaces",
    "Node": "nodes",
    "NodeResourceTopology": "noderesourcetopologies",
    "Pod": "pods",
    "ResourceClaim": "resourceclaims",
    "ResourceClaimTemplate": "resourceclaimtemplates",
    "ResourceSlice": "resourceslices",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "ServiceMonitor": "servicemonitors",
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
}
DRA = "/apis/resource.k8s.io/v1"
IMAGE = "localhost/box:1"
T = TypeVar("T")
Object = dict[str, Any]


class Refusal(Exception):  # noqa: N818
    """The server's answer was no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


def until(what: str, look: Callable[[], T | None], seconds: float = 40.0) -> T:
    """What `look` finds, as soon as that is neither None nor False nor empty."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(POLL_S)
    return found


class KubeApi:
    """Calls with one token."""

    def __init__(self, port: int, token: str) -> None:
        self.port = port
        self._token = token

    def call(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """The answer's document; Refusal; OSError if no server answers."""
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=CALL_S, context=context)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": content, "Accept": "application/json"}
        try:
            connection.request(method, path, None if body is None else _encoded(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status >= 300:
            raise Refusal(answer.status, text[:2000])
        return json.loads(text) if text.startswith("{") else text

    def ready(self) -> bool:
        try:
            return self.call("GET", "/readyz") == "ok"
        except (OSError, Refusal, http.client.HTTPException):
            return False

    def create(self, document: Mapping[str, Any], *, dry_run: bool = False) -> Object:
        """What was stored. A field that the server does not know is refused."""
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        namespace = document["metadata"].get("namespace", "")
        found: Object = self.call(
            "POST", collection(document["apiVersion"], document["kind"], namespace) + query, document
        )
        return found

    def find(self, path: str) -> Object | None:
        try:
            found: Object = self.call("GET", path)
        except Refusal as refusal:
            if refusal.status != 404:
                raise
            return None
        return found

    def delete(self, path: str) -> None:
        """Ask for it; it may take a while to go."""
        try:
            self.call("DELETE", path)
        except Refusal as refusal:
            if refusal.status != 404:
                raise

    def items(self, path: str) -> list[Object]:
        found: list[Object] = self.call("GET", path)["items"]
        return found


def _encoded(body: Any) -> str:
    """As Go writes it. The server compares opaque parameters byte by byte: were they written otherwise, it would take
    every later write of the claim's status for an attempt to change its allocation."""
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


def collection(version: str, kind: str, namespace: str = "") -> str:
    root = "/api/v1" if version == "v1" else f"/apis/{version}"
    return f"{root}{f'/namespaces/{namespace}' if namespace else ''}/{_PLURALS[kind]}"


def pod_path(name: str) -> str:
    return f"{collection('v1', 'Pod', 'default')}/{name}"


def claim_path(name: str) -> str:
    return f"{collection('resource.k8s.io/v1', 'ResourceClaim', 'default')}/{name}"


# ---------------------------------------------------------------- what tests create


def request(name: str, kind: str, *, count: int = 1, selector: str = "", **capacity: str) -> Object:
    """A request for devices of one of the shipped classes; capacity: what is consumed of each."""
    return {"name": name, "exactly": wanted(kind, count=count, selector=selector, **capacity)}


def wanted(kind: str, *, count: int = 1, selector: str = "", **capacity: str) -> Object:
    """What is in a request, or in one of its alternatives."""
    wanted: Object = {"deviceClassName": f"{kind}.nodeagent.dev", "count": count}
    if capacity:
        wanted["capacity"] = {"requests": capacity}
    if selector:
        wanted["selectors"] = [{"cel": {"expression": selector}}]
    return wanted


def claim_spec(*requests: Object, match: str = "") -> Object:
    """match: an attribute that all devices have to have in common."""
    return {"devices": {"requests": list(requests), **({"constraints": [{"matchAttribute": match}]} if match else {})}}


def claim(name: str, *requests: Object, match: str = "") -> Object:
    return _object("ResourceClaim", name, claim_spec(*requests, match=match))


def template(name: str, *requests: Object) -> Object:
    return _object("ResourceClaimTemplate", name, {"spec": claim_spec(*requests)})


def _object(kind: str, name: str, spec: Object) -> Object:
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "resource.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


SCRIPT = """
env | grep -E 'NODEAGENT|NVIDIA' | sort
for file in /var/run/nodeagent/claims/*/metadata.json; do [ -e $file ] && echo METADATA $(cat $file); done
for node in /dev/ttyE2E*; do [ -c $node ] && echo NODE $node $(dd if=$node bs=4 count=1 2>/dev/null | wc -c); done
echo READY
exec sleep 36000
"""


def pod(
    name: str,
    *,
    claims: Mapping[str, str] | None = None,
    limits: Mapping[str, str] | None = None,
    requests: Mapping[str, str] | None = None,
) -> Object:
    """A pod of one container that says what it got. claims: name within the pod -> claim; one that begins with "@" is
    made from that template."""
    using = {mine: _source(one) for mine, one in (claims or {}).items()}
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": ["/bin/sh", "-c", SCRIPT],
        "resources": {
            "claims": [{"name": one} for one in using],
            "limits": dict(limits or {}),
            "requests": dict(requests or {}),
        },
    }
    spec = {
        "containers": [container],
        "resourceClaims": [{"name": mine, **one} for mine, one in using.items()],
        "hostNetwork": True,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "tolerations": [{"operator": "Exists"}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": spec}


def _source(claim: str) -> Object:
    return {"resourceClaimTemplateName": claim[1:]} if claim[0] == "@" else {"resourceClaimName": claim}
