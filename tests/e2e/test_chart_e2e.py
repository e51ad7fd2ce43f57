"""The chart as helm renders it, on a real API server: what it makes is accepted, what is wrong is refused before that.

    NODEAGENT_E2E_BIN=/folder make test TESTS=tests/e2e/test_chart_e2e.py

The folder holds etcd, kube-apiserver and helm, or PATH has them. No root is needed, and nothing runs on the node.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.config.load import parse
from nodeagent.config.schema import Config, schema
from nodeagent.core.opaque.decode import API_VERSION
from nodeagent.kube.kubelet.plugin_sockets import plugin_sockets
from tests.e2e import apiserver, grounds
from tests.e2e.kubeapi import KubeApi, Object, Refusal, claim, collection, request, until
from tests.support.paths import CHECKOUT, DATA

CHART = CHECKOUT / "deploy" / "chart"
LACKING = apiserver.lacking("helm") if CHART.exists() else "the chart lies in the checkout"
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING)
if not LACKING:
    from deploy import generate

CASES = sorted((DATA / "chart").glob("*.yaml"))
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "digest": {"image": {"digest": "sha256:" + "0" * 64, "pullSecrets": ["one"]}},
    "kubelet": {"config": {"kubeletDir": "/var/lib/k0s/kubelet", "kubeletConfig": {"file": "/etc/k0s/kubelet.yaml"}}},
    "nvidia": {"nvidia": {"runtimeClassName": "nvidia"}},
    "library": {"privileged": True, "nvidia": {"driverRoot": "/run/nvidia/driver", "libraryFolder": "/usr/lib64"}},
    "metrics": {"metrics": {"enabled": True, "secretName": "s", "serviceMonitor": {"enabled": True}}},
    "hugepages": {"config": {"hugepages": [{"pageSize": "2Mi", "node": 0, "pages": 1000000}]}},
    "partition": {"config": {"pinning": {"partition": "root"}}},
    "unpinned": {"config": {"pinning": {"mode": "off"}}},
    "driver": {"config": {"dra": {"driver": "devices.example.com"}}},
    "folders": {"hostFolders": ["/etc/kubernetes/kubelet.conf.d"]},
    "bundles": {"runtimeBundles": "/run/containers/storage/overlay-containers"},
    "published": {"config": {"publish": {"nodeLabels": True, "nodeResourceTopology": False}}},
    "eventless": {"config": {"events": {"enabled": False}}},
    "selinux": {"seLinuxOptions": {"type": "spc_t"}, "podLabels": {"a": "b"}, "podAnnotations": {"c": "d"}},
}
"""What is combined two by two."""
MONITOR = "monitoring.coreos.com"
ENDPOINT = ("port", "path", "interval", "scheme", "authorization", "tlsConfig", "relabelings")


# ---------------------------------------------------------------- rendering


def helm(*words: str) -> str:
    """What helm prints; AssertionError with its message where it refuses."""
    env = {**os.environ, "PATH": grounds.path(), "HELM_NAMESPACE": "nodeagent"}
    done = subprocess.run(["helm", *words], capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(folder: Path, values: Mapping[str, Any] | None = None, release: str = "nodeagent") -> list[Object]:
    """The chart's documents. folder: for the file of values."""
    path = folder / "values.json"
    path.write_text(json.dumps(values or {}))
    text = helm("template", release, str(CHART), "-f", str(path), "--kube-version", generate.KUBERNETES)
    return [one for one in yaml.safe_load_all(text) if one]


def refusal(folder: Path, values: Mapping[str, Any]) -> str:
    """Why helm does not render the chart with these values; "" where it does."""
    try:
        rendered(folder, values)
    except AssertionError as refused:
        return str(refused)
    return ""


def only(documents: list[Object], kind: str) -> Object:
    (found,) = [one for one in documents if one["kind"] == kind]
    return found


def pod_of(documents: list[Object]) -> Object:
    found: Object = only(documents, "DaemonSet")["spec"]["template"]["spec"]
    return found


def mounts_of(documents: list[Object]) -> dict[str, Object]:
    (container,) = pod_of(documents)["containers"]
    return {one["mountPath"]: one for one in container["volumeMounts"]}


def configuration(documents: list[Object]) -> str:
    (text,) = only(documents, "ConfigMap")["data"].values()
    assert isinstance(text, str)
    return text


def together(*several: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in several:
        for key, value in one.items():
            inner = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = together(found[key], value) if inner else value
    return found


# ---------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("apiserver")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[KubeApi]:
    """A server that knows ServiceMonitors, as far as the chart makes some, and has the namespace."""
    with apiserver.api_server(folder) as found:
        found.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "nodeagent"}})
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": "nodeagent"},
        }
        found.create(account)
        found.create(_service_monitors())
        until("it knows ServiceMonitors", lambda: _serves(found, f"/apis/{MONITOR}/v1/servicemonitors"))
        yield found


def _serves(api: KubeApi, path: str) -> bool:
    """Not found, then "storage is (re)initializing", until it does."""
    try:
        api.call("GET", path)
    except Refusal:
        return False
    return True


def _service_monitors() -> Object:
    """The fields of the operator's own definition that the chart uses; a server prunes or refuses all others."""
    text, free = {"type": "string"}, {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    kinds = dict.fromkeys(ENDPOINT[:4], text) | dict.fromkeys(ENDPOINT[4:6], free)
    relabel = {"sourceLabels": {"type": "array", "items": text}, "targetLabel": text}
    kinds["relabelings"] = {"type": "array", "items": {"type": "object", "properties": relabel}}
    endpoints = {"type": "array", "items": {"type": "object", "properties": kinds}}
    spec = {"type": "object", "properties": {"jobLabel": text, "selector": free, "endpoints": endpoints}}
    version = {"name": "v1", "served": True, "storage": True}
    version["schema"] = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    names = {"plural": "servicemonitors", "singular": "servicemonitor", "kind": "ServiceMonitor"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"servicemonitors.{MONITOR}"},
        "spec": {"group": MONITOR, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def applied(api: KubeApi, documents: list[Object]) -> None:
    """Each document is accepted as it is, and nothing is stored."""
    for one in documents:
        if one["kind"] != "Namespace":
            api.create(one, dry_run=True)


# ---------------------------------------------------------------- what is accepted


def test_the_manifests_are_what_the_chart_renders() -> None:
    """Other versions of helm may print them in another order."""
    for path, text in generate.manifests(generate.helm() or "helm").items():
        assert _contents(path.read_text()) == _contents(text), f"{path.name}: run make manifests"


def _contents(text: str) -> tuple[list[str], list[str]]:
    """The documents and the comments of a file."""
    documents = [yaml.safe_dump(one) for one in yaml.safe_load_all(text)]
    return sorted(documents), sorted(line.strip() for line in text.splitlines() if line.strip().startswith("#"))


def test_the_chart_is_accepted_as_it_is(api: KubeApi, tmp_path: Path) -> None:
    documents = rendered(tmp_path)
    applied(api, documents)
    assert parse(configuration(documents), source="the ConfigMap") == Config()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_set_of_values_is_accepted(api: KubeApi, tmp_path: Path, path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    documents = rendered(tmp_path, values)
    applied(api, documents)
    _is_the_configuration(documents, values)


def _is_the_configuration(documents: list[Object], values: Mapping[str, Any]) -> None:
    """What the ConfigMap has is what the values say, and the agent takes it."""
    found = yaml.safe_load(text := configuration(documents))
    wanted = {"apiVersion": API_VERSION, "kind": "NodeAgentConfiguration", **values.get("config", {})}
    if (metrics := values.get("metrics", {})).get("enabled"):
        wanted["metrics"] = {"listen": f"{metrics.get('address', '0.0.0.0')}:{metrics.get('port', 9101)}"}
    if root := values.get("nvidia", {}).get("driverRoot"):
        wanted["nvidia"] = {"driverRoot": root.rstrip("/"), **wanted.get("nvidia", {})}
    assert found == wanted
    if found.keys() <= schema()["$defs"]["Config"]["properties"].keys():
        parse(text, source="the ConfigMap")


def test_every_two_options_go_together(api: KubeApi, tmp_path: Path) -> None:
    for names in itertools.combinations(OPTIONS, 2):
        values = together(*(OPTIONS[name] for name in names))
        documents = rendered(tmp_path, values)
        namespaced = [one for one in documents if "namespace" in one["metadata"]]
        try:
            applied(api, namespaced)
        except Refusal as refused:
            raise AssertionError(f"{' and '.join(names)}: {refused}") from None
        _is_the_configuration(documents, values)


def test_the_root_of_nvidia_s_driver_is_configured_where_it_is_on_the_host(tmp_path: Path) -> None:
    """The pod sees it elsewhere; a root in the agent's own configuration comes first."""
    values: dict[str, Any] = {"privileged": True, "nvidia": {"driverRoot": "/home/kubernetes/bin/nvidia/"}}
    found = parse(configuration(rendered(tmp_path, values)), source="the ConfigMap")
    assert found.nvidia.driver_root == "/home/kubernetes/bin/nvidia"
    values["config"] = {"nvidia": {"driverRoot": "/other", "driverFiles": "inject"}}
    found = parse(configuration(rendered(tmp_path, values)), source="the ConfigMap")
    assert (found.nvidia.driver_root, found.nvidia.driver_files) == ("/other", "inject")


TEXTS = (
    "n",
    "off",
    "~",
    "1:30",
    "0825",
    "0o17",
    "0x1F",
    "1e3",
    "1_000",
    ".inf",
    "2026-01-01",
    "=",
    "<<",
    "",
    "a: b",
    "# c",
)
"""Strings that YAML 1.1, YAML 1.2, helm and Python do not all read as strings where they stand without quotes."""


def test_texts_and_numbers_reach_the_agent_as_they_were_written(tmp_path: Path) -> None:
    env = {f"V{i}": text for i, text in enumerate(TEXTS)}
    one = {"name": "kvm", "kind": "char", "paths": ["/dev/kvm"], "env": env}
    config = {
        "resources": [one],
        "resyncSeconds": 31_000_000,
        "hugepages": [{"pageSize": "2Mi", "node": 0, "pages": 10**7}],
    }
    found = parse(configuration(rendered(tmp_path, {"config": config})), source="the ConfigMap")
    assert found.served[0].env == env
    assert (found.resync_seconds, found.hugepages[0].pages) == (31_000_000, 10**7)


# ---------------------------------------------------------------- what follows from the configuration


def test_the_pod_mounts_the_folders_that_the_configuration_names(tmp_path: Path) -> None:
    values = yaml.safe_load((DATA / "chart" / "all.yaml").read_text())
    documents = rendered(tmp_path, values)
    mounts, places = mounts_of(documents), {one["name"]: one for one in pod_of(documents)["volumes"]}
    for path in ("/var/lib/agent", "/run/agent", "/etc/cdi", "/run/other", "/sys/devices/system/node"):
        assert not mounts[path].get("readOnly"), path
    for path in ("/etc/kubernetes/kubelet", "/opt/one", "/opt/two", "/var/lib/k0s/kubelet"):
        assert mounts[path]["readOnly"], path
    service = plugin_sockets(
        Path("/var/lib/k0s/kubelet"), "devices.example.com", "0" * 8 + "-0000" * 3 + "-" + "0" * 12
    ).service
    assert str(service.parent) in mounts
    assert not any("conf.d" in path for path in mounts), "it lies in kubelet's folder"
    hosts = {
        path: places[one["name"]]["hostPath"]["path"]
        for path, one in mounts.items()
        if "hostPath" in places[one["name"]]
    }
    assert hosts == {path: path for path in hosts}


def test_the_runtime_s_bundles_are_mounted_where_the_values_name_them(tmp_path: Path) -> None:
    """Read-only, at the host's path; nothing is made on a node with another runtime, and no mount of a container is
    held after its end."""
    folder = "/run/containerd/io.containerd.runtime.v2.task"
    assert folder not in mounts_of(rendered(tmp_path))
    documents = rendered(tmp_path, {"runtimeBundles": folder})
    mount = mounts_of(documents)[folder]
    assert (mount["readOnly"], mount["mountPropagation"]) == (True, "HostToContainer")
    place = next(one for one in pod_of(documents)["volumes"] if one["name"] == mount["name"])
    assert place["hostPath"] == {"path": folder, "type": "Directory"}


@pytest.mark.parametrize(
    ("config", "unmounted"),
    [
        ({"pinning": {"mode": "off"}}, {"/var/run/nri", "/sys/fs/cgroup", "/run/systemd"}),
        ({"pinning": {"mode": "cgroup"}}, {"/var/run/nri"}),
    ],
)
def test_without_pinning_nothing_of_it_can_be_written(tmp_path: Path, config: Object, unmounted: set[str]) -> None:
    """Also not through /sys, where the control groups are mounted too."""
    mounts = mounts_of(rendered(tmp_path, {"config": config}))
    assert mounts_of(rendered(tmp_path)).keys() - mounts.keys() == unmounted
    assert mounts["/sys"]["recursiveReadOnly"] == "IfPossible"


def test_hugepages_and_partitions_get_their_rights_and_nobody_else(tmp_path: Path) -> None:
    def rights(name: str) -> tuple[list[str], Any, bool]:
        documents = rendered(tmp_path, OPTIONS[name])
        found = pod_of(documents)["containers"][0]["securityContext"]
        assert (found["privileged"], found["allowPrivilegeEscalation"]) == (False, False)
        node = "/sys/devices/system/node" in mounts_of(documents)
        return found["capabilities"]["add"], found.get("appArmorProfile"), node

    assert rights("hugepages") == ([], {"type": "Unconfined"}, True)
    assert rights("partition") == (["SYS_ADMIN"], None, False)
    assert rights("nvidia") == ([], None, False)


WRITERS: Mapping[str, Mapping[str, Any]] = {
    "tuning": {"pinning": {"tuning": {"governor": "performance"}}},
    "passthrough": {"dra": {"passthroughDrivers": ["vfio-pci"]}},
    "amd": {"amd": {"partitions": [{"gpus": ["0000:c1:*"], "compute": "CPX"}]}},
    "vfs": {"network": {"vfs": [{"match": {"netdevs": "eth1"}, "count": 2}]}},
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_below_sys_can_be_written(tmp_path: Path, name: str) -> None:
    """And only then: a privileged pod alone does not get it."""
    mounts = mounts_of(rendered(tmp_path, {"privileged": True, "config": WRITERS[name]}))
    assert not mounts["/sys"].get("readOnly") and "recursiveReadOnly" not in mounts["/sys"]
    assert mounts_of(rendered(tmp_path, {"privileged": True}))["/sys"]["readOnly"]


def test_nvidia_s_library_lies_where_the_agent_looks_for_it(tmp_path: Path) -> None:
    """Not where the image has its own libraries."""
    documents = rendered(tmp_path, yaml.safe_load((DATA / "chart" / "privileged.yaml").read_text()))
    mounts, places = mounts_of(documents), {one["name"]: one for one in pod_of(documents)["volumes"]}
    found = {
        path: places[mounts[path]["name"]]["hostPath"]["path"] for path in mounts if "nvidia" in mounts[path]["name"]
    }
    assert found == {"/run/nvidia/driver": "/run/nvidia/driver", "/host/usr/lib64": "/usr/lib64"}
    assert mounts["/run/nvidia/driver"]["mountPropagation"] == "HostToContainer"


def test_the_alerts_lead_to_the_runbooks_of_the_values_and_go_by_the_release(tmp_path: Path) -> None:
    address = "http://wiki.example.com/nodeagent"
    on = {"metrics": {"enabled": True, "prometheusRule": {"enabled": True, "labels": {"a": "b"}}}}
    shipped = yaml.safe_load((CHECKOUT / "deploy" / "monitoring" / "rules.yaml").read_text())
    assert only(rendered(tmp_path, on), "PrometheusRule")["spec"] == shipped
    on = together(on, {"metrics": {"prometheusRule": {"runbookUrl": address}}})
    found = only(rendered(tmp_path, on, "storage"), "PrometheusRule")
    assert (found["metadata"]["name"], found["metadata"]["labels"]) == ("storage-nodeagent", {"a": "b"})
    (group,) = found["spec"]["groups"]
    urls = {one["alert"]: one["annotations"]["runbook_url"] for one in group["rules"] if "alert" in one}
    names = [one["alert"] for group in shipped["groups"] for one in group["rules"] if "alert" in one]
    assert len(names) > 9 and urls == {name: f"{address}#{name.lower()}" for name in names}
    assert [one["expr"] for one in group["rules"] if "up{" in one["expr"]] == ['up{job="storage-nodeagent"} == 0']


def test_pods_are_replaced_where_a_key_that_is_read_at_the_start_has_changed(tmp_path: Path) -> None:
    """All else is taken over by running agents."""

    def template(**config: Any) -> Object:
        return only(rendered(tmp_path, {"config": config}), "DaemonSet")["spec"]["template"]

    assert template(auditDays=9, pinning={"onFailure": "warn"}) == template()
    for changed in (
        {"pinning": {"nriIndex": "05"}},
        {"status": {"group": "wheel"}},
        {"pinning": {"verifySeconds": 9.5}},
    ):
        assert template(**changed) != template()
    assert template(pinning={"nriIndex": "05"}) != template(pinning={"nriIndex": "06"})


def test_classes_policies_and_rights_are_those_of_the_driver_and_the_account(tmp_path: Path) -> None:
    documents = rendered(tmp_path, yaml.safe_load((DATA / "chart" / "all.yaml").read_text()))
    text = yaml.safe_dump_all(
        [one for one in documents if one["kind"] not in ("DaemonSet", "ConfigMap", "Pod")], width=999
    )
    assert set(re.findall(r"[\w.-]*nodeagent\.dev[\w/]*", text)) == {API_VERSION}
    assert set(re.findall(r"system:serviceaccount:[\w:-]+", text)) == {"system:serviceaccount:nodeagent:agent"}
    names = {one["spec"].get("extendedResourceName") for one in documents if one["kind"] == "DeviceClass"}
    assert names == {None, "example.com/gpu", "example.com/vf", "example.com/nvme"}


def test_events_labels_and_topologies_may_be_written_only_where_they_are_configured(tmp_path: Path) -> None:
    """A key that is false still gives the right: what was published has to be removed."""

    def given(**config: Any) -> set[str]:
        documents = rendered(tmp_path, {"config": config})
        rules = only(documents, "ClusterRole")["rules"]
        written = {name for rule in rules for name in rule["resources"] if {"create", "patch"} & {*rule["verbs"]}}
        names = {_name(one)[1].partition(".")[0] for one in documents if one["kind"] == "ValidatingAdmissionPolicy"}
        return (written & {"events", "nodes", "noderesourcetopologies"}) | (names & {"nodes", "topologies"})

    assert given() == {"events"}
    assert given(events={"enabled": False}) == set()
    assert given(events={"enabled": True}) == {"events"}
    for on in (True, False):
        assert given(publish={"nodeLabels": on}) == {"events", "nodes"}
        topology = {"events", "noderesourcetopologies", "topologies"}
        assert given(publish={"nodeResourceTopology": on}) == topology


def test_a_second_release_shares_only_the_account_with_the_first(tmp_path: Path) -> None:
    values = yaml.safe_load((DATA / "chart" / "second-release.yaml").read_text())
    first, second = rendered(tmp_path), rendered(tmp_path, values, "storage")
    assert not {_name(one) for one in first} & {_name(one) for one in second}
    assert pod_of(second)["serviceAccountName"] == pod_of(first)["serviceAccountName"]
    labels = [only(one, "DaemonSet")["spec"]["selector"]["matchLabels"] for one in (first, second)]
    assert labels[0] != labels[1]


def _name(document: Object) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": {"kubletDir": "/x"}}, "at '/config': additional properties 'kubletDir' not allowed"),
        ({"config": {"kubeletDir": "x"}}, "at '/config/kubeletDir': 'x' does not match pattern"),
        (
            {"config": {"pinning": {"mode": "on"}}},
            "at '/config/pinning/mode': value must be one of 'auto', 'cgroup', 'nri', 'off'",
        ),
        (
            {"config": {"resources": [{"name": "a", "kind": "gpu", "sreve": "dra"}]}},
            "at '/config/resources/0': additional properties 'sreve' not allowed",
        ),
        (
            {"config": {"resources": [{"name": "a", "kind": "gpu", "pageSize": "2Mi"}]}},
            "at '/config/resources/0/pageSize': value must be ''",
        ),
        (
            {"config": {"resources": [{"name": "a", "kind": "char"}]}},
            "at '/config/resources/0': missing property 'paths'",
        ),
        ({"config": {"metrics": {"tls": {"certFile": "/a"}}}}, "at '/config/metrics/tls': missing property 'keyFile'"),
        ({"config": {"domain": "a.kubernetes.io"}}, "at '/config/domain': 'not' failed"),
        ({"config": {"auditDays": "many"}}, "at '/config/auditDays': got string, want integer"),
        ({"image": {"tga": "1"}}, "at '/image': additional properties 'tga' not allowed"),
        ({"image": {"digest": "abc"}}, "at '/image/digest': 'abc' does not match pattern '^(sha256:[0-9a-f]{64})?$'"),
        (
            {"image": {"pullPolicy": "Sometimes"}},
            "at '/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'",
        ),
        ({"metrics": {"port": 0}}, "at '/metrics/port': minimum: got 0, want 1"),
        ({"metrics": {"enabled": "yes"}}, "at '/metrics/enabled': got string, want boolean"),
        ({"replicas": 3}, "at '': additional properties 'replicas' not allowed"),
        ({"config": None}, "at '': missing property 'config'"),
        (
            {"tolerations": [{"operater": "Exists"}]},
            "at '/tolerations/0': additional properties 'operater' not allowed",
        ),
        ({"resources": {"limits": {"memory": "lots"}}}, "at '/resources/limits/memory': 'lots' does not match pattern"),
        ({"hostFolders": ["etc/k"]}, "at '/hostFolders/0': 'etc/k' does not match pattern"),
        (
            {"hostFolders": ["/etc/"]},
            "cannot mount /etc: it would hide the image's own folder, expected one below it, such as /etc/kubelet",
        ),
        ({"config": {"kubeletConfig": {"file": "/etc/kubelet.yaml"}}}, "cannot mount /etc: it would hide"),
        (
            {"hostFolders": ["/var/lib"]},
            "cannot mount /var/lib: kubelet's folder /var/lib/kubelet lies in it, whose volumes the pod would hold",
        ),
        (
            {"metrics": {"serviceMonitor": {"enabled": True}}},
            "cannot make a ServiceMonitor: metrics.enabled is false, so there is nothing to scrape",
        ),
        (
            {"metrics": {"prometheusRule": {"enabled": True}}},
            "cannot make a PrometheusRule: metrics.enabled is false, so there is nothing to be alerted of",
        ),
        (
            {"metrics": {"prometheusRule": {"runbookUrl": "docs/runbooks.md"}}},
            "at '/metrics/prometheusRule/runbookUrl': 'docs/runbooks.md' does not match pattern",
        ),
        (
            {"config": {"pinning": {"deviceInterrupts": "follow"}}},
            "cannot set config.pinning.deviceInterrupts: /proc/irq is read only in a pod that is not privileged; run",
        ),
        (
            {"config": {"pinning": {"moveInterrupts": True}}},
            "cannot set config.pinning.moveInterrupts: /proc/irq is read only in a pod that is not privileged; run the",
        ),
        (
            {"config": {"dra": {"passthroughDrivers": ["vfio-pci"]}}},
            "cannot set config.dra.passthroughDrivers: /sys/bus/pci is read only in a pod that is not privileged;",
        ),
        (
            {"config": {"pinning": {"tuning": {"governor": "performance"}}}},
            "cannot set config.pinning.tuning: /sys/devices/system/cpu is read only in a pod that is not privileged;",
        ),
        *(
            (
                {"nvidia": {key: "/run/nvidia/driver"}},
                "cannot use nvidia.driverRoot or nvidia.libraryFolder: a container that is not privileged may not open",
            )
            for key in ("driverRoot", "libraryFolder")
        ),
        (
            {"config": {"dra": {"kubeconfig": "/etc/k"}}},
            "cannot use config.dra.kubeconfig /etc/k: the pod talks to the API server with its service account",
        ),
        (
            {"config": {"dra": {"nodeName": "one"}}},
            'cannot use config.dra.nodeName one: every pod has the name of its own node, expected ""',
        ),
        (
            {"config": {"kubeletDir": "/var/" + "k" * 40, "dra": {"driver": "d" * 40 + ".example.com"}}},
            "config.kubeletDir and config.dra.driver have 97 characters together, expected at most 76",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_is_expected(
    tmp_path: Path, values: Object, message: str
) -> None:
    assert message in refusal(tmp_path, values)


# ---------------------------------------------------------------- as helm installs it


def test_a_release_is_installed_upgraded_rolled_back_and_removed(api: KubeApi, folder: Path, tmp_path: Path) -> None:
    """With the objects that it had before after the rollback, and none of its objects after the removal."""
    access = ("--kubeconfig", str(folder / "admin.kubeconfig"))
    wanted = [one for one in rendered(tmp_path) if one["kind"] != "Pod"]
    helm("install", "nodeagent", str(CHART), *access)
    image = lambda: pod_of([_stored(api, only(wanted, "DaemonSet"))])["containers"][0]["image"]  # noqa: E731
    first = image()
    assert all(_stored(api, one) for one in wanted)
    until("its policies are in force", lambda: _refuses_wrong_parameters(api))
    helm("upgrade", "nodeagent", str(CHART), "--set", "image.tag=other,deviceClasses.create=false", *access)
    assert image() == "localhost/nodeagent:other"
    assert api.items("/apis/resource.k8s.io/v1/deviceclasses") == []
    helm("rollback", "nodeagent", "1", *access)
    assert image() == first and all(_stored(api, one) for one in wanted)
    helm("uninstall", "nodeagent", *access)
    assert [one for one in wanted if _stored(api, one)] == []


def _stored(api: KubeApi, one: Object) -> Object:
    metadata = one["metadata"]
    path = collection(one["apiVersion"], one["kind"], metadata.get("namespace", ""))
    return api.find(f"{path}/{metadata['name']}") or {}


def _refuses_wrong_parameters(api: KubeApi) -> bool:
    made = claim("wrong", request("r", "cpu"))
    made["spec"]["devices"]["config"] = [{"opaque": {"driver": "nodeagent.dev", "parameters": {"kind": "CpuConfig"}}}]
    try:
        api.create(made, dry_run=True)
    except Refusal as refused:
        return "parameters.nodeagent.dev" in str(refused)
    return False
