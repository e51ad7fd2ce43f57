"""Installing in a cluster, as docs/install.md has it, on a real node: the image of `make image` loaded into containerd,
the chart as helm installs, upgrades, rolls back and removes it, and the manifests.

    NODEAGENT_E2E_BIN=/folder make test TESTS=tests/e2e/test_install_e2e.py

The folder holds helm too. The tests are the steps of one installation, in their order. What each took is printed as
`install: …` lines.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.version import VERSION
from tests.e2e import apiserver, nodeview
from tests.e2e.cluster import Cluster, cluster
from tests.e2e.kubeapi import DRA, KubeApi, Object, Refusal, claim, collection, pod, pod_path, request, until
from tests.e2e.kubeapi import IMAGE as BOX
from tests.e2e.nodefiles import DRIVER, NODE, PORTS
from tests.e2e.nodeview import allocatable, delete_pod, running, said, slices
from tests.e2e.test_chart_e2e import CHART, helm
from tests.image.containerd import Containerd
from tests.support.image import build_image
from tests.support.paths import CHECKOUT

if reason := apiserver.lacking("helm"):
    pytest.skip(reason, allow_module_level=True)

REFERENCE, NEXT = f"localhost/nodeagent:{VERSION}", "next"
NAMESPACE = "nodeagent"
PODS = collection("v1", "Pod", NAMESPACE)
DAEMON_SET = f"{collection('apps/v1', 'DaemonSet', NAMESPACE)}/nodeagent"
VALUES: Mapping[str, Any] = {
    "config": {
        "reservedCpus": "0",
        "resources": [
            {"name": "cpu", "kind": "cpu", "serve": "both"},
            {"name": "port", "kind": "char", "paths": ["/dev/ttyE2E*"], "serve": "both"},
        ],
        "release": {"pollSeconds": 0.5, "confirmedSeconds": 0.5},
    }
}
"""For a machine of two CPUs."""
OF_THIS_NODE = {"nothing-is-pinned", "another-agent-leads"}
"""What is no fault of the installation: this machine may have control groups of version 1."""
PINNED = b"\x40\x01"
READY_S, IMPORT_S = 180.0, 300.0


def report(what: str, seconds: float) -> None:
    print(f"install: {what}: {seconds:.1f} s")


# ---------------------------------------------------------------- the node and what is asked of it


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A node without an agent, whose containerd has the image as docs/install.md loads it."""
    image = build_image(tmp_path_factory.mktemp("image"))
    with cluster(__name__, agent=False) as made:
        began = time.monotonic()
        made.ctr("image", "import", str(image.archive), seconds=IMPORT_S)
        report(f"image of {image.archive.stat().st_size >> 20} MiB imported", time.monotonic() - began)
        made.ctr("image", "tag", BOX, "docker.io/library/busybox:stable")
        yield made


def access(node: Cluster) -> tuple[str, ...]:
    return ("--kubeconfig", str(node.folder / "admin.kubeconfig"))


def agents(node: Cluster) -> list[Object]:
    """The agent's pods that have not ended, the oldest first."""
    found = [one for one in node.api.items(PODS) if one["metadata"]["name"] != "nodeagent-test"]
    return sorted(found, key=lambda one: str(one["metadata"]["creationTimestamp"]))


def containers(node: Cluster) -> list[str]:
    """The ids of the agents' running containers, the oldest first."""
    each = [status for one in agents(node) for status in one["status"].get("containerStatuses", ())]
    return [one["containerID"].rpartition("/")[2] for one in each if "running" in one["state"]]


def ask(node: Cluster, verb: str) -> Any:
    """What `kubectl exec daemonset/nodeagent -- nodeagent VERB -o json` prints."""
    words = ("tasks", "exec", "--exec-id", uuid.uuid4().hex, containers(node)[-1], "nodeagent", verb, "-o", "json")
    printed = node.output("ctr", "-a", f"{node.folder}/containerd.sock", "-n", "k8s.io", *words)
    return json.loads(re.sub(r"\Atime=.*\n", "", printed))  # ctr warns of control groups of version 1


def grants(node: Cluster) -> list[Any]:
    """What is held, without what may differ between two looks at the same."""
    return sorted((one["id"], one["cpus"], str(one["devices"])) for one in ask(node, "grants"))


def rolled_out(node: Cluster) -> None:
    """As `kubectl rollout status` waits."""
    until("the DaemonSet is rolled out", lambda: _is_rolled_out(node.api.call("GET", DAEMON_SET)), READY_S)


def _is_rolled_out(found: Object) -> bool:
    status = found["status"]
    counts = [status.get(key, 0) for key in ("updatedNumberScheduled", "numberAvailable", "currentNumberScheduled")]
    return status.get("observedGeneration") == found["metadata"]["generation"] and counts == [1, 1, 1]


def alone(node: Cluster) -> None:
    """Return once only one agent is left, which serves all."""
    until("one agent is left", lambda: len(agents(node)) == 1, READY_S)
    until("it serves everything", lambda: serves(node), READY_S)


def free(node: Cluster) -> tuple[int, int]:
    """How many CPUs and ports the Node can allocate to the device plugin's pods."""
    return allocatable(node, "cpu"), allocatable(node, "port")


def serves(node: Cluster) -> bool:
    found = ask(node, "status")
    return bool(found["ready"] and all(one["registered"] for one in found["resources"]))


def logged(node: Cluster) -> list[dict[str, Any]]:
    """What all agents have logged."""
    files = sorted((node.folder / "pods").glob(f"{NAMESPACE}_nodeagent-*/nodeagent/*.log"))
    texts = [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]
    assert not [one for one in texts if "Traceback" in one], texts
    return [json.loads(one) for one in texts if one.startswith("{")]


def complaints(node: Cluster) -> list[dict[str, Any]]:
    worse = [one for one in logged(node) if one["level"] not in ("debug", "info")]
    return [one for one in worse if one["event"] not in OF_THIS_NODE]


def run_claimed(node: Cluster, name: str, kind: str) -> None:
    node.api.create(claim(name, request("one", kind)))
    node.api.create(pod(name, claims={"mine": name}))
    running(node, name)


def resident_mib() -> dict[str, float]:
    """The resident memory of each of the agent's processes in pods, by what it is."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            lines = (path / "status").read_text().splitlines()
        except OSError:
            continue
        if any(one.startswith("/opt/nodeagent/") for one in words[:2]):
            size = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
            found[f"{path.name} {' '.join(words[1:4])}"] = sum(size) / 1024
    return found


# ---------------------------------------------------------------- helm install


@pytest.fixture(scope="module")
def installed(node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The node once the chart is installed, and everything is served."""
    values = tmp_path_factory.mktemp("values") / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    label = {"pod-security.kubernetes.io/enforce": "privileged"}
    node.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": label}})
    began = time.monotonic()
    helm("install", "nodeagent", str(CHART), "-f", str(values), *access(node))
    report("helm install", time.monotonic() - began)
    until("there is a pod", lambda: agents(node), READY_S)
    created = time.monotonic()
    for what, look in (
        ("its container runs", lambda: containers(node)),
        ("slices are published", lambda: slices(node)),
        ("kubelet shows the device plugin's resources", lambda: allocatable(node, "port") and allocatable(node, "cpu")),
        ("it is Ready", lambda: node.api.call("GET", DAEMON_SET)["status"].get("numberReady")),
    ):
        until(what, look, READY_S)
        report(f"from the pod's creation until {what}", time.monotonic() - created)
    rolled_out(node)
    report("from the pod's creation until the rollout is complete", time.monotonic() - created)
    return node


def test_the_agent_is_ready_and_served_through_both_apis(installed: Cluster) -> None:
    """Slices are written with the pod's own account and the address that it finds in its environment; there is no
    other agent."""
    until("everything is served", lambda: serves(installed), READY_S)
    assert free(installed) == (1, len(PORTS))
    for kind, count in (("cpu", 1), ("char", len(PORTS))):
        until(f"{kind} is published", lambda kind=kind: nodeview.devices(installed, kind))
        assert len(nodeview.devices(installed, kind)) == count
    for name, mib in resident_mib().items():
        print(f"install: resident: {name}: {mib:.1f} MiB")


def test_the_policies_are_in_force(installed: Cluster) -> None:
    """A token of the account on this node writes no slice of another node."""
    token = installed.agent_token(NODE)
    spec = {**slices(installed)[0]["spec"], "nodeName": "another"}
    other = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "other"}, "spec": spec}
    with pytest.raises(Refusal, match=f"slices.{DRIVER}"):
        KubeApi(installed.api.port, token).create(other, dry_run=True)


def test_helm_test_passes(installed: Cluster) -> None:
    assert "Succeeded" in helm("test", "nodeagent", *access(installed))


def test_kubelet_never_deletes_the_image_once_it_has_the_label(node: Cluster) -> None:
    """CRI calls it pinned: field 8 of its Image, the last one of the answer."""
    runtime = Containerd(node.folder / "containerd.sock")
    assert not runtime.image_status(REFERENCE).endswith(PINNED)
    node.ctr("image", "label", REFERENCE, "io.cri-containerd.pinned=pinned")
    until("it is pinned", lambda: runtime.image_status(REFERENCE).endswith(PINNED))


def test_the_pod_of_the_documentation_gets_its_cpu(installed: Cluster) -> None:
    (text,) = re.findall(r"^```yaml\n# pod.yaml\n(.*?)^```", (CHECKOUT / "docs/install.md").read_text(), re.M | re.S)
    document = yaml.safe_load(text)
    name = document["metadata"]["name"]
    document["metadata"]["namespace"] = "default"
    installed.api.create(document)
    running(installed, name)
    until("it has said its CPU", lambda: "CPUs 1" in printed(installed, name))
    installed.api.call("DELETE", pod_path(name), {"gracePeriodSeconds": 1})
    until("it is given back", lambda: not grants(installed))


def printed(node: Cluster, pod: str) -> list[str]:
    files = sorted((node.folder / "pods").glob(f"default_{pod}_*/main/*.log"))
    return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]


def test_pods_get_a_cpu_by_claim_and_a_device_by_the_device_plugin(installed: Cluster) -> None:
    """They run on through all that follows."""
    run_claimed(installed, "engine", "cpu")
    nodeview.run_pod(installed, "serial", port="1")
    assert said(installed, "engine")["NODEAGENT_CPUS"] == "1"
    nodes = [text for name, text in said(installed, "serial").items() if name.startswith("NODE ")]
    assert [text.split()[1] for text in nodes] == ["4"], "one device, and it can be read"
    assert len(grants(installed)) == 2


def test_nothing_that_the_agent_tries_in_the_pod_is_refused(installed: Cluster) -> None:
    assert logged(installed)
    assert complaints(installed) == []
    assert ask(installed, "status")["inventory"]["warnings"] == []


# ---------------------------------------------------------------- upgrade, rollback


def replaced(node: Cluster, during: str, *words: str) -> None:
    """Replace the agent while pods hold what they hold. during: a pod that gets a device by claim while there are two
    agents."""
    before, counts, shown = grants(node), free(node), {one["metadata"]["uid"] for one in slices(node)}
    (old,) = agents(node)
    began = time.monotonic()
    helm(*words, *access(node))
    until("two agents run", lambda: len(containers(node)) == 2, READY_S)
    run_claimed(node, during, "char")
    assert old["metadata"]["name"] in [one["metadata"]["name"] for one in agents(node)], "claims are served by either"
    delete_pod(node, during)
    node.api.delete(f"{DRA}/namespaces/default/resourceclaims/{during}")
    alone(node)
    report(f"helm {words[0]} until the new agent serves alone", time.monotonic() - began)
    assert agents(node)[0]["metadata"]["uid"] != old["metadata"]["uid"]
    until("the same is held", lambda: grants(node) == before)
    assert {one["metadata"]["uid"] for one in slices(node)} == shown, "no slice was withdrawn"
    until("kubelet has the same to give", lambda: free(node) == counts)
    _never_restarted(node, "engine", "serial")


def _never_restarted(node: Cluster, *names: str) -> None:
    for name in names:
        (status,) = running(node, name)["status"]["containerStatuses"]
        assert status["restartCount"] == 0, name


def test_an_upgrade_keeps_what_pods_hold_and_claims_are_prepared_meanwhile(installed: Cluster) -> None:
    installed.ctr("image", "tag", REFERENCE, f"localhost/nodeagent:{NEXT}")
    replaced(installed, "late", "upgrade", "nodeagent", str(CHART), "--reuse-values", "--set", f"image.tag={NEXT}")
    (container,) = agents(installed)[0]["spec"]["containers"]
    assert container["image"].endswith(f":{NEXT}")


def test_a_rollback_keeps_it_too(installed: Cluster) -> None:
    replaced(installed, "later", "rollback", "nodeagent", "1")
    (container,) = agents(installed)[0]["spec"]["containers"]
    assert container["image"] == REFERENCE
    assert complaints(installed) == []


# ---------------------------------------------------------------- removal, and the manifests


def removed(node: Cluster) -> None:
    """As `kubectl delete daemonset --cascade=foreground` and `helm uninstall` do."""
    began = time.monotonic()
    node.api.call("DELETE", DAEMON_SET, {"propagationPolicy": "Foreground"})
    until("the DaemonSet is gone", lambda: node.api.find(DAEMON_SET) is None, READY_S)
    assert (agents(node), slices(node)) == ([], [])
    helm("uninstall", "nodeagent", *access(node))
    report("removal", time.monotonic() - began)


LEFT = ("/var/lib/kubelet/plugins", "/var/lib/kubelet/plugins_registry", "/var/lib/kubelet/device-plugins")


def of_the_driver(node: Cluster) -> dict[str, str]:
    """The device plugin's resources that the Node can allocate."""
    found = node.api.call("GET", f"/api/v1/nodes/{NODE}")["status"]["allocatable"]
    return {name: count for name, count in found.items() if name.startswith(DRIVER)}


def test_a_removal_leaves_only_what_the_documentation_says(installed: Cluster) -> None:
    """And the pods that hold something."""
    removed(installed)
    found = set(installed.output("find", *LEFT, "/var/lib/nodeagent", "/run/nodeagent", "/var/run/cdi").split())
    print("install: left:", *sorted(found))
    assert {one for one in found if one.startswith("/var/lib/kubelet") and "nodeagent" in one} == {
        f"/var/lib/kubelet/plugins/{DRIVER}"
    }
    until("kubelet has nothing to give", lambda: set(of_the_driver(installed).values()) == {"0"})
    assert of_the_driver(installed).keys() == {f"{DRIVER}/cpu", f"{DRIVER}/port"}
    _never_restarted(installed, "engine", "serial")


def test_the_manifests_take_up_where_the_removed_agent_left(installed: Cluster) -> None:
    """The pods hold what they held; it is given back when they end."""
    began = time.monotonic()
    for document in manifests():
        if not installed.api.find(_path(document)):
            installed.api.create(document)
    rolled_out(installed)
    report("manifests until the rollout is complete", time.monotonic() - began)
    until("everything is served", lambda: serves(installed), READY_S)
    assert len(grants(installed)) == 2
    for name in ("engine", "serial"):
        delete_pod(installed, name)
    until("nothing is held", lambda: not grants(installed), READY_S)
    assert complaints(installed) == []


def manifests() -> Iterator[Object]:
    """What `kubectl apply -k deploy` applies: the kustomization changes nothing but the image's tag."""
    kustomization = yaml.safe_load((CHECKOUT / "deploy" / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        yield from yaml.safe_load_all((CHECKOUT / "deploy" / name).read_text())


def _path(document: Object) -> str:
    metadata = document["metadata"]
    where = collection(document["apiVersion"], document["kind"], metadata.get("namespace", ""))
    return f"{where}/{metadata['name']}"
